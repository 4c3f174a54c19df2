"""The GGUF container: header, keys and tensor infos, parsed strictly; tensor bytes on demand.

Format: ggml's ``docs/gguf.md``, versions 2 and 3, little endian. Every count, length and offset is
checked against the file before it is believed, so a bad file is an error and never a large
allocation.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Never

import numpy as np
import numpy.typing as npt

from converters.containers.open_file import OpenFile
from converters.encodings import Encoding, encoding_of_ggml_type
from converters.errors import SourceError, UnsupportedError, shown
from converters.tensor import RowReader, Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
ARCHITECTURE_KEY = "general.architecture"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

# A vocabulary of 256,000 tokens with merges takes 12 MiB; beyond this a count is lying.
MAX_HEADER_BYTES = 256 << 20
_FIRST_READ_BYTES = 1 << 20
_MIN_KEY_BYTES = 8 + 4 + 1  # name length, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, axes, one axis, type, offset


class ValueType(IntEnum):
    """The type numbers of GGUF values (``enum gguf_type``)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Mapping[int, np.dtype[np.generic]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: ``offset`` from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]  # outermost axis first; the file counts the other way round
    encoding: Encoding
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF. Keys and tensors are in the file's order; the file stays open while in use.

    String arrays are lists, numeric and bool arrays numpy arrays. ``key_types`` holds the
    ``ValueType`` number of each key.
    """

    path: Path
    version: int
    alignment: int
    data_offset: int
    size_bytes: int
    keys: Mapping[str, object]
    key_types: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]
    _file: OpenFile = field(repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """``general.architecture``; ``SourceError`` where it is missing or not a string."""
        value = self.keys.get(ARCHITECTURE_KEY)
        if not isinstance(value, str) or not value:
            raise SourceError(
                f"{self.path}: {ARCHITECTURE_KEY} is {shown(value)}",
                hint="llama.cpp cannot load it.",
            )
        return value

    def scoped_keys(self) -> dict[str, object]:
        """The architecture's own keys, without their prefix."""
        prefix = f"{self.architecture}."
        return {k.removeprefix(prefix): v for k, v in self.keys.items() if k.startswith(prefix)}

    def tensor(self, name: str) -> Tensor:
        """A tensor whose rows are read when asked for; ``KeyError`` for an unknown name."""
        info = self.tensors[name]
        return Tensor(name, info.shape, info.encoding, _row_reader(self._file, info))


def read_gguf_file(path: Path) -> GgufFile:
    """The header of a GGUF file; no tensor is read.

    Raises ``SourceError`` naming what is wrong where the file is truncated, lies about a size or
    repeats a name, and ``UnsupportedError`` for version 1, big endian and unknown tensor types.
    """
    file = OpenFile(path)
    header = _Header(file)
    version, tensor_count, key_count = _read_preamble(header)
    keys: dict[str, object] = {}
    key_types: dict[str, int] = {}
    header.expect_count(key_count, _MIN_KEY_BYTES, "keys")
    for _ in range(key_count):
        key = header.string("a key's name")
        if not key or key in keys:
            header.fail(f"key {shown(key)} {'is repeated' if key else 'has no name'}")
        key_types[key] = header.scalar("<I", f"the type of {key}")
        keys[key] = header.value(key_types[key], key)
    alignment = _alignment(keys, key_types, header)
    header.expect_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
    infos = [_read_tensor_info(header) for _ in range(tensor_count)]
    data_offset = -(-header.position // alignment) * alignment
    tensors = _place_tensors(infos, data_offset, alignment, header)
    return GgufFile(
        path, version, alignment, data_offset, file.size_bytes, keys, key_types, tensors, file
    )


def _row_reader(file: OpenFile, info: GgufTensor) -> RowReader:
    row_bytes = info.encoding.row_bytes(info.shape[-1])

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        data = file.read(info.offset + start * row_bytes, (stop - start) * row_bytes)
        return data.reshape(stop - start, row_bytes)

    return read


class _Header:
    """A cursor over the header; bytes are read as far as they are needed, file end included."""

    def __init__(self, file: OpenFile) -> None:
        self.path = file.path
        self.file_bytes = file.size_bytes
        self.position = 0
        self._file = file
        self._data = b""

    def fail(self, problem: str) -> Never:
        raise SourceError(
            f"{self.path}: {problem} (header, byte {self.position})",
            hint="The file is damaged or not a whole GGUF; fetch it again.",
        )

    def expect_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count whose items cannot fit into the rest of the file."""
        remaining = min(self.file_bytes, MAX_HEADER_BYTES) - self.position
        if count * least_bytes > remaining:
            self.fail(f"{count} {what} are announced and {remaining} bytes are left")

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        start = self.position
        data = self._filled(start + size, what)
        self.position = start + size
        return data[start : self.position]

    def scalar(self, layout: str, what: str) -> int:
        """One number of a ``struct`` layout."""
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def string(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        return self._strings(1, what)[0]

    def value(self, kind: int, key: str) -> object:
        """A value of a ``ValueType`` number."""
        if kind == ValueType.STRING:
            return self.string(key)
        if kind == ValueType.ARRAY:
            element = self.scalar("<I", f"the element type of {key}")
            count = self.scalar("<Q", f"the length of {key}")
            if element == ValueType.STRING:
                self.expect_count(count, 8, f"strings of {key}")
                return self._strings(count, key)
            return self._numbers(element, count, key)
        return self._numbers(kind, 1, key)[0].item()

    def _numbers(self, kind: int, count: int, key: str) -> npt.NDArray[np.generic]:
        dtype = DTYPES.get(kind)
        if dtype is None:
            self.fail(f"{key} has values of unknown type {kind}")
        self.expect_count(count, dtype.itemsize, f"values of {key}")
        raw = self.take(count * dtype.itemsize, key)
        if kind == ValueType.BOOL and raw.strip(b"\0\1"):
            self.fail(f"{key} has a bool that is neither 0 nor 1")
        return np.frombuffer(raw, dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        # The hot loop: a vocabulary and its merges are 100,000 strings and more.
        data, position = self._data, self.position
        unpack = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = position + 8
                if start > len(data):
                    data = self._filled(start, what)
                position = start + unpack(data, position)[0]
                if position > len(data):
                    data = self._filled(position, what)
                append(data[start:position].decode())
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")
        self.position = position
        return strings

    def _filled(self, stop: int, what: str) -> bytes:
        """The header's bytes, at least ``stop`` of them."""
        if stop > len(self._data):
            limit = min(self.file_bytes, MAX_HEADER_BYTES)
            if stop > limit:
                self.fail(f"{what} reaches to byte {stop} of {limit}")
            size = min(limit, max(stop, 2 * len(self._data), _FIRST_READ_BYTES))
            more = self._file.read(len(self._data), size - len(self._data))
            self._data += more.tobytes()
        return self._data


def _read_preamble(header: _Header) -> tuple[int, int, int]:
    """(version, number of tensors, number of keys)."""
    magic = header.take(4, "the magic number")
    if magic != MAGIC:
        header.fail(f"starts with {magic!r}, a GGUF with {MAGIC!r}")
    raw = header.take(4, "the version")
    version = int.from_bytes(raw, "little")
    if version not in VERSIONS:
        swapped = int.from_bytes(raw, "big") in VERSIONS
        what = "a big-endian GGUF" if swapped else f"GGUF version {version}"
        path = header.path
        raise UnsupportedError(
            f"{path}: {what}", hint="Supported are versions 2 and 3, little endian."
        )
    return version, header.scalar("<Q", "the tensor count"), header.scalar("<Q", "the key count")


def _alignment(keys: Mapping[str, object], key_types: Mapping[str, int], header: _Header) -> int:
    value = keys.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    stated_type = key_types.get(ALIGNMENT_KEY, ValueType.UINT32)
    if stated_type != ValueType.UINT32 or not isinstance(value, int):
        header.fail(f"{ALIGNMENT_KEY} is {shown(value)}, expected an unsigned 32-bit number")
    if value == 0 or value & (value - 1):
        header.fail(f"{ALIGNMENT_KEY} is {value}, expected a power of two")
    return value


def _read_tensor_info(header: _Header) -> GgufTensor:
    """A tensor info; its offset still counts from the start of the data."""
    name = header.string("a tensor's name")
    axes = header.scalar("<I", f"the number of axes of {name}")
    if not 1 <= axes <= MAX_DIMENSIONS:
        header.fail(f"tensor {shown(name)} has {axes} axes, expected 1 to {MAX_DIMENSIONS}")
    shape = struct.unpack(f"<{axes}Q", header.take(8 * axes, f"the shape of {name}"))[::-1]
    ggml_type = header.scalar("<I", f"the type of {name}")
    offset = header.scalar("<Q", f"the offset of {name}")
    if not name or 0 in shape:
        header.fail(f"tensor {shown(name)} of shape {list(shape)}")
    try:
        encoding = encoding_of_ggml_type(ggml_type)
        size_bytes = prod(shape[:-1]) * encoding.row_bytes(shape[-1])
    except UnsupportedError as error:
        path = header.path
        raise UnsupportedError(f"{path}: tensor {name}: {error.message}", hint=error.hint) from None
    return GgufTensor(name, shape, encoding, offset, size_bytes)


def _place_tensors(
    infos: list[GgufTensor], data_offset: int, alignment: int, header: _Header
) -> dict[str, GgufTensor]:
    """The tensors with offsets from the start of the file, each inside it and apart from others."""
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        if info.name in tensors:
            header.fail(f"tensor {info.name} is repeated")
        if info.offset % alignment:
            header.fail(f"tensor {info.name}: offset {info.offset} is no multiple of {alignment}")
        tensors[info.name] = GgufTensor(
            info.name, info.shape, info.encoding, data_offset + info.offset, info.size_bytes
        )
    end, previous = data_offset, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            header.fail(f"tensor {tensor.name} overlaps {previous}")
        end, previous = tensor.offset + tensor.size_bytes, tensor.name
    if tensors and end > header.file_bytes:
        header.fail(f"tensor {previous} ends at byte {end} of a file of {header.file_bytes} bytes")
    return tensors
