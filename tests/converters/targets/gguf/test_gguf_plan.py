"""What the plan promises and refuses before any work is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from converters.checkpoint import Checkpoint
from converters.containers.gguf import read_gguf_file
from converters.containers.gguf_header import encode_key, lay_out
from converters.errors import TokenizerError, UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, quantization_types, write_gguf
from converters.targets.gguf.types import FILE_TYPES
from tests.tiny import APART, ODD, Shape, write_tiny

WIDE2 = Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=1, head_dim=64)


def opened(folder: Path, **tiny: Any) -> Checkpoint:
    return open_checkpoint(str(write_tiny(folder, **tiny)))


def quantized_source(folder: Path, kind: str, shape: Shape = WIDE2) -> Checkpoint:
    checkpoint = opened(folder / "Tiny-9M", shape=shape)
    (artifact,) = write_gguf(checkpoint, plan_gguf(checkpoint, [kind]), folder)
    return open_checkpoint(str(artifact.path))


def raw_tensors(path: Path) -> dict[str, np.ndarray]:
    file = read_gguf_file(path)
    return {name: file.tensor(name).read_rows(0, file.tensor(name).rows) for name in file.tensors}


def test_a_float_source_defaults_to_q4_k_m(tmp_path: Path) -> None:
    (plan,) = plan_gguf(opened(tmp_path / "Tiny-9M", shape=WIDE2).interpolate(2.5), [])
    assert (plan.quantize, plan.file_name) == ("q4_k_m", "Tiny-9M-PI2.5-Q4_K_M.gguf")
    assert plan.type_counts.keys() == {"f32", "q4_k", "q6_k"}
    assert plan.fallbacks == ()


def test_sizes_are_exact_and_rows_that_fit_no_block_are_listed(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    options = {option.name: option for option in quantization_types(checkpoint)}
    for plan in plan_gguf(checkpoint, ["q4_k_m", "q8_0", "f16"]):
        (artifact,) = write_gguf(checkpoint, [plan], tmp_path / "out")
        assert artifact.path.stat().st_size == plan.size_bytes == options[plan.quantize].size_bytes
        data_bytes = sum(t.n_bytes for t in gguf.GGUFReader(artifact.path).tensors)
        bits = 8 * data_bytes / checkpoint.parameters
        assert options[plan.quantize].bits_per_weight == pytest.approx(bits)
    (plan,) = plan_gguf(checkpoint, ["q4_k_m"])
    assert "blk.0.attn_k.weight: q4_k -> f16" in plan.fallbacks  # 144 is no multiple of 32
    assert "blk.1.ffn_down.weight: q6_k -> q8_0" in plan.fallbacks  # 160 is one


@pytest.mark.parametrize("kind", ["q4_1", "q8_0", "q4_k_m", "iq4_xs"])
def test_a_quantized_source_keeps_its_tensors(tmp_path: Path, kind: str) -> None:
    source = quantized_source(tmp_path, kind)
    plans = plan_gguf(source.interpolate(8), [])
    (artifact,) = write_gguf(source.interpolate(8), plans, tmp_path / "out")
    assert artifact.path.name == f"Tiny-9M-PI8-{kind.upper()}.gguf"
    before, after = raw_tensors(source.origin.path), raw_tensors(artifact.path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    fields = gguf.GGUFReader(artifact.path).fields
    assert fields["general.file_type"].contents() == FILE_TYPES[kind]


@pytest.mark.parametrize("stated", [None, 9999])
def test_a_quantized_source_without_a_known_file_type_is_named_by_its_tensors(
    tmp_path: Path, stated: int | None
) -> None:
    source = quantized_source(tmp_path, "q4_k_m")
    old = read_gguf_file(source.origin.path)
    keys = {k: encode_key(k, v) for k, v in old.keys.items() if k != "general.file_type"}
    if stated is not None:
        keys["general.file_type"] = encode_key("general.file_type", stated)
    layout = lay_out(keys, ((t.name, t.shape, t.encoding) for t in old.tensors.values()))
    data = source.origin.path.read_bytes()[old.data_offset :]
    (tmp_path / "other.gguf").write_bytes(layout.header + data)
    (plan,) = plan_gguf(open_checkpoint(str(tmp_path / "other.gguf")), [])
    assert plan.quantize == "q4_k"
    (artifact,) = write_gguf(source, [plan], tmp_path / "out")
    field = gguf.GGUFReader(artifact.path).fields.get("general.file_type")
    assert (field and field.contents()) == stated


def test_extending_an_extended_file_composes(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "Tiny-9M", shape=ODD).interpolate(8)
    (first,) = write_gguf(checkpoint, plan_gguf(checkpoint, ["q8_0"]), tmp_path)
    again = open_checkpoint(str(first.path)).interpolate(2)
    (second,) = write_gguf(again, plan_gguf(again, []), tmp_path)
    assert second.path.name == "Tiny-9M-PI16-Q8_0.gguf"
    fields = gguf.GGUFReader(second.path).fields
    assert fields["llama.rope.scaling.factor"].contents() == 16
    assert fields["llama.rope.scaling.original_context_length"].contents() == ODD.context


def test_quantizing_twice_must_be_asked_for(tmp_path: Path) -> None:
    source = quantized_source(tmp_path, "q8_0")
    with pytest.raises(UnsupportedError, match="quantized already") as refusal:
        plan_gguf(source, ["q4_0"])
    assert "--allow-requantize" in refusal.value.hint
    plans = plan_gguf(source, ["q4_k_m"], allow_requantize=True)
    (artifact,) = write_gguf(source, plans, tmp_path / "out")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = FILE_TYPES["q4_k_m"], True
    theirs = tmp_path / "theirs.gguf"
    llama_cpp.llama_log_set(silent, None)
    source_path = str(source.origin.path).encode()
    assert llama_cpp.llama_model_quantize(source_path, str(theirs).encode(), params) == 0
    expected, found = raw_tensors(theirs), raw_tensors(artifact.path)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, user_data: object) -> None:
    """Kept referenced by the module: llama.cpp keeps its address."""


def test_a_window_that_llama_cpp_would_ignore_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    hparams = dataclasses.replace(checkpoint.hparams, sliding_window=ODD.context * 2)
    windowed = dataclasses.replace(checkpoint, hparams=hparams)
    plan_gguf(windowed.interpolate(2), ["f16"])
    with pytest.raises(UnsupportedError, match="window of 256 tokens"):
        plan_gguf(windowed.interpolate(2.1), ["f16"])


def test_llama3_is_refused_where_llama_cpp_would_lose_it(tmp_path: Path) -> None:
    block = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    checkpoint = opened(
        tmp_path / "m", architecture="qwen2", shape=ODD, rope={"rope_scaling": block}
    )
    with pytest.raises(UnsupportedError, match=r"llama3 RoPE.*qwen2"):
        plan_gguf(checkpoint, ["f16"])


def test_a_head_size_that_llama_cpp_cannot_load_is_refused(tmp_path: Path) -> None:
    plan_gguf(opened(tmp_path / "llama", shape=APART), ["f16"])
    with pytest.raises(UnsupportedError, match=r"8 heads of 24 .* hidden size of 96.*qwen2"):
        plan_gguf(opened(tmp_path / "qwen2", architecture="qwen2", shape=APART), ["f16"])


def test_an_unknown_type_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="q4_k_x") as refusal:
        plan_gguf(opened(tmp_path / "m", shape=ODD), ["q4_k_x"])
    assert "q4_k_m" in refusal.value.hint


def test_a_type_this_llama_cpp_cannot_make_is_refused_with_its_reason(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    with pytest.raises(UnsupportedError, match=r"nvfp4: llama\.cpp cannot make it.*invalid output"):
        plan_gguf(checkpoint, ["nvfp4"])
    assert "nvfp4" not in {option.name for option in quantization_types(checkpoint)}


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    hparams = dataclasses.replace(checkpoint.hparams, vocab_size=513)
    with pytest.raises(TokenizerError, match="512 ids, the embedding 513 rows"):
        plan_gguf(dataclasses.replace(checkpoint, hparams=hparams), ["f16"])
