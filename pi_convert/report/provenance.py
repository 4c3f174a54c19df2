"""What a measurement ran on, for the record."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from pi_convert.runtimes.llamacpp import cores
from pi_convert.runtimes.ort import RUNTIME_PACKAGE

_PACKAGES = {
    "torch": ("torch", "transformers"),
    "llama.cpp": ("llama-cpp-python",),
    "ONNX Runtime": (RUNTIME_PACKAGE,),
}


def environment(runtimes: Iterable[str], settings: dict[str, object]) -> dict[str, str]:
    """Versions of what took part, and the settings that are not None."""
    packages = {package for name in runtimes for package in _PACKAGES[name]}
    return {
        "pi-convert": importlib.metadata.version("pi-convert"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {cores()} cores",
        **{name: importlib.metadata.version(name) for name in sorted({*packages, "numpy"})},
        **{key: str(value) for key, value in settings.items() if value is not None},
    }
