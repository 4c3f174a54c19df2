"""llama-cpp-python's sdist, of the installed version: llama.cpp's converter and test vectors."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path


def unpack_llama_cpp(cache: Path) -> Path:
    """Folder of the vendored llama.cpp, downloaded by pip once and kept under ``cache``."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = cache / f"llama_cpp_python-{version}"
    vendored = folder / "vendor" / "llama.cpp"
    if vendored.is_dir():
        return vendored
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"llama_cpp_python-{version}.tar.gz"
    if not archive.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache),
             "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"],
            check=True,
        )  # fmt: skip
    partial = cache / f"{folder.name}.partial"
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / folder.name).rename(folder)
    partial.rmdir()
    return vendored
