"""The safetensors container: its header parsed strictly, tensor bytes on demand; and its header
as bytes for a writer.

Format: https://github.com/huggingface/safetensors, "Format": eight bytes of little-endian header
length, a JSON header, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Never

import numpy as np
import numpy.typing as npt

from converters.containers.open_file import OpenFile
from converters.containers.strict_json import parse_json_object
from converters.encodings import BF16, F16, F32, Encoding
from converters.errors import SourceError, UnsupportedError
from converters.tensor import RowReader, Tensor

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

ENCODING_OF_DTYPE: Mapping[str, Encoding] = {"F32": F32, "F16": F16, "BF16": BF16}
DTYPE_OF_ENCODING: Mapping[str, str] = {e.name: d for d, e in ENCODING_OF_DTYPE.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data
    end: int


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; only the header is read, rows when they are asked for.

    Raises ``SourceError`` naming what is wrong where the file is truncated or its header is
    damaged, and ``UnsupportedError`` listing the tensors of a type other than F32, F16 and BF16.
    """
    file = OpenFile(path)
    header_bytes = _header_bytes(file)
    header = parse_json_object(file.read(_LENGTH_BYTES, header_bytes).tobytes(), f"{path}: header")
    _check_metadata(header.pop(_METADATA, {}), path)
    entries = [_parse_entry(name, value, path) for name, value in header.items()]
    data_offset = _LENGTH_BYTES + header_bytes
    _check_layout(entries, file.size_bytes - data_offset, path)
    _check_types(entries, path)
    return {entry.name: _tensor(entry, file, data_offset) for entry in entries}


def safetensors_header(tensors: Iterable[tuple[str, Encoding, tuple[int, ...]]]) -> bytes:
    """The length and the header of a file that holds ``tensors`` in this order, 8-byte aligned.

    ``{"format": "pt"}`` is what transformers asks for. Encodings are f32, f16 and bf16.
    """
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    position = 0
    for name, encoding, shape in tensors:
        size = prod(shape) * encoding.block_bytes
        header[name] = {
            "dtype": DTYPE_OF_ENCODING[encoding.name],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _header_bytes(file: OpenFile) -> int:
    if file.size_bytes < _LENGTH_BYTES:
        _fail(file.path, f"{file.size_bytes} bytes are no safetensors file")
    length = int.from_bytes(file.read(0, _LENGTH_BYTES).tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, file.size_bytes - _LENGTH_BYTES):
        _fail(
            file.path,
            f"a header of {length} bytes is announced in a file of {file.size_bytes}"
            f" (at most {MAX_HEADER_BYTES} are allowed)",
        )
    return length


def _check_metadata(value: object, path: Path) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _fail(path, f"{_METADATA} is {value!r:.100}, expected strings by name")


def _parse_entry(name: str, value: object, path: Path) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor {name}: expected dtype, shape and data_offsets, found {value!r:.100}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        _fail(path, f"tensor {name}: dtype is {dtype!r:.100}")
    if not _are_sizes(shape):
        _fail(path, f"tensor {name}: shape is {shape!r:.100}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"tensor {name}: data_offsets are {offsets!r:.100}")
    return _Entry(name, dtype, tuple(shape), *offsets)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(entries: list[_Entry], data_bytes: int, path: Path) -> None:
    """The tensors fill the data without holes and overlaps, and each as its type and shape say."""
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    if ordered and ordered[0].begin != 0:
        _fail(
            path, f"tensor {ordered[0].name} starts at byte {ordered[0].begin} of the data, not 0"
        )
    for before, after in pairwise(ordered):
        if after.begin != before.end:
            what = "overlaps" if after.begin < before.end else "leaves a hole after"
            _fail(path, f"tensor {after.name} {what} {before.name}")
    end = ordered[-1].end if ordered else 0
    if end != data_bytes:
        _fail(path, f"the header announces {end} bytes of tensors, the file has {data_bytes}")
    for entry in entries:
        encoding = ENCODING_OF_DTYPE.get(entry.dtype)
        if encoding and prod(entry.shape) * encoding.block_bytes != entry.end - entry.begin:
            _fail(
                path,
                f"tensor {entry.name}: {entry.dtype} {list(entry.shape)} does not take"
                f" {entry.end - entry.begin} bytes",
            )


def _check_types(entries: list[_Entry], path: Path) -> None:
    others = [entry for entry in entries if entry.dtype not in ENCODING_OF_DTYPE]
    if others:
        listed = ", ".join(f"{entry.name} {entry.dtype}" for entry in others[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise UnsupportedError(
            f"{path}: tensors of other types: {listed}{more}",
            hint=f"Supported are {', '.join(ENCODING_OF_DTYPE)}.",
        )


def _tensor(entry: _Entry, file: OpenFile, data_offset: int) -> Tensor:
    encoding = ENCODING_OF_DTYPE[entry.dtype]
    shape = entry.shape or (1,)  # a scalar is a row of one
    row_bytes = encoding.row_bytes(shape[-1])
    return Tensor(entry.name, shape, encoding, _reader(file, data_offset + entry.begin, row_bytes))


def _reader(file: OpenFile, offset: int, row_bytes: int) -> RowReader:
    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        data = file.read(offset + start * row_bytes, (stop - start) * row_bytes)
        return data.reshape(stop - start, row_bytes)

    return read


def _fail(path: Path, problem: str) -> Never:
    raise SourceError(
        f"{path}: {problem}", hint="The file is damaged or incomplete; fetch it again."
    )
