"""Tensor types and bytes are those of ``llama_model_quantize`` on our own float32 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from converters.containers.gguf import read_gguf_file
from converters.encodings import Encoding
from converters.errors import UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, quantization_types, write_gguf
from converters.targets.gguf.types import FILE_TYPES
from tests.tiny import APART, ODD, ODD4, WIDE3, Shape, write_tiny

# All widths are multiples of 256; 16 layers, so that every "first layers" and "every third layer"
# rule of the mixtures applies.
WIDE4 = Shape(hidden=256, intermediate=256, layers=16, heads=4, kv_heads=1, head_dim=64)
APART3 = Shape(hidden=256, intermediate=256, layers=16, heads=6, kv_heads=2, head_dim=128)

SLOW = {"iq3_s", "iq3_m", "iq4_nl", "iq4_xs"}  # 3 to 6 million elements a second

# The type that a mixture is named after, where its name is not the type's own.
NAMESAKE = {
    **{f"q{n}_k_{size}": f"q{n}_k" for n in (3, 4, 5) for size in "sml"},
    "iq3_m": "iq3_s",
    "mxfp4_moe": "q8_0",  # for models without experts
}
WITHOUT_IMATRIX = {
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m",
    "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m", "iq4_nl",
    "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe", "q1_0", "q2_0",
}  # fmt: skip
WITH_IMATRIX = {
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    architecture: str
    shape: Shape
    tied: bool
    dtype: str = "f32"

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        gqa = self.shape.heads // self.shape.kv_heads
        return f"{self.architecture}-{self.shape.hidden}-gqa{gqa}-{tied}-{self.dtype}"


EVERY_TYPE = [
    Model("llama", WIDE4, tied=False),
    Model("qwen2", WIDE4, tied=True),
    Model("llama", ODD, tied=True),
    Model("qwen2", ODD, tied=False),
    Model("llama", APART, tied=False, dtype="bf16"),
    Model("qwen2", ODD4, tied=True, dtype="f16"),
]
FAST_TYPES = [
    Model("llama", APART3, tied=True, dtype="bf16"),
]
# llama.cpp takes no other head size for qwen2 than hidden / heads, which makes three of them large.
QWEN2_THREE = Model("qwen2", WIDE3, tied=False, dtype="f16")


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    """Kept referenced by the module: llama.cpp keeps its address."""


def quantize_with_llama_cpp(source: Path, out: Path, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    llama_cpp.llama_log_set(_silent, None)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0


def tensors_of(path: Path) -> dict[str, tuple[Encoding, np.ndarray]]:
    """Read with our own reader: gguf-py 0.19 does not know q2_0."""
    file = read_gguf_file(path)
    tensors = {name: file.tensor(name) for name in file.tensors}
    return {name: (t.encoding, t.read_rows(0, t.rows)) for name, t in tensors.items()}


def require_identity(model: Model, types: Sequence[str], folder: Path) -> dict[str, dict[str, int]]:
    """Exports all types in one run and compares each with llama.cpp's; counts of types by name."""
    source = write_tiny(
        folder / "source", architecture=model.architecture, shape=model.shape, tied=model.tied,
        dtype=model.dtype,
    )  # fmt: skip
    checkpoint = open_checkpoint(str(source)).interpolate(4.0)
    plans = plan_gguf(checkpoint, ["f32", *types])
    float32, *artifacts = write_gguf(checkpoint, plans, folder / "ours")
    for artifact in artifacts:
        theirs_path = folder / "theirs.gguf"
        quantize_with_llama_cpp(float32.path, theirs_path, FILE_TYPES[artifact.quantize])
        ours, theirs = tensors_of(artifact.path), tensors_of(theirs_path)
        assert ours.keys() == theirs.keys()
        for name, (encoding, raw) in theirs.items():
            assert ours[name][0] is encoding, (artifact.quantize, name)
            assert np.array_equal(ours[name][1], raw), (artifact.quantize, name)
        artifact.path.unlink()
    return {artifact.quantize: dict(artifact.tensor_types) for artifact in artifacts}


@pytest.mark.parametrize("model", EVERY_TYPE, ids=str)
def test_every_type_equals_llama_cpps(model: Model, tmp_path: Path) -> None:
    wanted = sorted(WITHOUT_IMATRIX - {"f32"})
    checkpoint_types = available(model, tmp_path)
    counts = require_identity(
        model, [name for name in wanted if name in checkpoint_types], tmp_path
    )
    if model.shape.hidden % 256 == 0:
        assert counts.keys() == set(wanted)
        missing = [n for n in counts if NAMESAKE.get(n, n) not in counts[n]]
        assert missing == [], "a type that does not occur has not been tested"


@pytest.mark.parametrize("model", FAST_TYPES, ids=str)
def test_fast_types_equal_llama_cpps_with_three_query_heads_a_kv_head(
    model: Model, tmp_path: Path
) -> None:
    require_identity(model, sorted(WITHOUT_IMATRIX - SLOW - {"f32"}), tmp_path)


def test_mixtures_equal_llama_cpps_for_qwen2_with_three_query_heads(tmp_path: Path) -> None:
    require_identity(QWEN2_THREE, ["q4_k_m", "q5_k_m", "q8_0"], tmp_path)


def available(model: Model, folder: Path) -> set[str]:
    source = write_tiny(
        folder / "probe", architecture=model.architecture, shape=model.shape, tied=model.tied
    )
    options = quantization_types(open_checkpoint(str(source)))
    return {option.name for option in options if not option.needs_importance_matrix}


def test_types_that_need_an_importance_matrix_are_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny(tmp_path / "m", shape=WIDE4)))
    options = {option.name: option for option in quantization_types(checkpoint)}
    needing = {name for name, option in options.items() if option.needs_importance_matrix}
    assert needing == WITH_IMATRIX
    assert options.keys() - needing == WITHOUT_IMATRIX
    for name in sorted(needing):
        with pytest.raises(UnsupportedError, match="importance matrix"):
            plan_gguf(checkpoint, ["f16", name])


def test_a_difference_of_one_bit_would_be_seen(tmp_path: Path) -> None:
    """The control: the comparison fails where a single weight is another."""
    import torch
    from safetensors.torch import load_file, save_file

    source = write_tiny(tmp_path / "source", shape=ODD)
    checkpoint = open_checkpoint(str(source))
    (whole,) = write_gguf(checkpoint, plan_gguf(checkpoint, ["f32"]), tmp_path)
    weights = load_file(source / "model.safetensors")
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down[3, 5] = torch.nextafter(down[3, 5], torch.tensor(9.0))
    save_file(weights, source / "model.safetensors")
    changed = open_checkpoint(str(source))
    (other,) = write_gguf(changed, plan_gguf(changed, ["f32"]), tmp_path / "other")
    ours, theirs = tensors_of(whole.path), tensors_of(other.path)
    different = [n for n in ours if not np.array_equal(ours[n][1], theirs[n][1])]
    assert different == ["blk.1.ffn_down.weight"]
