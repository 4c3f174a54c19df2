"""What may be loaded by whom, beyond the direction that import-linter holds."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import converters

HEAVY = ("pi_convert", "click", "torch", "transformers", "llama_cpp", "onnxruntime")

COMPILED = "converters.ggml._"


def test_converters_load_no_ml_library_and_nothing_above_them() -> None:
    found = pkgutil.walk_packages(converters.__path__, "converters.")
    # The compiled kernels are libraries of plain C, opened with ctypes.
    names = [module.name for module in found if not module.name.startswith(COMPILED)]
    assert len(names) > 30
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
