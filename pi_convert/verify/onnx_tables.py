"""The frequencies that an ONNX file's cos and sin tables were made of, recovered from the tables.

A table's column follows one frequency: row p is cos(p f) and sin(p f), the angle rounded to
float32 (transformers' ``LlamaRotaryEmbedding.forward``). Near candidates a few units in the last
place apart are tried on every row, so a column is either reproduced from first to last row or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from converters.rope.parameters import FloatArray
from pi_convert.runtimes.ort import Tables

_ROWS = 4096  # compared at once
# float64 cos rounded to float32 and torch's own differ by 6e-8; float16 rounds by 2.4e-4, and by
# twice that where the float32 values it rounds lie on either side of a middle.
TABLE_TOLERANCE = {"float32": 1.5e-7, "float16": 5e-4}

Floats = npt.NDArray[np.float64]


def tolerance(tables: Tables) -> float:
    """How far a right entry may be from its float64 value."""
    return TABLE_TOLERANCE[tables.cos.dtype.name]


def nearest_ulp(tables: Tables, expected: FloatArray, attention: float, limit: int) -> list[int]:
    """By how many units in the last place each column's frequency is off, ``limit + 1`` for more.

    A column counts as a frequency's where every row of cos and sin is within the tolerance.
    """
    offsets = sorted(range(-limit, limit + 1), key=abs)
    found = np.full(len(expected), limit + 1)
    for offset in offsets:
        left = found > limit
        if not left.any():
            break
        candidate = (expected.view(np.int32) + np.int32(offset)).view(np.float32)
        fits = _reproduced(tables, candidate, attention, left)
        found[left & fits] = abs(offset)
    return [int(value) for value in found]


def recovered_frequencies(tables: Tables) -> Floats:
    """Radians a position of every column, (rotary_dim / 2,); good to the tables' precision.

    The phase of row 1 is unwrapped at rows 2, 4, 8, ..., each halving the error that is left.
    """
    angles = np.arctan2(tables.sin[1].astype(np.float64), tables.cos[1].astype(np.float64))
    frequencies: Floats = np.mod(angles, 2 * np.pi)
    row = 2
    while row < tables.rows:
        sin, cos = tables.sin[row].astype(np.float64), tables.cos[row].astype(np.float64)
        expected = frequencies * row
        error = np.arctan2(sin, cos) - expected
        frequencies = (expected + np.mod(error + np.pi, 2 * np.pi) - np.pi) / row
        row *= 2
    return frequencies


def right_tables(
    tables: Tables, frequencies: FloatArray, attention: float
) -> npt.NDArray[np.floating]:
    """(2, rows, columns): what the file's tables would be of ``frequencies``, in its own type."""
    made = np.empty((2, *tables.cos.shape), tables.cos.dtype)
    for start, cos, sin in _rebuilt(tables.rows, frequencies, attention):
        made[0, start : start + len(cos)] = cos
        made[1, start : start + len(sin)] = sin
    return made


def _reproduced(
    tables: Tables, frequencies: FloatArray, attention: float, columns: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    fits = columns.copy()
    for start, cos, sin in _rebuilt(tables.rows, frequencies, attention):
        stop = start + len(cos)
        for found, right in ((tables.cos, cos), (tables.sin, sin)):
            difference = np.abs(found[start:stop] - right)
            fits &= (difference <= tolerance(tables) * max(1.0, attention)).all(axis=0)
        if not fits.any():
            break
    return fits


def _rebuilt(
    rows: int, frequencies: FloatArray, attention: float
) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    for start in range(0, rows, _ROWS):
        positions = np.arange(start, min(start + _ROWS, rows), dtype=np.float32)
        angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
        cos, sin = np.cos(angles) * attention, np.sin(angles) * attention
        yield start, cos.astype(np.float32), sin.astype(np.float32)
