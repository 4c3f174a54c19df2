"""A tensor that is known before it is read: name, shape and encoding, and its rows on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from converters.encodings import Encoding, decode_f32

# (start, stop) -> the raw rows start..stop, uint8 (stop - start, row_bytes). Safe to call from
# several threads at once.
RowReader = Callable[[int, int], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array, read row by row. A one-dimensional tensor is a single row."""

    name: str
    shape: tuple[int, ...]  # outermost axis first, as numpy and torch count
    encoding: Encoding
    read_raw: RowReader

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements along the last axis."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows: the product of all axes but the last."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Size of one row as stored."""
        return self.encoding.row_bytes(self.row_elements)

    @property
    def size_bytes(self) -> int:
        """Size of the whole tensor as stored."""
        return self.rows * self.row_bytes

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows ``start`` to ``stop``, uint8 (rows, row_bytes)."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.name}: rows {start}..{stop} of {self.rows}")
        return self.read_raw(start, stop)

    def read_f32(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The values of rows ``start`` to ``stop``, float32 (rows, row_elements)."""
        return decode_f32(self.read_rows(start, stop), self.encoding)
