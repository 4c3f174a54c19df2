"""Graphs of float16: right where float16's range ends; past it right or NaN, never a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import Checkpoint
from converters.sources import open_checkpoint
from converters.targets.onnx import GraphOptions, plan_onnx, preflight
from tests.converters.targets.onnx.decoders import (
    CONTEXT,
    KL_LIMIT_FP16,
    KL_WRONG,
    PI,
    Decoder,
    expected,
    export,
    kl,
    reference,
    some_tokens,
)
from tests.tiny import Shape, write_tiny

FORMS = pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
SHAPE = Shape(96, 160, 2, heads=6, kv_heads=2, head_dim=32, context=CONTEXT)
LARGEST = float(np.finfo(np.float16).max)  # 65,504
Weights = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Weights], None]) -> Checkpoint:
    write_tiny(folder, shape=SHAPE, rope={"rope_theta": 1000.0})
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(folder)).interpolate(PI.scale)


def scaled(factors: Mapping[str, float]) -> Callable[[Weights], None]:
    """Every weight whose name ends in one of ``factors``, times that."""

    def change(weights: Weights) -> None:
        for name, tensor in weights.items():
            for end, factor in factors.items():
                if name.endswith(f"{end}.weight"):
                    weights[name] = tensor * factor

    return change


def largest(model: Any, tokens: Any, part: str, *, entering: bool = False) -> float:
    """The largest magnitude that comes out of the modules named ``part``, or goes into them."""
    found = [0.0]

    def hook(_: Any, inputs: Any, output: Any) -> None:
        values = inputs[0] if entering else output
        values = values[0] if isinstance(values, tuple) else values
        found.append(float(values.abs().max()))

    handles = [m.register_forward_hook(hook) for n, m in model.named_modules() if n.endswith(part)]
    expected(model, tokens)
    for handle in handles:
        handle.remove()
    return max(found)


@FORMS
def test_the_sum_through_the_layers_may_pass_float16s_range(tmp_path: Path, portable: bool) -> None:
    """Every addend is within it; the sum, whose square is further out still, is not.

    Norms make a model indifferent to the scale of that sum, so the logits are those of any scale.
    """
    scale = 20_000.0
    checkpoint = changed(
        tmp_path / "m", scaled({"embed_tokens": scale, "o_proj": scale, "down_proj": scale})
    )
    model = reference(tmp_path / "m", PI.scale)
    tokens = some_tokens(2 * CONTEXT)
    assert largest(model, tokens, "layers.1") > LARGEST  # the sum, which a float16 cannot hold
    for part in ("embed_tokens", "o_proj", "down_proj"):
        assert largest(model, tokens, part) < LARGEST
    found = Decoder(export(checkpoint, tmp_path / "o", "fp16", portable=portable)).feed(
        tokens[None]
    )
    assert kl(expected(model, tokens), found[0]) <= KL_LIMIT_FP16


@FORMS
def test_scores_may_pass_float16s_range_before_they_are_scaled(
    tmp_path: Path, portable: bool
) -> None:
    checkpoint = changed(tmp_path / "m", scaled({"q_proj": 40.0, "k_proj": 40.0}))
    model = reference(tmp_path / "m", PI.scale)
    tokens = some_tokens(2 * CONTEXT)
    query, key = largest(model, tokens, "q_proj"), largest(model, tokens, "k_proj")
    assert query * key * SHAPE.head_dim > 4 * LARGEST
    right = expected(model, tokens)
    found = Decoder(export(checkpoint, tmp_path / "o", "fp16", portable=portable)).feed(
        tokens[None]
    )
    # Scores of thousands flip where float16 rounds them: near, and no position NaN.
    assert kl(right, found[0]) < KL_WRONG


@FORMS
@pytest.mark.parametrize("part", ["up_proj", "v_proj", "q_proj", "gate times up"])
def test_an_activation_past_the_range_is_right_or_nan(
    tmp_path: Path, part: str, portable: bool
) -> None:
    """ONNX Runtime's CPU provider multiplies float16 in float32, and attends in float16."""
    product = part == "gate times up"  # of two that are within the range
    factors = {"up_proj": 13_000.0} if product else {part: 30_000.0}
    checkpoint = changed(tmp_path / "m", scaled(factors))
    model = reference(tmp_path / "m", PI.scale)
    tokens = some_tokens(CONTEXT)
    if product:
        assert largest(model, tokens, "up_proj") < LARGEST
        assert largest(model, tokens, "down_proj", entering=True) > LARGEST
    else:
        assert largest(model, tokens, part) > LARGEST
    assert max(float(w.abs().max()) for w in model.state_dict().values()) < LARGEST
    right = expected(model, tokens)
    float32 = Decoder(export(checkpoint, tmp_path / "a", portable=portable)).feed(tokens[None])[0]
    assert kl(right, float32) < KL_WRONG  # negative control: the model itself is sound
    path = export(checkpoint, tmp_path / "b", "fp16", portable=portable)
    found = Decoder(path).feed(tokens[None])[0]
    lost = np.isnan(found).all(axis=-1)
    assert lost.any() == (part in ("q_proj", "v_proj"))
    assert not np.isnan(found[~lost]).any()
    near = [kl(right[[i]], found[[i]]) for i in np.flatnonzero(~lost)]
    assert max(near, default=0.0) < KL_WRONG


def test_the_notice_says_where_float16_ends(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path / "m", scaled({}))
    for precision, said in (("fp16", True), ("int4f16", True), ("fp32", False), ("int4", False)):
        notices = preflight(checkpoint, [plan_onnx(checkpoint, precision)], GraphOptions())
        assert any("65,504" in notice for notice in notices) == said


@FORMS
def test_norms_and_softmax_are_float32(tmp_path: Path, portable: bool) -> None:
    checkpoint = changed(tmp_path / "m", scaled({}))
    path = export(checkpoint, tmp_path / "o", "fp16", portable=portable)
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    norms = [name for name in kinds if name.endswith("norm.weight")]
    assert len(norms) == 2 * SHAPE.layers + 1
    for name, kind in kinds.items():
        if name.endswith("weight") or name in ("cos_cache", "sin_cache"):
            wide = name in norms
            assert kind == (onnx.TensorProto.FLOAT if wide else onnx.TensorProto.FLOAT16), name
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == (SHAPE.layers if portable else 0)
    for node in attentions:
        (softmax,) = [a.i for a in node.attribute if a.name == "softmax_precision"]
        assert softmax == onnx.TensorProto.FLOAT


def test_tables_are_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path / "m", scaled({}))
    tables = {}
    for precision in ("fp32", "fp16"):
        path = export(checkpoint, tmp_path / precision, precision)
        initializers = onnx.load(path, load_external_data=False).graph.initializer
        tables[precision] = {
            tensor.name: onnx.numpy_helper.to_array(tensor, str(path.parent))
            for tensor in initializers
            if tensor.name in ("cos_cache", "sin_cache")
        }
    for name, exact in tables["fp32"].items():
        np.testing.assert_array_equal(tables["fp16"][name], exact.astype(np.float16))
