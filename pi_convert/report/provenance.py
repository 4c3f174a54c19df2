"""What a measurement ran on, for the record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence

from pi_convert.evaluate.texts import Document
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
        "machine": platform.machine(),
        "cores": str(cores()),
        **{name: importlib.metadata.version(name) for name in sorted({*packages, "numpy"})},
        **{key: str(value) for key, value in settings.items() if value is not None},
    }


def texts_record(given: Sequence[Document]) -> dict[str, object]:
    """Each text that was given by file name and SHA-256 of its bytes; none: the default ones."""
    if not given:
        return {"text": "Python documentation"}
    return {
        f"text {number}": f"{text.name}, SHA-256 {hashlib.sha256(text.text.encode()).hexdigest()}"
        for number, text in enumerate(given, start=1)
    }
