"""Blocks that a long window's activations take go back to the system when they are freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

# hblkhd: bytes in blocks of their own, which free gives back; malloc.h has the struct.
SCRIPT = """
import ctypes, sys
from pi_convert.finetune.memory import return_large_blocks

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
if sys.argv[1] == "returned":
    return_large_blocks()
for size in (20 << 20, 30 << 20):  # glibc takes the largest that was freed for its bound
    libc.free(libc.malloc(size))
before = libc.mallinfo2().hblkhd
kept = libc.malloc(18 << 20)
print(libc.mallinfo2().hblkhd - before >= 18 << 20)
"""


@pytest.mark.parametrize(("how", "own"), [("returned", "True"), ("left alone", "False")])
def test_a_large_block_lies_outside_the_heap(how: str, own: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{own}\n"
