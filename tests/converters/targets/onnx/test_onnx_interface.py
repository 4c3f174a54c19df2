"""What a client sees of a written file: names, shapes, layout, and what it records."""

from __future__ import annotations

import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import load_external_data_for_tensor

from converters.checkpoint import Checkpoint
from converters.content_hash import content_hash, tensor_hash
from converters.ggml import load_ggml
from converters.nbits import fingerprint
from converters.targets.onnx import PRECISIONS, GraphOptions, WeightOptions, plan_onnx, write_onnx
from converters.targets.onnx.plan import ALIGNMENT
from tests.converters.targets.onnx.decoders import (
    CONTEXT,
    FUSED,
    KL_LIMIT,
    PI,
    SHAPE,
    expected,
    export,
    kl,
    padded,
    reference,
    some_tokens,
    tiny,
)
from tests.tiny import Shape

FORMS = pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
EVERY = pytest.mark.parametrize("precision", PRECISIONS)


def graph_of(path: Path) -> Any:
    return onnx.load(path, load_external_data=False).graph


def interface(values: Any) -> dict[str, list[int | str]]:
    """Name -> dimensions, symbolic ones by name."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


@pytest.mark.parametrize(
    ("precision", "portable"),
    [(name, False) for name in PRECISIONS] + [("fp32", True), ("fp16", True)],
)
def test_inputs_and_outputs(tmp_path: Path, precision: str, portable: bool) -> None:
    graph = graph_of(export(tiny(tmp_path / "m"), tmp_path / "o", precision, portable=portable))
    cache = ["batch_size", SHAPE.kv_heads, "past_sequence_length", SHAPE.head_dim]
    total = ["batch_size", SHAPE.kv_heads, "total_sequence_length", SHAPE.head_dim]
    pairs = [(layer, kind) for layer in range(SHAPE.layers) for kind in ("key", "value")]
    assert interface(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{layer}.{kind}": cache for layer, kind in pairs},
    }
    assert interface(graph.output) == {
        "logits": ["batch_size", "sequence_length", 512],
        **{f"present.{layer}.{kind}": total for layer, kind in pairs},
    }
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    half = "f16" in precision or precision == "fp16"
    float_type = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    assert kinds.pop("input_ids") == kinds.pop("attention_mask") == onnx.TensorProto.INT64
    assert set(kinds.values()) == {float_type}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_last_logits_have_one_column(tmp_path: Path) -> None:
    graph = graph_of(export(tiny(tmp_path / "m"), tmp_path / "o", last_logits=True))
    assert interface(graph.output)["logits"] == ["batch_size", 1, 512]


@FORMS
def test_nodes_are_named_after_their_place(tmp_path: Path, portable: bool) -> None:
    graph = graph_of(export(tiny(tmp_path / "m"), tmp_path / "o", portable=portable))
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    projections = {"attn": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"]}
    for layer in range(SHAPE.layers):
        for part, kinds in projections.items():
            for kind in kinds:
                assert f"/model/layers.{layer}/{part}/{kind}_proj/MatMul" in names
        attention = "Attention" if portable else "GroupQueryAttention"
        assert f"/model/layers.{layer}/attn/{attention}" in names
    assert {"/model/embed_tokens/Gather", "/lm_head/MatMul"} <= set(names)
    domains = {node.domain for node in graph.node}
    assert domains == ({""} if portable else {"", "com.microsoft"})


@EVERY
def test_a_tied_weight_stands_in_the_file_once(tmp_path: Path, precision: str) -> None:
    """The embedding's initializers may be named twice; their bytes are not there twice."""
    sizes = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        path = export(tiny(folder / "m", shape=FUSED, tied=tied), folder / "o", precision)
        places = {
            (int(entries["offset"]), int(entries["length"]))
            for tensor in graph_of(path).initializer
            if (entries := {e.key: e.value for e in tensor.external_data})
        }
        sizes[tied] = path.with_suffix(".onnx_data").stat().st_size
        ends = sorted(places)
        assert all(a[0] + a[1] <= b[0] for a, b in pairwise(ends)), "overlap"
    assert sizes[True] < sizes[False]


@EVERY
def test_every_initializer_is_aligned_and_inside_the_data_file(
    tmp_path: Path, precision: str
) -> None:
    path = export(tiny(tmp_path / "m", shape=FUSED), tmp_path / "o", precision)
    data = path.with_suffix(".onnx_data")
    outside = [t for t in graph_of(path).initializer if t.external_data]
    assert outside
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == data.name
        assert int(entries["offset"]) % ALIGNMENT == 0
        assert int(entries["offset"]) + int(entries["length"]) <= data.stat().st_size
        load_external_data_for_tensor(tensor, str(path.parent))
        assert onnx.numpy_helper.to_array(tensor).nbytes == int(entries["length"])
    assert path.stat().st_size < 100_000  # the graph itself holds no weights


@FORMS
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_infers_every_shape(tmp_path: Path, precision: str, portable: bool) -> None:
    path = export(tiny(tmp_path / "m"), tmp_path / "o", precision, portable=portable)
    onnx.checker.check_model(str(path), full_check=portable)  # it knows standard operators alone


def recorded(path: Path) -> dict[str, str]:
    model = onnx.load(path, load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def test_what_a_file_records_of_itself(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "Tiny-1M")
    hashes = {name: tensor_hash(tensor) for name, tensor in checkpoint.tensors.items()}
    weights = WeightOptions(block_size=128, asymmetric=True, head="int4", requantize=True)
    graph = GraphOptions(accuracy_level=0, last_logits=True)
    plans = [plan_onnx(checkpoint, name, weights) for name in ("fp32", "int4")]
    write_onnx(checkpoint, plans, tmp_path / "o", graph)
    for plan in plans:
        path = tmp_path / "o" / "onnx" / plan.precision.file_name
        found = recorded(path)
        assert found["pi_convert.architecture"] == "llama"
        assert found["pi_convert.precision"] == plan.precision.name
        assert found["pi_convert.source.name"] == "Tiny-1M"
        assert found["pi_convert.source.sha256"] == content_hash(checkpoint.tensors, hashes)
        assert found["pi_convert.quantizer"] == load_ggml().fingerprint()
        assert found["pi_convert.version"] == version("pi-convert")
        rope = json.loads(found["pi_convert.rope"])
        assert rope == {
            "kind": "linear", "theta": 1000.0, "factor": 4.0,
            "original_context": CONTEXT, "context": 4 * CONTEXT,
        }  # fmt: skip
        assert json.loads(found["pi_convert.graph"]) == {
            "accuracy_level": 0, "last_logits": True, "portable": False,
        }  # fmt: skip
        if plan.precision.has_blocks:
            assert json.loads(found["pi_convert.weights"]) == {
                "block_size": 128, "asymmetric": True, "embedding": None, "head": "int4",
                "requantize": True,
            }  # fmt: skip
            assert found["pi_convert.quantizer.nbits"] == fingerprint()
        else:
            assert not {"pi_convert.weights", "pi_convert.quantizer.nbits"} & found.keys()
        for written in (path, path.with_suffix(".onnx_data")):
            assert str(tmp_path).encode() not in written.read_bytes()


class SharedCache:
    """A session whose past and present keys and values are one buffer of ``capacity`` tokens."""

    def __init__(self, path: Path, batch: int, capacity: int) -> None:
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._buffers = {}
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values"):
                shape = (batch, value.shape[1], capacity, value.shape[3])
                # What was never written must not matter.
                full = np.full(shape, 1e3, np.float32)
                name = value.name.removeprefix("past_key_values.")
                self._buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(full)

    def feed(self, ids: Any, mask: Any) -> Any:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids.astype(np.int64))
        binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        binding.bind_output("logits", "cpu")
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


@pytest.mark.parametrize("shape", [SHAPE, FUSED], ids=["rotated-apart", "rotated-inside"])
def test_past_and_present_may_share_a_buffer(tmp_path: Path, shape: Shape) -> None:
    path = export(tiny(tmp_path / "m", shape=shape), tmp_path / "o")
    tokens = some_tokens(3 * CONTEXT)
    right = expected(reference(tmp_path / "m", PI.scale), tokens)
    cache, found = SharedCache(path, 1, 4 * CONTEXT), []
    for start, stop in ((0, 90), (90, 91), (91, 150), (150, 151), (151, 192)):
        found.append(cache.feed(tokens[None, start:stop], np.ones((1, stop)))[0])
    assert kl(right, np.concatenate(found)) <= KL_LIMIT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_may_share_a_buffer(tmp_path: Path, side: str) -> None:
    path = export(tiny(tmp_path / "m", shape=FUSED), tmp_path / "o")
    model = reference(tmp_path / "m", PI.scale)
    lengths = (CONTEXT + 20, 11)
    rows = [some_tokens(length + 4, seed) for seed, length in enumerate(lengths)]
    answers = [expected(model, row) for row in rows]
    batch = padded([row[:n] for row, n in zip(rows, lengths, strict=True)], side)
    cache, mask = SharedCache(path, 2, 4 * CONTEXT), batch.mask
    found = cache.feed(batch.ids, mask)
    for row, columns in enumerate(batch.columns):
        assert kl(answers[row][: lengths[row]], found[row, columns]) <= KL_LIMIT
    for step in range(4):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        ids = np.array([[row[n + step]] for row, n in zip(rows, lengths, strict=True)])
        found = cache.feed(ids, mask)
        for row, answer in enumerate(answers):
            assert kl(answer[lengths[row] + step], found[row, 0]) <= KL_LIMIT


def test_files_of_a_folder_have_the_names_that_clients_look_for(tmp_path: Path) -> None:
    checkpoint: Checkpoint = tiny(tmp_path / "m", shape=FUSED)
    write_onnx(checkpoint, [plan_onnx(checkpoint, name) for name in PRECISIONS], tmp_path / "o")
    stems = ("model", "model_fp16", "model_quantized", "model_q4", "model_q8f16", "model_q4f16")
    names = {path.name for path in (tmp_path / "o" / "onnx").iterdir()}
    assert names == {f"{stem}{end}" for stem in stems for end in (".onnx", ".onnx_data")}
