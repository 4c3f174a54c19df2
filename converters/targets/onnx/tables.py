"""The cos and sin tables that the graph rotates queries and keys by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from converters.rope.parameters import FloatArray, RopeParameters

_CHUNK_ROWS = 8192


def rope_tables(
    inv_freq: FloatArray, attention_factor: float, start: int, stop: int
) -> tuple[FloatArray, FloatArray]:
    """Cos and sin at positions ``start`` to ``stop``, float32 (stop - start, rotary_dim / 2).

    Angles are float32 products as in transformers' ``*RotaryEmbedding.forward``, with which the
    model was trained: at position 64k a float64 angle is 2e-3 away from them.
    """
    positions = np.arange(start, stop, dtype=np.float32)
    angles = (positions[:, None] * inv_freq[None, :]).astype(np.float64)
    factor = np.float64(attention_factor)
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(
        np.float32
    )


def table_chunks(
    rope: RopeParameters, rows: int, dtype: npt.DTypeLike
) -> Iterator[tuple[int, npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """(first row, cos, sin) of the whole table in ``dtype``, a few thousand rows at a time."""
    frequencies = rope.inv_freq()
    for start in range(0, rows, _CHUNK_ROWS):
        cos, sin = rope_tables(
            frequencies, rope.attention_factor, start, min(start + _CHUNK_ROWS, rows)
        )
        yield start, cos.astype(dtype), sin.astype(dtype)
