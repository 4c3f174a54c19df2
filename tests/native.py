"""The compiled kernels: those of this installation, and others compiled for a test."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.ggml import Floats, load_ggml
from converters.ggml.kernels import INSTRUCTION_SETS, Kernels

REPOSITORY = Path(__file__).parents[1]
BUILT = REPOSITORY / "converters" / "ggml"
TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")


def load(name: str) -> Kernels:
    """The installed kernels of an instruction set; the test is skipped where they cannot run."""
    path = BUILT / f"_kquants_{name}.so"
    if not path.is_file():
        pytest.skip(f"{path.name} was not compiled with this installation")
    library = ctypes.CDLL(str(path))
    if not library.pi_supported():
        pytest.skip(f"this processor has no {name}")
    return Kernels(path, library, load_ggml())


def loadable() -> list[Kernels]:
    """Those of every instruction set that runs here; the test is skipped where there is none."""
    found = []
    for name in INSTRUCTION_SETS:
        try:
            found.append(load(name))
        except pytest.skip.Exception as reason:
            skipped = reason
    if not found:
        raise skipped
    return found


def weights(rows: int, seed: int, tail: float = 5.0, columns: int = 256) -> Floats:
    """Like trained weights: rows of different spread, heavy tails."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(-4, 0.5, (rows, 1)))
    values: Floats = (random.standard_t(tail, (rows, columns)) * spread).astype(np.float32)
    return values


def compiled(folder: Path, name: str, *flags: str, edits: Mapping[str, str] | None = None) -> Path:
    """The kernels compiled anew with other flags, texts of ``edits`` replaced; makes ``folder``."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    hook: dict[str, Any] = {}
    source = (REPOSITORY / "hatch_build.py").read_text("utf-8")
    constants = source[source.index("SOURCE =") : source.index("class CompileKernels")]
    exec(constants, hook)  # its flags, without hatchling
    shutil.copytree(REPOSITORY / "native", folder / "native")
    unused = set(edits or ())
    for path in (folder / "native").iterdir():
        text = path.read_text("utf-8")
        for old, new in (edits or {}).items():
            if old in text:
                text = text.replace(old, new)
                unused.discard(old)
        path.write_text(text)
    assert not unused, f"no longer in native/: {unused}"
    out = folder / f"_kquants_{name}.so"
    command = [compiler, *hook["FLAGS"], *hook["INSTRUCTION_SETS"][name], *flags]
    subprocess.run([*command, hook["SOURCE"], "-o", str(out)], cwd=folder, check=True)
    return out
