"""``quants``: the table is what the target would write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert.commands.quants import command
from tests.tiny import ODD, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("quants") / "tiny", shape=ODD)


def test_sizes_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(folder), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    sizes = {item["name"]: item["size_bytes"] for item in document["types"]}
    checkpoint = open_checkpoint(str(folder))
    for name in ("f16", "q8_0", "q4_k_m"):
        plans = plan_gguf(checkpoint, [name])
        written = write_gguf(checkpoint, plans, tmp_path)
        assert written[0].path.stat().st_size == sizes[name]
    assert sizes["f32"] > sizes["f16"] > sizes["q8_0"] > sizes["q4_0"]


def test_sizes_are_those_of_the_files_of_a_scaled_export(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(folder), "--scale", "2.5", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["scale"] == 2.5
    sizes = {item["name"]: item["size_bytes"] for item in document["types"]}
    checkpoint = open_checkpoint(str(folder)).interpolate(2.5)
    for written in write_gguf(checkpoint, plan_gguf(checkpoint, ["f16", "q4_k_m"]), tmp_path):
        assert written.path.stat().st_size == sizes[written.quantize]
    plain = json.loads(CliRunner().invoke(command, [str(folder), "--json"]).stdout)
    assert all(item["size_bytes"] < sizes[item["name"]] for item in plain["types"])


def test_text_has_a_line_a_type(folder: Path) -> None:
    result = CliRunner().invoke(command, [str(folder)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("model:")
    names = [line.split()[0] for line in lines[2:]]
    assert {"q4_k_m", "iq2_xs", "f32"} <= set(names)
    assert len(names) == len(set(names))


def test_importance_matrices_depend_on_the_model(folder: Path, default_gguf: Path) -> None:
    """Rows of 144 fit no 256-block, so nothing needs one here; some types do for SmolLM2."""

    def needing(model: Path) -> set[str]:
        document = json.loads(CliRunner().invoke(command, [str(model), "--json"]).stdout)
        return {t["name"] for t in document["types"] if t["needs_importance_matrix"]}

    assert {"iq1_s", "iq2_xs", "q2_k_s"} <= needing(default_gguf)
    assert "iq3_xs" not in needing(default_gguf)
    assert needing(folder) == set()


def test_the_default_model_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    assert "default model" in result.output.splitlines()[0]
