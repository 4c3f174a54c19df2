"""The values by which kernels are held to ggml on a user's machine, the same on every machine.

A contracted expression changes the last bit of a sum. That shows in the bytes only where rounding
decides between two scales, or between two neighbours of one, which weights bring about seldom:
40,000 rows of them may not show it. So most rows here are made for that.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from converters.ggml.quantize import Floats

_ROW = 256
Drawn = npt.NDArray[np.int16]  # (rows, 256), uniform over all of int16


def like_weights(rows: int) -> Floats:
    """Rows of 256 like weights."""
    return _like_weights(_draw(rows))


def checked_values(rows: int) -> Floats:
    """Rows of 256: a sixth like weights, the rest where rounding decides."""
    drawn = _draw(rows)
    values: Floats = np.empty((rows, _ROW), np.float32)
    values[::6] = _like_weights(drawn[::6])
    values[1::3] = _of_two_values(drawn[1::3])
    values[2::6] = _at_half_ties(drawn[2::6], levels=7)
    values[3::6] = _in_proportion(drawn[3::6])
    values[5::6] = _at_half_ties(drawn[5::6], levels=128)
    return values


def _draw(rows: int) -> Drawn:
    stream = hashlib.shake_256(b"pi-convert kernels").digest(2 * rows * _ROW)
    return np.frombuffer(stream, "<i2").reshape(rows, _ROW)


def _like_weights(drawn: Drawn) -> Floats:
    """Of many magnitudes; some rows are flat, zero in part, of one sign or with an outlier."""
    uniform: Floats = drawn.astype(np.float32) / np.float32(2**15)
    values: Floats = uniform * uniform * uniform
    values *= np.float32(0.1)
    values[::7] = np.float32(0.02) * uniform[::7]  # flat instead of peaked
    values[1::7] *= uniform[1::7] * uniform[1::7]  # heavier tails
    values[1::61] *= np.float32(1e-4)
    values[2::67, :64] = 0
    values[3::71] = np.abs(values[3::71])
    values[5::73, 17] = 3.0  # an outlier
    return values


def _of_two_values(drawn: Drawn) -> Floats:
    """Two values to 32 elements: several scales fit them exactly, and rounding picks the best."""
    parts = drawn.reshape(-1, 32)
    ends = parts[:, :2] * np.float32(0.1 / 2**15)
    return np.where(parts & 1, ends[:, :1], ends[:, 1:]).reshape(drawn.shape)


def _at_half_ties(drawn: Drawn, levels: int) -> Floats:
    """Whole multiples of a scale midway between two float16: its last bit decides the block's."""
    scale = ((drawn[:, :1] & 1023) * 2 + 2049) * np.float32(2**-18)
    return (drawn % levels - levels // 2) * scale


def _in_proportion(drawn: Drawn) -> Floats:
    """Every second 32 are those before over 2, 64 or 256: their scales end midway between two."""
    fractions = np.array([[1, 1, f, f] for f in (1 / 2, 1 / 64, 1 / 256)], np.float32)
    pattern = _like_weights(drawn)[:, None, :16]
    parts = fractions[np.arange(len(drawn)) % 3, :, None] * pattern
    return np.tile(parts.reshape(-1, 64), 4)
