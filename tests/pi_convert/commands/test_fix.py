"""``fix``: the file then has the factor asked for, in llama.cpp too, and nothing else changed."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType as Type

from converters.errors import ConvertError, OutputError, RopeError, UnsupportedError
from pi_convert.audit.rules import audit_path
from pi_convert.commands.fix import command
from tests.headers import LINEAR, PLAIN, SIZES, write_header

FREQS = {"rope_freqs.weight": np.full(8, 2.0, np.float32)}


def fix(path: Path, *options: str) -> Path:
    out = path.with_name("fixed.gguf")
    result = CliRunner().invoke(command, [str(path), "--out", str(out), *options])
    if isinstance(result.exception, ConvertError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out


def scoped(path: Path, architecture: str = "llama") -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if (key.startswith(f"{architecture}.") and "rope" in key) or key.endswith("context_length")
    }


def llama_cpp_loads(path: Path) -> tuple[float, int]:
    """(freq_scale_train, n_ctx_train) as llama.cpp reads them."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    try:
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        assert model
        try:
            return (
                llama_cpp.llama_model_rope_freq_scale_train(model),
                llama_cpp.llama_model_n_ctx_train(model),
            )
        finally:
            llama_cpp.llama_model_free(model)
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


BROKEN: dict[str, dict[str, Any]] = {
    "nothing written": {"keys": PLAIN},
    "type none": {"keys": {**LINEAR, "rope.scaling.type": "none"}},
    "type unknown": {"keys": {**LINEAR, "rope.scaling.type": "ntk"}},
    "type yarn": {"keys": {**LINEAR, "rope.scaling.type": "yarn"}},
    "factor 4": {"keys": {**LINEAR, "rope.scaling.factor": 4.0, "context_length": 512}},
    "factor zero": {"keys": {**LINEAR, "rope.scaling.factor": 0.0}},
    "factor missing": {"keys": {**LINEAR, "rope.scaling.factor": None}},
    "factor as f64": {
        "keys": LINEAR,
        "types": {"llama.rope.scaling.factor": Type.FLOAT64},
    },
    "theta as f64": {"keys": LINEAR, "types": {"llama.rope.freq_base": Type.FLOAT64}},
    "legacy key": {
        "keys": {**LINEAR, "rope.scaling.factor": None, "rope.scale_linear": 8.0},
    },
    "attention factor": {"keys": {**LINEAR, "rope.scaling.attn_factor": 0.8}},
    "context is L": {"keys": {**LINEAR, "context_length": 128}},
    "no L": {"keys": {**LINEAR, "rope.scaling.original_context_length": None}},
}


def test_a_factor_near_a_whole_number_is_not_shown_as_one(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.gguf", keys=LINEAR)
    out = tmp_path / "fixed.gguf"
    words = [str(path), "--out", str(out), "--scale", "7.9999995"]
    text = CliRunner().invoke(command, words).output
    assert f"{out}: factor 7.9999995, L 128" in text
    (line,) = (line for line in text.splitlines() if "rope.scaling.factor" in line)
    assert line.split()[1:] == ["8", "7.9999995"]


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_is_repaired(tmp_path: Path, name: str) -> None:
    path = write_header(tmp_path / "broken.gguf", **BROKEN[name])
    fixed = fix(path, "--scale", "8")
    assert scoped(fixed) == {
        "context_length": 1024,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 16,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 128,
    }
    assert llama_cpp_loads(fixed) == (0.125, 1024)
    assert audit_path(fixed).is_right
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(fixed)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name
        np.testing.assert_array_equal(old.data, new.data)


def test_the_broken_files_were_broken(tmp_path: Path) -> None:
    """Negative control: without the repair they load with another scale or context."""
    # Type none is not among them: llama.cpp reports 1/8 and drops it when a context is made.
    for name in ("nothing written", "factor 4", "factor missing", "context is L"):
        path = write_header(tmp_path / f"{name}.gguf", **BROKEN[name])
        assert llama_cpp_loads(path) != (0.125, 1024), name


@pytest.mark.parametrize("factor", [1.1, 2.2, 3.0])
def test_decimal_factors(tmp_path: Path, factor: float) -> None:
    path = write_header(tmp_path / "a.gguf", keys={**PLAIN, "context_length": 5000})
    scale, context = llama_cpp_loads(fix(path, "--scale", str(factor)))
    assert scale == np.float32(1) / np.float32(factor)
    assert context == round(5000 * factor)


def test_scale_is_absolute(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf", keys=LINEAR)
    assert scoped(fix(path, "--scale", "2"))["rope.scaling.factor"] == 2.0


def test_scale_one_removes_scaling(tmp_path: Path) -> None:
    fixed = fix(write_header(tmp_path / "a.gguf", keys=LINEAR), "--scale", "1")
    keys = scoped(fixed)
    assert keys["rope.scaling.type"] == "none"
    assert keys["context_length"] == 128
    assert "rope.scaling.factor" not in keys
    assert llama_cpp_loads(fixed) == (1.0, 128)


def test_the_option_decides_l_before_the_file(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf", keys=LINEAR)
    keys = scoped(fix(path, "--scale", "4", "--original-context", "100"))
    assert keys["rope.scaling.original_context_length"] == 100
    assert keys["context_length"] == 400


def test_an_ambiguous_context_is_not_over_claimed(tmp_path: Path) -> None:
    keys = {**LINEAR, "rope.scaling.original_context_length": None, "context_length": 4096}
    path = write_header(tmp_path / "a.gguf", keys=keys)
    out = tmp_path / "b.gguf"
    result = CliRunner().invoke(command, [str(path), "--scale", "8", "--out", str(out)])
    assert "(assumption)" in result.output
    assert "--original-context 4096" in result.output
    assert scoped(out)["rope.scaling.original_context_length"] == 512


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "phi3", "stablelm", "nobody"])
def test_any_architecture(tmp_path: Path, architecture: str) -> None:
    path = write_header(tmp_path / "a.gguf", architecture)
    keys = scoped(fix(path, "--scale", "8"), architecture)
    assert keys["rope.scaling.factor"] == 8.0
    assert keys["context_length"] == 1024


def test_layers_left_unscaled_are_named(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf", "gemma3", {**PLAIN, "attention.sliding_window": 64})
    out = tmp_path / "b.gguf"
    result = CliRunner().invoke(command, [str(path), "--scale", "8", "--out", str(out)])
    assert "sliding window unscaled" in result.output


def test_granite_is_switched_on(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf", "granite", {**PLAIN, "rope.scaling.finetuned": False})
    assert scoped(fix(path, "--scale", "8"), "granite")["rope.scaling.finetuned"] is True


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"architecture": "gpt2", "keys": {**SIZES, "context_length": 128}}, "has no RoPE"),
        ({"architecture": "qwen2", "tensors": FREQS}, "refuses a file"),
        ({"architecture": "llada", "tensors": FREQS}, "ignores"),
        (
            {
                "architecture": "phi3",
                "tensors": {"rope_factors_long.weight": np.ones(8, np.float32)},
            },
            "longrope",
        ),
        (
            {
                "architecture": "granitehybrid",
                "keys": {**PLAIN, "rope.scaling.finetuned": False},
            },
            "made without RoPE",
        ),
    ],
)
def test_what_keys_cannot_repair_is_refused(
    tmp_path: Path, made: dict[str, Any], reason: str
) -> None:
    path = write_header(tmp_path / "a.gguf", **made)
    with pytest.raises(UnsupportedError, match=reason):
        fix(path, "--scale", "8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    "keys",
    [
        {**PLAIN, "context_length": None},
        {**LINEAR, "context_length": 64},
        {**PLAIN, "context_length": 2**30},
    ],
)
def test_an_unknown_l_is_asked_for(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write_header(tmp_path / "a.gguf", keys=keys)
    with pytest.raises(RopeError):
        fix(path, "--scale", "8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_the_file_itself_and_existing_files_are_refused(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="file to repair"):
        fix(path, "--scale", "8", "--out", str(path), "--force")
    fix(path, "--scale", "8")
    with pytest.raises(OutputError, match="exists"):
        fix(path, "--scale", "8")
    fix(path, "--scale", "4", "--force")
    assert path.read_bytes() == before


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "0.5", "eight"])
def test_bad_scales_are_wrong_use(tmp_path: Path, scale: str) -> None:
    path = write_header(tmp_path / "a.gguf")
    result = CliRunner().invoke(
        command, [str(path), "--scale", scale, "--out", str(tmp_path / "b.gguf")]
    )
    assert result.exit_code == 2


def test_json(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    out = tmp_path / "b.gguf"
    result = CliRunner().invoke(command, [str(path), "--scale", "8", "--out", str(out), "--json"])
    document = json.loads(result.stdout)
    assert document["context"] == 1024
    assert document["size_bytes"] == out.stat().st_size
    assert set(document["tensor_sha256"]) == {t.name for t in gguf.GGUFReader(out).tensors}
    assert {"key": "llama.rope.scaling.factor", "before": None, "after": 8.0} in document["changes"]


def test_the_default_model(default_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "smol.gguf"
    result = CliRunner().invoke(command, [str(default_gguf), "--scale", "8", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert llama_cpp_loads(out) == (0.125, 65536)
    assert out.stat().st_size == pytest.approx(default_gguf.stat().st_size, abs=4096)
