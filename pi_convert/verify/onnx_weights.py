"""Initializers of an ONNX file as the weights they stand for, in encodings that can be compared.

A weight of MatMulNBits is three or four initializers. In blocks of 32 it holds Q4_0's, Q4_1's or
Q8_0's numbers in another order; other blocks are ``converters.encodings.NBITS``. The file's own
shapes and types tell which: nothing is taken from the target that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.containers.onnx import OnnxTensor
from converters.encodings import ENCODINGS, F16, F32, NBITS, Encoding, NBits, nbits_encoding
from converters.tensor import Tensor

FLOATS: Mapping[str, Encoding] = {"float32": F32, "float16": F16}
_CODES, _SCALES, _ZEROS, _OFFSETS = "_codes", "_scales", "_zero_points", "_offsets"
_GATHERED = "_codes_flat"  # an embedding's codes as rows of bytes; beside a tied head, once more
_SUFFIXES = ("", _CODES, _GATHERED, _SCALES, _ZEROS, _OFFSETS)
_COMPARED_ROWS = 4096
_GGML_BLOCK = 32
_GGML = {(4, False): "q4_0", (4, True): "q4_1", (8, False): "q8_0"}  # bits, with offsets

Raw = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


def parts_of(name: str, tensors: Mapping[str, OnnxTensor]) -> dict[str, OnnxTensor]:
    """The initializers of the weight ``name``, by suffix."""
    found = {s: tensors[f"{name}{s}"] for s in _SUFFIXES if f"{name}{s}" in tensors}
    gathered = found.pop(_GATHERED, None)
    return {_CODES: gathered, **found} if gathered else found


def is_second_copy(name: str, tensors: Mapping[str, OnnxTensor]) -> bool:
    """Whether ``name`` is a weight's codes once more, byte for byte, in the form of the gather.

    What writes a file anew may store apart what shared its bytes.
    """
    codes = tensors.get(name.removesuffix(_GATHERED) + _CODES)
    if not name.endswith(_GATHERED) or codes is None:
        return False
    copy = tensors[name]
    if copy.shape[:1] != codes.shape[:1] or copy.row_bytes != codes.row_bytes:
        return False
    starts = range(0, codes.shape[0], _COMPARED_ROWS)
    return all(np.array_equal(_row_bytes(copy, at), _row_bytes(codes, at)) for at in starts)


def stored_weight(
    name: str, shape: tuple[int, ...], parts: Mapping[str, OnnxTensor]
) -> Tensor | None:
    """The weight that ``parts`` store; None where they are of another shape or no known form."""
    if parts.keys() == {""}:
        return _float_weight(name, shape, parts[""])
    blocks = _blocks(shape, parts)
    if blocks is None:
        return None
    return Tensor(name, shape, blocks.encoding, blocks.read)


def _float_weight(name: str, shape: tuple[int, ...], part: OnnxTensor) -> Tensor | None:
    encoding = FLOATS.get(part.dtype.name)
    if part.shape != shape or encoding is None:
        return None

    def read(start: int, stop: int) -> Raw:
        values = part.read() if len(shape) == 1 else part.read(start, stop)
        rows = 1 if len(shape) == 1 else stop - start
        raw: Raw = np.ascontiguousarray(values).reshape(rows, -1).view(np.uint8)
        return raw

    return Tensor(name, shape, encoding, read)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A quantized weight's initializers, and the encoding whose blocks they hold."""

    encoding: Encoding
    bits: int
    parts: Mapping[str, OnnxTensor]

    def read(self, start: int, stop: int) -> Raw:
        """Rows in that encoding's own order of bytes.

        ggml's numbers are float16. What is stored wider and no float16 becomes the other float16
        beside it, so that a row differs from a right one by however little it is wrong.
        """
        read = {suffix: part.read(start, stop) for suffix, part in self.parts.items()}
        scales = read[_SCALES]
        codes = read[_CODES].reshape(*scales.shape, -1)
        if self.encoding in NBITS:
            columns = [_bytes(scales)]
            if _ZEROS in read:
                columns.append(self._zeros(read[_ZEROS], scales.shape[1])[:, :, None])
            return _rows([*columns, codes])
        halves = _half(scales, lambda half: half.astype(scales.dtype) == scales)
        columns = [_bytes(halves)]
        if _OFFSETS in read:
            columns.append(_bytes(_least(read[_OFFSETS], halves)))
        if self.bits == 8:
            return _rows([*columns, codes ^ np.uint8(0x80)])
        ordered = _nibbles(codes)
        half = _GGML_BLOCK // 2
        return _rows([*columns, ordered[:, :, :half] | (ordered[:, :, half:] << np.uint8(4))])

    def _zeros(self, stored: Raw, blocks: int) -> Raw:
        return stored if self.bits == 8 else _nibbles(stored)[:, :blocks]


def _blocks(shape: tuple[int, ...], parts: Mapping[str, OnnxTensor]) -> _Blocks | None:
    codes, scales = parts.get(_CODES), parts.get(_SCALES)
    if codes is None or scales is None or "" in parts or len(shape) != 2 or codes.dtype != np.uint8:
        return None
    rows, columns = shape
    count = scales.shape[-1] if scales.shape else 0
    if codes.shape[:1] != (rows,) or not count or columns % count:
        return None
    block, bits = columns // count, codes.row_bytes * 8 // columns
    kind = NBits(bits, _ZEROS in parts, scales.dtype)
    encoding = nbits_encoding(block, kind)
    if block == _GGML_BLOCK and not kind.asymmetric:
        name = _GGML.get((bits, _OFFSETS in parts))
        encoding = ENCODINGS[name] if name else None
    if encoding is None or not _fits(shape, count, bits, parts):
        return None
    return _Blocks(encoding, bits, parts)


def _fits(shape: tuple[int, ...], count: int, bits: int, parts: Mapping[str, OnnxTensor]) -> bool:
    """Whether every part is of the shape and type that ``count`` blocks a row have."""
    rows, row_bytes = shape[0], shape[1] * bits // 8
    codes = ((rows, count, row_bytes // count), (rows, row_bytes))
    expected = {
        _CODES: (codes, ("uint8",)),
        _SCALES: (((rows, count),), ("float32", "float16")),
        _ZEROS: (((rows, -(-count * bits // 8)),), ("uint8",)),
        _OFFSETS: (((rows, count),), ("float32",)),
    }
    return all(
        part.shape in expected[suffix][0] and part.dtype.name in expected[suffix][1]
        for suffix, part in parts.items()
    )


def _row_bytes(tensor: OnnxTensor, start: int) -> Raw:
    rows: Raw = tensor.read(start, min(start + _COMPARED_ROWS, tensor.shape[0])).view(np.uint8)
    return rows.reshape(len(rows), -1)


def _nibbles(packed: Raw) -> Raw:
    """Bytes along the last axis -> two codes each, the low half first."""
    pairs: Raw = np.stack([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _least(offsets: npt.NDArray[np.float32], halves: Halves) -> Halves:
    """The m of ggml's q d + m, from the offset o = m + 8 d as float32 rounds it."""
    shift = np.float32(8) * halves.astype(np.float32)
    return _half(offsets - shift, lambda half: half.astype(np.float32) + shift == offsets)


def _half(
    values: npt.NDArray[np.floating], is_right: Callable[[Halves], npt.NDArray[np.bool_]]
) -> Halves:
    """``values`` as float16; where that is not right, the neighbour on the other side."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
    if is_right(nearest).all():
        return nearest
    away = np.where(nearest.astype(values.dtype) < values, np.inf, -np.inf).astype(np.float16)
    with np.errstate(over="ignore"):
        return np.where(is_right(nearest), nearest, np.nextafter(nearest, away))


def _bytes(values: npt.NDArray[np.floating]) -> Raw:
    raw: Raw = np.ascontiguousarray(values)[:, :, None].view(np.uint8)
    return raw


def _rows(columns: list[Raw]) -> Raw:
    raw: Raw = np.concatenate(columns, axis=2)
    return raw.reshape(len(raw), -1)
