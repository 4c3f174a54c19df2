"""GGUF headers to write: the counterpart of ``gguf``, which reads them.

gguf-py's ``GGUFWriter`` packs a vocabulary value by value; with its import it takes longer than
quantizing a small model. Here a key is encoded once and the file's layout is known before any
tensor is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from converters.containers.gguf import DEFAULT_ALIGNMENT, DTYPES, MAGIC, GgufTensor, ValueType
from converters.encodings import Encoding
from converters.errors import OutputError

VERSION = 3
MAX_NAME_BYTES = 63  # GGML_MAX_NAME holds a terminating zero
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before its data: ``tensors`` have offsets from its start, in bytes."""

    header: bytes  # padded to where the data begins
    tensors: Mapping[str, GgufTensor]
    size_bytes: int


def encode_key(key: str, value: object, kind: ValueType | None = None) -> bytes:
    """A key and its value as they stand in a file.

    Without ``kind`` a number is what llama.cpp's converter writes: uint32 (or the smallest wider
    integer that holds it) and float32 alone, int32 and float32 in a list; a numpy array keeps its
    dtype. An empty list is one of strings.
    """
    if isinstance(value, list | tuple | np.ndarray):
        element, payload = _encode_array(value)
        return (
            _string(key) + _TYPE.pack(ValueType.ARRAY) + _TYPE.pack(element)
            + _LENGTH.pack(len(value)) + payload
        )  # fmt: skip
    kind = _scalar_type(value) if kind is None else kind
    payload = (
        _string(value) if isinstance(value, str) else np.asarray(value, DTYPES[kind]).tobytes()
    )
    return _string(key) + _TYPE.pack(kind) + payload


def lay_out(
    keys: Mapping[str, bytes],
    tensors: Iterable[tuple[str, tuple[int, ...], Encoding]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> Layout:
    """A file of encoded keys and of tensors (name, shape outermost first, encoding), in order."""
    infos: list[bytes] = []
    placed: list[GgufTensor] = []
    offset = 0
    for name, shape, encoding in tensors:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise OutputError(
                f"tensor {name}: llama.cpp reads names of {MAX_NAME_BYTES} bytes",
                hint="Give the tensor a shorter name in the architecture's description.",
            )
        size = prod(shape[:-1]) * encoding.row_bytes(shape[-1])
        axes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos.append(
            _string(name) + _TYPE.pack(len(shape)) + axes
            + _TYPE.pack(encoding.ggml_type) + _LENGTH.pack(offset)
        )  # fmt: skip
        placed.append(GgufTensor(name, shape, encoding, offset, size))
        offset += _padded(size, alignment)
    preamble = MAGIC + struct.pack("<IQQ", VERSION, len(placed), len(keys))
    header = b"".join((preamble, *keys.values(), *infos))
    header += bytes(_padded(len(header), alignment) - len(header))
    moved = {
        t.name: GgufTensor(t.name, t.shape, t.encoding, len(header) + t.offset, t.size_bytes)
        for t in placed
    }
    return Layout(header, moved, len(header) + offset)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _scalar_type(value: object) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, float):
        return ValueType.FLOAT32
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return ValueType.UINT32
        return ValueType.INT64 if value < 2**63 else ValueType.UINT64
    raise TypeError(f"{value!r} has no GGUF type")


def _encode_array(values: Sequence[object] | np.ndarray) -> tuple[ValueType, bytes]:
    if isinstance(values, np.ndarray):
        return _element_type(values.dtype), values.tobytes()
    if not values or isinstance(values[0], str):
        pack = _LENGTH.pack
        encoded = [text.encode() for text in map(str, values)]
        return ValueType.STRING, b"".join([p for e in encoded for p in (pack(len(e)), e)])
    first = values[0]
    kind = (
        ValueType.BOOL
        if isinstance(first, bool)
        else ValueType.FLOAT32
        if isinstance(first, float)
        else ValueType.INT32
    )
    return kind, np.array(values, DTYPES[kind]).tobytes()


def _element_type(dtype: np.dtype[np.generic]) -> ValueType:
    for kind, known in DTYPES.items():
        if known == dtype:
            return ValueType(kind)
    raise TypeError(f"{dtype} has no GGUF type")
