"""The wheel, installed alone into an empty environment, exports."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.tiny import write_tiny

COMPILED = {f"converters/ggml/_{name}.so" for name in
            ("kquants_avx2", "kquants_avx512", "aligned_new")}  # fmt: skip


@pytest.mark.slow
def test_the_wheel_exports_without_extras(tmp_path: Path) -> None:
    def run(*words: str | Path, **more: object) -> str:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        environment["CMAKE_ARGS"] = "-DLLAVA_BUILD=OFF"
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, check=False,
            env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", REPOSITORY)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert ("none-any" in wheel.name) is (COMPILED.isdisjoint(zipfile.ZipFile(wheel).namelist()))
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", wheel)
    for extra in ("torch", "transformers", "sentencepiece", "safetensors"):
        run(python, "-c", f"import importlib.util as u; assert u.find_spec({extra!r}) is None")
    model = write_tiny(tmp_path / "model")
    pi_convert = tmp_path / "venv" / "bin" / "pi-convert"
    run(pi_convert, "export", model, "--to", "gguf", "--to", "safetensors", "--scale", "8")
    assert (tmp_path / "model-PI8-Q4_K_M.gguf").is_file()
    assert (tmp_path / "model-PI8" / "config.json").is_file()
    assert "effective factor  8" in run(pi_convert, "inspect", "model-PI8-Q4_K_M.gguf")
    run(pi_convert, "check", "model-PI8-Q4_K_M.gguf")
    run(pi_convert, "doctor")


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_built_without_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY, source,
        ignore=shutil.ignore_patterns(".*", "*.so", "tests", "benchmarks", "demo"),
    )  # fmt: skip
    shutil.copy(REPOSITORY / ".gitignore", source)
    found = {}
    for name, compiler in (("without", "no-such-compiler"), ("with", os.environ.get("CXX", "c++"))):
        done = subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / name, source],
            capture_output=True, text=True, check=False, env={**os.environ, "CXX": compiler},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (tmp_path / name).glob("*.whl")
        found[name] = COMPILED & set(zipfile.ZipFile(wheel).namelist())
        said = "no C++ compiler (no-such-compiler): K-quants will be ggml's own"
        assert (said in done.stdout + done.stderr) is (name == "without")
    assert not found["without"]
    if shutil.which(os.environ.get("CXX", "c++")) and platform.machine() == "x86_64":
        assert found["with"] == COMPILED
