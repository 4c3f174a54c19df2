"""How a weight is stored in the data file: plain floats, or the parts that MatMulNBits reads.

ggml's blocks of 32 have the numbers of MatMulNBits in another order, so a Q4_0, Q4_1 or Q8_0 tensor
is moved without being quantized again:

    Q4_0   (q - 8) d                codes, scales d
    Q8_0   (q - 128) d              codes q + 128, scales d
    Q4_1   q d + m = (q - 8) d + o  codes, scales d, offsets o = m + 8 d

MatMulNBits has no float offset that is fast; the graph adds blocksum(x) o (see ``linear``). A float
tensor goes through ggml's own quantizer into these; blocks of 128 and blocks with a zero point are
``converters.nbits``'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from converters.encodings import ENCODINGS, F16, F32, NBITS, Encoding, NBits

Q4_0, Q4_1, Q8_0 = ENCODINGS["q4_0"], ENCODINGS["q4_1"], ENCODINGS["q8_0"]
CARRIED = (Q4_0, Q4_1, Q8_0)  # ggml's block types that MatMulNBits holds as they are
BITS: Mapping[Encoding, int] = {
    Q4_0: 4,
    Q4_1: 4,
    Q8_0: 8,
    **{encoding: kind.bits for encoding, kind in NBITS.items()},
}

CODES, SCALES, ZERO_POINTS, OFFSETS = "_codes", "_scales", "_zero_points", "_offsets"

Raw = npt.NDArray[np.uint8]
FloatType = np.dtype[np.floating]


@dataclass(frozen=True, slots=True)
class Part:
    """One initializer of a weight: ``suffix`` is added to the weight's name."""

    suffix: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size in the data file."""
        return prod(self.shape) * self.dtype.itemsize


def parts_of(shape: tuple[int, ...], encoding: Encoding, floats: FloatType) -> tuple[Part, ...]:
    """The initializers of a weight of ``shape`` in ``encoding``, in a graph of ``floats``.

    Offsets are float32 in any graph: float16 does not hold m + 8 d.
    """
    if encoding in (F32, F16):
        return (Part("", np.dtype("f4" if encoding is F32 else "f2"), shape),)
    rows, blocks = shape[0], shape[1] // encoding.block_elements
    code_bytes = encoding.block_elements * BITS[encoding] // 8
    codes = np.dtype("u1")
    parts = [
        Part(CODES, codes, (rows, blocks, code_bytes)),
        Part(SCALES, floats, (rows, blocks)),
    ]
    if encoding in NBITS and NBITS[encoding].asymmetric:
        parts.append(Part(ZERO_POINTS, codes, (rows, -(-blocks * BITS[encoding] // 8))))
    if encoding is Q4_1:
        parts.append(Part(OFFSETS, np.dtype("f4"), (rows, blocks)))
    return tuple(parts)


def split_parts(raw: Raw, encoding: Encoding, floats: FloatType) -> list[Raw]:
    """Rows of ``encoding`` -> the bytes of each of ``parts_of``, uint8 (rows, bytes)."""
    if encoding in (F32, F16):
        return [raw]
    blocks = raw.reshape(len(raw), -1, encoding.block_bytes)
    if encoding in NBITS:
        return _split_nbits(blocks, NBITS[encoding])
    halves = _floats(blocks, 0, np.dtype("f2"))
    scales = _rows(halves.astype(floats))
    if encoding is Q8_0:
        return [_rows(blocks[:, :, 2:] ^ np.uint8(0x80)), scales]  # int8 q -> q + 128
    if encoding is Q4_0:
        return [_rows(_pairs(blocks[:, :, 2:])), scales]
    least = _floats(blocks, 2, np.dtype("f2")).astype(np.float32)
    offsets = least + np.float32(8) * halves.astype(np.float32)
    return [_rows(_pairs(blocks[:, :, 4:])), scales, _rows(offsets)]


def _split_nbits(blocks: Raw, kind: NBits) -> list[Raw]:
    size = kind.scale.itemsize
    parts = [_rows(blocks[:, :, size + kind.asymmetric :]), _rows(_floats(blocks, 0, kind.scale))]
    if kind.asymmetric:
        zeros = blocks[:, :, size]
        if kind.bits == 4:  # two a byte; the last of an odd number stands alone
            even = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
        parts.append(_rows(zeros))
    return parts


def _floats(blocks: Raw, at: int, dtype: FloatType) -> npt.NDArray[np.floating]:
    """The number at byte ``at`` of every block, (rows, blocks)."""
    raw = np.ascontiguousarray(blocks[:, :, at : at + dtype.itemsize])
    return raw.view(dtype)[:, :, 0]


def _pairs(nibbles: Raw) -> Raw:
    """Ggml's bytes (element j and j + 16) -> MatMulNBits' (element 2j and 2j + 1)."""
    low, high = nibbles & np.uint8(0x0F), nibbles >> np.uint8(4)
    ordered = np.concatenate([low, high], axis=-1)
    packed: Raw = ordered[:, :, 0::2] | (ordered[:, :, 1::2] << np.uint8(4))
    return packed


def _rows(array: npt.NDArray[np.generic]) -> Raw:
    rows: Raw = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    return rows
