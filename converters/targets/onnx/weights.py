"""How a weight is stored in the data file: plain floats, or the parts that MatMulNBits reads.

ggml's blocks of 32 have the numbers of MatMulNBits in another order, so a Q4_0, Q4_1 or Q8_0 tensor
is moved without being quantized again, and a float tensor goes through ggml's own quantizer:

    Q4_0   (q - 8) d                codes, scales d
    Q8_0   (q - 128) d              codes q + 128, scales d
    Q4_1   q d + m = (q - 8) d + o  codes, scales d, offsets o = m + 8 d

MatMulNBits has no float offset that is fast; the graph adds blocksum(x) o (see ``graph.linear``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from converters.encodings import ENCODINGS, F16, F32, Encoding

BLOCK = 32
Q4_0, Q4_1, Q8_0 = ENCODINGS["q4_0"], ENCODINGS["q4_1"], ENCODINGS["q8_0"]
BITS: Mapping[Encoding, int] = {Q4_0: 4, Q4_1: 4, Q8_0: 8}
CARRIED = tuple(BITS)  # block types that MatMulNBits holds as they are

Raw = npt.NDArray[np.uint8]


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


def parts_of(shape: tuple[int, ...], encoding: Encoding) -> tuple[Part, ...]:
    """The initializers of a weight of ``shape`` in ``encoding``."""
    if encoding in (F32, F16):
        return (Part("", np.dtype("f4" if encoding is F32 else "f2"), shape),)
    rows, blocks = shape[0], shape[1] // BLOCK
    code_bytes = BLOCK * BITS[encoding] // 8
    scales = np.dtype("f4")
    parts = [
        Part("_codes", np.dtype("u1"), (rows, blocks, code_bytes)),
        Part("_scales", scales, (rows, blocks)),
    ]
    if encoding is Q4_1:
        parts.append(Part("_offsets", scales, (rows, blocks)))
    return tuple(parts)


def split_parts(raw: Raw, encoding: Encoding) -> list[Raw]:
    """Rows as ggml stores them -> the bytes of each part, uint8 (rows, bytes), in their order."""
    if encoding in (F32, F16):
        return [raw]
    blocks = raw.reshape(raw.shape[0], -1, encoding.block_bytes)
    scales = _halves(blocks, 0)
    if encoding is Q8_0:
        codes = blocks[:, :, 2:] ^ np.uint8(0x80)  # int8 q -> q + 128
        return [_rows(codes), _rows(scales)]
    if encoding is Q4_0:
        return [_rows(_pairs(blocks[:, :, 2:])), _rows(scales)]
    offsets = _halves(blocks, 2) + np.float32(8) * scales
    return [_rows(_pairs(blocks[:, :, 4:])), _rows(scales), _rows(offsets)]


def join_f32(codes: Raw, scales: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """The values that symmetric MatMulNBits parts stand for, float32 (rows, columns)."""
    if bits == 4:
        low, high = codes & 0x0F, codes >> 4
        whole = np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)
        centred = whole.astype(np.float32) - np.float32(8)
    else:
        centred = codes.astype(np.float32) - np.float32(128)
    return (centred * scales[:, :, None]).reshape(codes.shape[0], -1)


def _halves(blocks: Raw, at: int) -> npt.NDArray[np.float32]:
    """The float16 at byte ``at`` of every block, as float32 (rows, blocks)."""
    raw = np.ascontiguousarray(blocks[:, :, at : at + 2])
    return raw.view(np.float16)[:, :, 0].astype(np.float32)


def _pairs(nibbles: Raw) -> Raw:
    """Ggml's bytes (element j and j + 16) -> MatMulNBits' (element 2j and 2j + 1)."""
    low, high = nibbles & np.uint8(0x0F), nibbles >> np.uint8(4)
    ordered = np.concatenate([low, high], axis=-1)
    packed: Raw = ordered[:, :, 0::2] | (ordered[:, :, 1::2] << np.uint8(4))
    return packed


def _rows(array: npt.NDArray[np.generic]) -> Raw:
    rows: Raw = np.ascontiguousarray(array).reshape(array.shape[0], -1).view(np.uint8)
    return rows
