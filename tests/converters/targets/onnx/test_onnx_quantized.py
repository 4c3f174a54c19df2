"""Blocks of int8 and int4: whose bytes they are, what the graph computes, what is kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import Checkpoint
from converters.encodings import ENCODINGS, NBITS, Encoding
from converters.errors import TensorError, UnsupportedError
from converters.ggml import load_ggml
from converters.sources import open_checkpoint
from converters.targets.onnx import (
    PRECISIONS,
    GraphOptions,
    OnnxPlan,
    WeightOptions,
    plan_onnx,
    write_onnx,
)
from converters.targets.onnx.plan import EMBEDDING, HEAD
from tests.converters.targets.onnx.decoders import (
    CONTEXT,
    KL_LIMIT,
    KL_LIMIT_FP16,
    KL_WRONG,
    PI,
    SHAPE,
    Array,
    Decoder,
    expected,
    kl,
    reference,
    some_tokens,
    tiny,
)
from tests.converters.test_nbits import parts_by_onnxruntime
from tests.tiny import ODD, Shape, write_tiny
from tests.tiny_gguf import write_tiny_gguf

EVEN = Shape(256, 512, 2, heads=4, kv_heads=2, head_dim=64, context=CONTEXT)  # every block fits
FEW = Shape(128, 256, 1, heads=4, kv_heads=2, head_dim=32, context=CONTEXT)  # those of 128 too
BLOCKS = [name for name, precision in PRECISIONS.items() if precision.has_blocks]
SIZES = pytest.mark.parametrize("block_size", [32, 128])
KINDS = pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
_GGUF_TYPES = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}


def write(checkpoint: Checkpoint, plan: OnnxPlan, out: Path, accuracy_level: int = 0) -> Path:
    """The graph's file; with level 0 products are as exact as floats are."""
    write_onnx(checkpoint, [plan], out, GraphOptions(accuracy_level=accuracy_level), threads=2)
    return out / "onnx" / plan.precision.file_name


def dequantized(values: Array, encoding: Encoding) -> Array:
    """``values`` quantized and dequantized by ONNX Runtime's quantizer or by gguf-py."""
    if encoding.is_float:
        return values.astype(np.float16 if encoding.name == "f16" else np.float32)
    if encoding not in NBITS:
        kind = _GGUF_TYPES[encoding.name]
        return gguf.dequantize(gguf.quantize(values, kind), kind)
    codes, scales, zeros = parts_by_onnxruntime(values, encoding)
    bits = NBITS[encoding].bits
    count = codes.shape[1]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, :count]
    middle = np.full_like(zeros, 1 << (bits - 1))
    used = zeros if NBITS[encoding].asymmetric else middle
    whole = codes.astype(np.float32) - used.astype(np.float32)[:, :, None]
    return (whole * scales.astype(np.float32)[:, :, None]).reshape(values.shape)


def torch_on(model: Any, weights: dict[str, Array]) -> Any:
    """``model`` with other weights."""
    state = model.state_dict()
    for name, values in weights.items():
        state[name].copy_(torch.from_numpy(np.array(values, np.float32)))
    return model


def values_of(checkpoint: Checkpoint) -> dict[str, Array]:
    return {n: t.read_f32(0, t.rows).reshape(t.shape) for n, t in checkpoint.tensors.items()}


@KINDS
@SIZES
@pytest.mark.parametrize(
    ("precision", "tied"), [*((name, False) for name in BLOCKS), ("int4", True)]
)
def test_the_graph_computes_with_the_quantizers_own_values(
    tmp_path: Path, precision: str, tied: bool, block_size: Any, asymmetric: bool
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FEW, tied=tied)
    plan = plan_onnx(checkpoint, precision, WeightOptions(block_size, asymmetric))
    tokens = some_tokens(2 * CONTEXT)
    found = Decoder(write(checkpoint, plan, tmp_path / "o")).feed(tokens[None])[0]
    model = reference(tmp_path / "m", PI.scale)
    source = expected(model, tokens)
    weights = {n: dequantized(v, plan.encodings[n]) for n, v in values_of(checkpoint).items()}
    own = expected(torch_on(model, weights), tokens)
    half = PRECISIONS[precision].activations.name == "f16"
    assert kl(own, found) <= (KL_LIMIT_FP16 if half else KL_LIMIT)
    assert kl(source, found) > 10 * kl(own, found)  # it is quantized
    sizes = {e.block_elements for e in plan.encodings.values() if not e.is_float}
    assert sizes == {block_size}
    assert plan.fallbacks == ()


@pytest.mark.parametrize("ends", ["float", "int8", "int4"])
@pytest.mark.parametrize("precision", ["int8", "int4", "int4f16"])
@KINDS
def test_embedding_and_head_are_stored_as_asked(
    tmp_path: Path, precision: str, ends: Any, asymmetric: bool
) -> None:
    other = {"float": "int4", "int8": "float", "int4": "int8"}[ends]
    checkpoint = tiny(tmp_path / "m", shape=FEW)
    options = WeightOptions(asymmetric=asymmetric, embedding=ends, head=other)
    plan = plan_onnx(checkpoint, precision, options)
    for name, storage in ((EMBEDDING, ends), (HEAD, other)):
        encoding = plan.encodings[name]
        assert encoding.is_float == (storage == "float")
        assert encoding.is_float or ("4" in encoding.name) == (storage == "int4")
    tokens = some_tokens(CONTEXT)
    found = Decoder(write(checkpoint, plan, tmp_path / "o")).feed(tokens[None])[0]
    weights = {n: dequantized(v, plan.encodings[n]) for n, v in values_of(checkpoint).items()}
    own = expected(torch_on(reference(tmp_path / "m", PI.scale), weights), tokens)
    assert kl(own, found) <= (KL_LIMIT_FP16 if precision == "int4f16" else KL_LIMIT)


def test_a_tied_head_is_the_embedding_whichever_is_named(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=EVEN, tied=True)
    by_either = [
        plan_onnx(checkpoint, "int4", options)
        for options in (WeightOptions(embedding="int4"), WeightOptions(head="int4"))
    ]
    assert by_either[0].encodings == by_either[1].encodings
    assert by_either[0].encodings[EMBEDDING].name == "q4_0"
    assert plan_onnx(checkpoint, "int4").encodings[EMBEDDING].name == "q8_0"
    with pytest.raises(UnsupportedError, match="the head is the embedding"):
        plan_onnx(checkpoint, "int4", WeightOptions(embedding="int4", head="float"))
    assert plan_onnx(checkpoint, "fp32", WeightOptions(head="int4")).encodings[EMBEDDING].is_float


@pytest.mark.parametrize("precision", ["int8", "int4f16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_a_ggufs_blocks_are_not_quantized_again(
    tmp_path: Path, kind: str, tied: bool, precision: str
) -> None:
    """Whatever the precision asked: gguf-py's values of the same blocks are what is computed with.

    Every matrix, the embedding too; the file's queries and keys are permuted, and put back.
    """
    folder = write_tiny(tmp_path / "m", shape=FEW, tied=tied, rope={"rope_theta": 1000.0})
    file = write_tiny_gguf(tmp_path / "m.gguf", folder, quantization=_GGUF_TYPES[kind])
    checkpoint = open_checkpoint(str(file)).interpolate(PI.scale)
    plan = plan_onnx(checkpoint, precision)
    matrices = {plan.encodings[n].name for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
    assert matrices == {kind}
    source = values_of(open_checkpoint(str(folder)))
    exact = {n: dequantized(v, plan.encodings[n]) for n, v in source.items()}
    tokens = some_tokens(2 * CONTEXT)
    own = expected(torch_on(reference(folder, PI.scale), exact), tokens)
    path = write(checkpoint, plan, tmp_path / "o")
    found = Decoder(path).feed(tokens[None])[0]
    assert kl(own, found) <= (KL_LIMIT_FP16 if precision == "int4f16" else KL_LIMIT)
    for name, values in exact.items():
        if len(values.shape) == 2:
            stored = stored_values(path, name)
            if kind == "q4_1":  # (q - 8) d + (m + 8 d) rounds once more than q d + m
                np.testing.assert_allclose(stored, values, rtol=0, atol=3e-7 * np.abs(values).max())
            else:
                np.testing.assert_array_equal(stored, values)


def stored_values(path: Path, weight: str) -> Array:
    """A symmetric weight's values, by onnx alone and the operator's definition."""
    parts = {
        tensor.name.removeprefix(weight): onnx.numpy_helper.to_array(tensor, str(path.parent))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.name.startswith(weight)
    }
    scales = parts["_scales"].astype(np.float32)
    codes = parts.get("_codes", parts.get("_codes_flat")).reshape(*scales.shape, -1)
    if codes.shape[-1] == 16:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, -1)
        whole = codes.astype(np.float32) - 8
    else:
        whole = codes.astype(np.float32) - 128
    values = whole * scales[:, :, None] + parts.get("_offsets", np.float32(0) * scales)[:, :, None]
    return values.reshape(len(scales), -1)


def quantized(checkpoint: Checkpoint, **kinds: str) -> Checkpoint:
    """The same with matrices of ggml's types: ``ends`` for embedding and head, or ``rest``."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            encoding = ENCODINGS[kinds["ends" if name in (EMBEDDING, HEAD) else "rest"]]
            raw = load_ggml().quantize(encoding, tensor.read_f32(0, tensor.rows))
            tensors[name] = dataclasses.replace(
                tensor, encoding=encoding, read_raw=lambda a, b, raw=raw: raw[a:b]
            )
    return dataclasses.replace(checkpoint, tensors=tensors)


def stored_types(plan: OnnxPlan) -> Counter[str]:
    return Counter(e.name for e in plan.encodings.values() if not e.is_float)


def test_quantized_weights_are_quantized_again_only_where_that_loses_little_or_is_allowed(
    tmp_path: Path,
) -> None:
    checkpoint = quantized(tiny(tmp_path / "m", shape=EVEN), rest="q4_k", ends="q6_k")
    assert stored_types(plan_onnx(checkpoint, "int8")) == {"q8_0": 16}
    assert stored_types(plan_onnx(checkpoint, "fp32")) == {}
    with pytest.raises(UnsupportedError, match=r"is quantized already \(q4_k\)") as error:
        plan_onnx(checkpoint, "int4")
    assert "--allow-requantize" in error.value.hint
    allowed = plan_onnx(checkpoint, "int4", WeightOptions(requantize=True))
    assert stored_types(allowed) == {"q4_0": 14, "q8_0": 2}


def test_the_usual_q4_0_file_needs_no_permission(tmp_path: Path) -> None:
    """llama.cpp gives it a head of q6_k: that one goes into 8 bits."""
    checkpoint = quantized(tiny(tmp_path / "m", shape=EVEN), rest="q4_0", ends="q6_k")
    for precision in ("int4", "int8"):
        assert stored_types(plan_onnx(checkpoint, precision)) == {"q4_0": 14, "q8_0": 2}


def test_blocks_of_the_source_are_kept_unless_quantizing_again_is_allowed(tmp_path: Path) -> None:
    checkpoint = quantized(tiny(tmp_path / "m", shape=EVEN), rest="q4_1", ends="q8_0")
    options = WeightOptions(block_size=128, asymmetric=True)
    assert stored_types(plan_onnx(checkpoint, "int4", options)) == {"q4_1": 14, "q8_0": 2}
    again = plan_onnx(checkpoint, "int4", dataclasses.replace(options, requantize=True))
    assert stored_types(again) == {"int4_b128_asym": 14, "int8_b128_asym": 2}


def test_rows_that_fit_no_block_are_listed(tmp_path: Path) -> None:
    """96 is no multiple of 128; 144 and 24 * 6 are none of 32."""
    plan = plan_onnx(tiny(tmp_path / "a", shape=SHAPE), "int4", WeightOptions(128, asymmetric=True))
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert plan.encodings[up].name == plan.encodings[down].name == "int4_b32_asym"  # 96 and 160
    assert f"{up}: int4_b128_asym -> int4_b32_asym" in plan.fallbacks
    odd = plan_onnx(tiny(tmp_path / "b", shape=ODD), "int4")
    assert odd.encodings[up].name == "f32"
    assert f"{up}: q4_0 -> f32" in odd.fallbacks
    assert odd.encodings[down].name == "q4_0"  # 160 fits
    assert len(odd.fallbacks) == 14


@pytest.mark.parametrize("level", range(5))
def test_the_accuracy_level_stands_at_every_product(tmp_path: Path, level: int) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FEW)
    path = write(checkpoint, plan_onnx(checkpoint, "int4"), tmp_path / "o", level)
    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node
             if n.op_type == "MatMulNBits"]  # fmt: skip
    attributes = [{a.name: a.i for a in node.attribute} for node in nodes]
    assert len(attributes) == 8
    assert {a["accuracy_level"] for a in attributes} == {level}


@pytest.mark.parametrize("precision", BLOCKS)
def test_accuracy_level_4_costs_what_is_said(tmp_path: Path, precision: str) -> None:
    """Rounding activations moves a product by 0.5 %: between nothing and what a fault moves."""
    checkpoint = tiny(tmp_path / "m", shape=FEW)
    plan, tokens = plan_onnx(checkpoint, precision), some_tokens(CONTEXT)
    exact, rounded = (
        Decoder(write(checkpoint, plan, tmp_path / str(level), level)).feed(tokens[None])[0]
        for level in (0, 4)
    )
    assert 10 * KL_LIMIT < kl(exact, rounded) < KL_WRONG


def damaged(folder: Path, value: float, **options: Any) -> Checkpoint:
    write_tiny(folder, shape=EVEN, **options)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, folder / "model.safetensors")
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4", "int8f16"])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, precision: str, value: float
) -> None:
    checkpoint = damaged(tmp_path / "m", value)
    plan = plan_onnx(checkpoint, precision, WeightOptions(block_size=128))
    with pytest.raises(TensorError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        write_onnx(checkpoint, [plan], tmp_path / "a" / "o")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("options", [WeightOptions(), WeightOptions(128), WeightOptions(32, True)])
@pytest.mark.parametrize("precision", ["fp16", "int8f16", "int4f16"])
def test_a_weight_that_float16_cannot_hold_is_an_error(
    tmp_path: Path, precision: str, options: WeightOptions
) -> None:
    """A block of ggml's holds the value as 127 or 8 times its scale: larger by that."""
    own = PRECISIONS[precision].has_blocks and options == WeightOptions()
    checkpoint = damaged(tmp_path / "m", 1e7 if own else 70000.0)
    plan = plan_onnx(checkpoint, precision, options)
    with pytest.raises(TensorError, match=r"up_proj\.weight holds (1e\+07|70000), which .* hold"):
        write_onnx(checkpoint, [plan], tmp_path / "o")
    assert not (tmp_path / "o").exists()
    fits = plan_onnx(checkpoint, "fp32")
    write_onnx(checkpoint, [fits], tmp_path / "o")  # negative control
