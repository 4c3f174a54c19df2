"""Has libggml's large arrays begin on a cache line, which its kernels' loads are as long as."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

LIBRARY = Path(__file__).with_name("_aligned_new.so")  # native/aligned_new.cpp

_log = logging.getLogger(__name__)


@functools.cache
def align_arrays() -> bool:
    """Whether libraries that are loaded from now on find our ``operator new[]`` before libstdc++'s.

    libggml is bound to one while it is loaded, so this comes first. An eighth of a pass with flash
    attention on 4,096 tokens is at stake (AVX-512), no bit of a result. False where it was not
    compiled with this installation.
    """
    if not LIBRARY.is_file():
        return False
    try:
        ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        _log.debug("%s: %s", LIBRARY, error)
        return False
    return True
