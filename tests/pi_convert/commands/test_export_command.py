"""The export command as its user meets it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

from pi_convert import cli
from pi_convert.report.rope import factor_text
from pi_convert.report.runlines import run_lines
from tests.broken.cases import CASES, Case
from tests.tiny import ODD, WIDE, tiny_hparams, write_tiny


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    reference = case.build(tmp_path / "in")
    code = cli.run(["export", reference, "--to", "gguf", "--to", "onnx", "--to", "safetensors",
                    "--scale", "8", "--out", str(tmp_path / "out" / "deep")])  # fmt: skip
    printed = capfd.readouterr()
    assert code == 1
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for text in case.says:
        assert text in errors[0]
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "Tiny-Model")


def export(model: Path | None, out: Path, *more: str) -> int:
    reference = [] if model is None else [str(model)]
    return cli.run(["export", *reference, "--to", "gguf", "--scale", "8", "--out", str(out), *more])


def test_what_a_person_reads(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(model, tmp_path, "--quantize", "q8_0", "--quantize", "f16") == 0
    text = capfd.readouterr().out
    assert text.splitlines()[0] == f"model: {model}"
    assert "default, factor 1, theta 10000, L 128, L' 128" in text
    assert "linear, factor 8, theta 10000, L 128, L' 1,024" in text
    for name in ("Tiny-Model-PI8-Q8_0.gguf", "Tiny-Model-PI8-F16.gguf"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in text
    for line in ("llama-cli -m", "llama-server -m", "ollama create", "KV cache", "fine-tuning"):
        assert line in text
    assert "--rope" not in text


def test_json_is_one_document(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(model, tmp_path, "--quantize", "f16", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["rope"]["factor"] == 8.0
    (artifact,) = document["artifacts"]
    path = Path(artifact["path"])
    assert artifact["size_bytes"] == path.stat().st_size
    assert artifact["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    reader = gguf.GGUFReader(path)
    assert reader.fields["llama.rope.scaling.factor"].contents() == 8.0


def test_a_dry_run_says_the_size_and_writes_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert export(model, tmp_path / "out", "--dry-run", "--json") == 0
    (plan,) = json.loads(capfd.readouterr().out)["planned"]
    assert sorted(tmp_path.rglob("*")) == before
    assert export(model, tmp_path / "out") == 0
    written = Path(plan["path"])
    assert written.stat().st_size == plan["size_bytes"]


def test_an_existing_output_needs_force(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(model, tmp_path) == 0
    file = tmp_path / "Tiny-Model-PI8-Q4_K_M.gguf"
    before = file.stat().st_mtime_ns
    assert export(model, tmp_path) == 1
    assert "--force" in capfd.readouterr().err
    assert file.stat().st_mtime_ns == before
    assert export(model, tmp_path, "--force") == 0


def test_a_dry_run_says_what_exists_and_what_would_stop_it(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [model, tmp_path / "out", "--to", "safetensors", "--quantize", "f16"]

    def dry(*more: str, stopped: bool = False) -> str:
        assert export(*words, "--dry-run", *more) == (1 if stopped else 0)
        return capfd.readouterr().out

    names = (tmp_path / "out" / "Tiny-Model-PI8-F16.gguf", tmp_path / "out" / "Tiny-Model-PI8")
    text = dry()
    assert all(f"would write  {name}" in text for name in names)
    assert not any(word in text for word in ("exists", "--force", "would stop"))
    assert (document := json.loads(dry("--json")))["obstacles"] == []
    assert [planned["path"] for planned in document["planned"]] == [str(name) for name in names]
    assert export(*words) == 0
    capfd.readouterr()
    text = dry(stopped=True)
    assert all(
        f"would stop   {name} exists. Give --force to replace it, or write elsewhere." in text
        for name in names
    )
    assert json.loads(dry("--json", stopped=True))["obstacles"] == [
        f"{name} exists" for name in names
    ]
    text = dry("--force")
    assert text.count("in place of the one that exists") == 2
    assert "would stop" not in text
    (names[1] / "notes.txt").write_text("mine")
    assert "notes.txt" in dry("--force", stopped=True)


def test_room_is_asked_for_once_for_all_targets(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--to", "safetensors", "--quantize", "f16"]
    assert export(model, tmp_path / "measured", *words) == 0
    (gguf_file,) = (tmp_path / "measured").glob("*.gguf")
    tensors = (model / "model.safetensors").stat().st_size
    free = gguf_file.stat().st_size + tensors // 2  # enough for either, not for both
    assert free > tensors
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "a" / "b"
    assert export(model, out, *words) == 1
    assert f"{out}: " in (error := capfd.readouterr().err)
    assert "MiB free" in error
    assert not (tmp_path / "a").exists()
    assert export(model, out, "--quantize", "f16") == 0  # negative control: one of them fits


def test_a_factor_that_is_no_whole_number_is_never_shown_as_one(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for scale in ("1.0000001", "1.00000000001", "7.9999999", "2.2"):
        words = ["export", str(model), "--to", "gguf", "--dry-run", "--out", str(tmp_path)]
        assert cli.run([*words, "--scale", scale]) == 0
        assert f"linear, factor {scale}, theta 10000," in capfd.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.0, "8"), (2.2, "2.2"), (500000.0, "500000"), (1000001.0, "1000001"),
        (8.8 * 1.5, "13.2"), (1.0000000000000002, "1.0000000000000002"),
        (3 * (1 + 2**-23), "3.00000035762787"),
    ],
)  # fmt: skip
def test_numbers_are_as_people_write_them(value: float, text: str) -> None:
    assert factor_text(value) == text


def test_a_model_left_out_is_the_checkpoint_here(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    assert export(None, tmp_path / "out", "--dry-run") == 0
    assert "the checkpoint in this folder (Tiny-Model)" in capfd.readouterr().out


def test_a_model_left_out_elsewhere_is_the_default_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(None, tmp_path / "out") == 0
    text = capfd.readouterr().out
    assert "the default model" in text
    assert (tmp_path / "out" / "SmolLM2-135M-Instruct-PI8-Q4_1.gguf").is_file()


def test_a_type_that_needs_an_importance_matrix_is_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wide = write_tiny(tmp_path / "wide", shape=WIDE)
    assert export(wide, tmp_path / "out", "--quantize", "iq2_xxs") == 1
    assert "importance matrix" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exporting_an_export_composes(model: Path, tmp_path: Path) -> None:
    assert export(model, tmp_path, "--quantize", "f16") == 0
    first = tmp_path / "Tiny-Model-PI8-F16.gguf"
    code = cli.run(["export", str(first), "--to", "gguf", "--scale", "2", "--out", str(tmp_path),
                    "--quantize", "f16"])  # fmt: skip
    assert code == 0
    fields = gguf.GGUFReader(tmp_path / "Tiny-Model-PI16-F16.gguf").fields
    assert fields["llama.rope.scaling.factor"].contents() == 16.0
    assert fields["llama.rope.scaling.original_context_length"].contents() == 128
    assert fields["llama.context_length"].contents() == 2048


def test_factors_compose_to_the_decimal_a_person_would_write(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "safetensors", "--out", str(tmp_path)]
    assert cli.run(["export", str(model), *words, "--scale", "8.8"]) == 0
    capfd.readouterr()
    first = tmp_path / "Tiny-Model-PI8.8"
    assert cli.run(["export", str(first), *words, "--scale", "1.5"]) == 0
    assert "linear, factor 13.2, theta 10000" in capfd.readouterr().out
    config = json.loads((tmp_path / "Tiny-Model-PI13.2" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 13.2


def test_weights_that_are_not_finite_leave_none_of_the_folders(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors")
    for target in ("gguf", "safetensors"):
        out = tmp_path / "a" / "b" / "c"
        words = ["--to", target, "--scale", "8", "--out", str(out)]
        assert cli.run(["export", str(model), *words]) == 1
        error = capfd.readouterr().err
        assert "model.norm.weight" in error
        assert "partial" not in error
        assert not (tmp_path / "a").exists()


def test_no_local_path_is_written(model: Path, tmp_path: Path) -> None:
    assert export(model, tmp_path, "--quantize", "f16") == 0
    data = (tmp_path / "Tiny-Model-PI8-F16.gguf").read_bytes()
    assert str(tmp_path).encode() not in data
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "Tiny-Model")
    assert export(moved, tmp_path / "again", "--quantize", "f16") == 0
    assert (tmp_path / "again" / "Tiny-Model-PI8-F16.gguf").read_bytes() == data


def test_the_context_of_the_run_lines_fits_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(bytes(1000))
    hparams = tiny_hparams(ODD)
    a_token = 2 * 2 * 2 * 24 * 2  # keys and values, layers, kv heads, head_dim, bytes of float16
    memory = int((10_000 * a_token + 1000) / 0.8) + 1
    lines = run_lines(file, hparams, 65536, memory_bytes=memory)
    assert lines.context == 9 * 1024  # 10,000 tokens fit, in steps of 1,024
    assert lines.kv_cache_bytes == 9 * 1024 * a_token
    assert "-c 9216" in lines.llama_cli
    assert run_lines(file, hparams, 4096, memory_bytes=memory).fits_whole_context


def test_force_replaces_an_export_and_nothing_else(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "safetensors", "--scale", "8", "--out", str(tmp_path), "--force"]
    assert cli.run(["export", str(model), *words]) == 0
    assert cli.run(["export", str(model), *words]) == 0
    (tmp_path / "Tiny-Model-PI8" / "notes.txt").write_text("mine")
    assert cli.run(["export", str(model), "--to", "gguf", *words]) == 1
    assert "notes.txt" in capfd.readouterr().err
    assert (tmp_path / "Tiny-Model-PI8" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.gguf"))
    onto_itself = ["--to", "safetensors", "--scale", "1", "--out", str(tmp_path), "--force"]
    assert cli.run(["export", str(model), *onto_itself]) == 1
    assert "the source itself" in capfd.readouterr().err
