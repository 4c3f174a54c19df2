"""ggml's work buffer begins on a cache line: ``new[]`` is ours in every library of llama.cpp."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from converters.ggml.alignment import LIBRARY

LOADERS = {
    "the runtime": "from pi_convert.runtimes.llamacpp import _library; _library()",
    "the quantizer": "from converters.ggml.library import load_libraries; load_libraries()",
}
ARRAYS = """
import ctypes
from converters.ggml.alignment import align_arrays
if {ours}:
    assert align_arrays()
else:
    ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
new, delete = ctypes.CDLL(None)._Znam, ctypes.CDLL("libstdc++.so.6")._ZdaPv
new.restype, new.argtypes, delete.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
arrays = [new(size) for size in (1, 100, 70_000, 1 << 20, 100 << 20)]
print([array % 64 for array in arrays[2:]])
for array in arrays:
    delete(array)
"""

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="not compiled")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_ggml_is_bound_to_it(loader: str) -> None:
    bound = run(LOADERS[loader], LD_DEBUG="bindings").stderr
    found = set(re.findall(r"file \S+/(libggml-cpu\S*) \[0\] to (\S+) \[0\]: .*`_Znam'", bound))
    assert {Path(to).name for _, to in found} == {LIBRARY.name}


def test_large_arrays_begin_on_a_cache_line_and_libstdcpp_frees_them() -> None:
    assert run(ARRAYS.format(ours=True)).stdout == "[0, 0, 0]\n"
    # glibc's own blocks this large begin 16 bytes into a page.
    assert run(ARRAYS.format(ours=False)).stdout.endswith(" 16, 16]\n")
