"""Numbers in words, as errors and results share them."""

from __future__ import annotations


def gib(size_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{size_bytes / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
