"""llama3 in a GGUF: our record beside ``rope_freqs.weight``, held against transformers' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters.checkpoint import Checkpoint
from converters.errors import RopeError, UnsupportedError
from converters.rope import Llama3Scaling, RopeParameters
from converters.rope.gguf import DIVISORS_TENSOR, LLAMA3_RECORD, read_gguf, write_gguf
from converters.rope.gguf import write_llama3_record as write_record
from converters.rope.parameters import ulp_distance
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf
from converters.targets.gguf import write_gguf as write_file
from tests.pi_convert.verify.gguf_tools import edit
from tests.tiny import ODD4, write_tiny

ODD_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 5.3,
    "low_freq_factor": 1.7,
    "high_freq_factor": 3.1,
    "original_max_position_embeddings": 96,
}
SCALING = Llama3Scaling(5.3, 1.7, 3.1, 96)
ROPE = RopeParameters(10000.0, 64, 2048, 2048, llama3=SCALING)
ULP = 2


def exported(folder: Path, scale: float) -> tuple[Checkpoint, Path]:
    """What was exported, and the file."""
    write_tiny(folder / "m", shape=ODD4, rope={"rope_scaling": ODD_LLAMA3})
    checkpoint = open_checkpoint(str(folder / "m")).interpolate(scale)
    (artifact,) = write_file(checkpoint, plan_gguf(checkpoint, ["f16"]), folder / "out")
    return checkpoint, artifact.path


def transformers_inv_freq(rope: RopeParameters) -> np.ndarray:
    config = LlamaConfig(
        hidden_size=2 * rope.rotary_dim, num_attention_heads=2, head_dim=rope.rotary_dim,
        max_position_embeddings=rope.original_context,
        rope_parameters={**ODD_LLAMA3, "rope_theta": rope.theta},
    )  # fmt: skip
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    frequencies: np.ndarray = inv_freq.numpy()
    return frequencies


@pytest.mark.parametrize("scale", [1.0, 2.2])
def test_odd_settings_come_back_from_a_file(tmp_path: Path, scale: float) -> None:
    checkpoint, path = exported(tmp_path, scale)
    again = open_checkpoint(str(path)).rope
    assert (again.kind, again.factor, again.llama3) == (checkpoint.rope.kind, scale, SCALING)
    assert (again.theta, again.rotary_dim) == (checkpoint.rope.theta, checkpoint.rope.rotary_dim)
    assert again.original_context == checkpoint.rope.original_context
    assert again.context == checkpoint.rope.context
    assert again.inv_freq().tobytes() == checkpoint.rope.inv_freq().tobytes()
    expected = transformers_inv_freq(again)
    assert ulp_distance(expected / np.float32(scale), again.inv_freq()) <= ULP
    unstretched = RopeParameters(again.theta, again.rotary_dim, 1, 1, factor=scale)
    assert ulp_distance(expected / np.float32(scale), unstretched.inv_freq()) > 100


def test_a_file_that_was_opened_again_is_exported_alike(tmp_path: Path) -> None:
    _, path = exported(tmp_path, 2.2)
    checkpoint = open_checkpoint(str(path))
    (artifact,) = write_file(checkpoint, plan_gguf(checkpoint, ["f16"]), tmp_path / "again")
    assert open_checkpoint(str(artifact.path)).rope == checkpoint.rope


def _bend(file: Any) -> None:
    tensor = file.tensors[DIVISORS_TENSOR]
    values = tensor.values()
    values[-1] *= np.float32(1.001)
    file.tensors[DIVISORS_TENSOR] = tensor.with_values(values)


def _other_factor(file: Any) -> None:
    file.set_key(f"{LLAMA3_RECORD}.factor", 5.4)


def _drop_tensor(file: Any) -> None:
    del file.tensors[DIVISORS_TENSOR]


def _drop_one_key(file: Any) -> None:
    del file.keys[f"{LLAMA3_RECORD}.high_freq_factor"]


CONTRADICTIONS = {
    "other tensor": (_bend, r"holds other frequency factors than pi_convert\.rope\.llama3"),
    "other factor": (_other_factor, r"holds other frequency factors than pi_convert\.rope\.llama3"),
    "no tensor": (_drop_tensor, r"is recorded, and rope_freqs\.weight is missing"),
    "a key missing": (_drop_one_key, r"pi_convert\.rope\.llama3\.high_freq_factor is missing"),
}


@pytest.mark.parametrize(("change", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_record_that_contradicts_the_file_is_an_error(
    tmp_path: Path, change: Any, says: str
) -> None:
    _, path = exported(tmp_path, 2.2)
    with pytest.raises(RopeError, match=says):
        open_checkpoint(str(edit(path, tmp_path / "edited.gguf", change)))


def read(rope: RopeParameters, file_keys: dict[str, Any], ulp: int = 0) -> RopeParameters:
    divisors = rope.frequency_divisors()
    assert divisors is not None
    moved = (divisors.view(np.int32) + np.int32(ulp)).view(np.float32)
    return read_gguf(
        write_gguf(rope), moved, rotary_dim=rope.rotary_dim, original_context=None,
        where="x.gguf", file_keys=file_keys,
    )  # fmt: skip


def test_without_a_record_only_published_settings_are_told() -> None:
    published = RopeParameters(10000.0, 64, 8192, 8192, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert read(published, {}).llama3 == published.llama3
    with pytest.raises(UnsupportedError, match=r"the file records no other \(pi_convert\.rope"):
        read(ROPE, {})


@pytest.mark.parametrize(("ulp", "right"), [(0, True), (8, True), (9, False)])
def test_the_record_holds_within_the_bound_of_other_tools_files(ulp: int, right: bool) -> None:
    if right:
        assert read(ROPE, write_record(ROPE), ulp).llama3 == SCALING
        return
    with pytest.raises(RopeError, match="holds other frequency factors"):
        read(ROPE, write_record(ROPE), ulp)


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", "5"), ("factor", 0.5), ("low_freq_factor", 9.0), ("factor", float("nan")),
     ("original_max_position_embeddings", 0), ("original_max_position_embeddings", 9.5)],
)  # fmt: skip
def test_a_record_out_of_range_names_its_key(name: str, value: object) -> None:
    with pytest.raises(RopeError, match=name):
        read(ROPE, {**write_record(ROPE), f"{LLAMA3_RECORD}.{name}": value})
