"""A GGUF with other keys: a new header, every other byte as it was.

Keys that do not change keep their bytes, type and order; tensor infos and data are copied. The copy
is read back and every tensor's hash compared before it gets its name.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.containers.gguf import (
    ALIGNMENT_KEY,
    DTYPES,
    GgufFile,
    ValueType,
    read_gguf_file,
)
from converters.containers.gguf_header import encode_key
from converters.content_hash import tensor_hash
from converters.errors import OutputError, SourceError, shown
from converters.files import atomic_file, require_free_space
from converters.progress import Progress, silent

KeyValue = str | int | float | bool

_PREAMBLE_BYTES = 24  # magic, version, number of tensors, number of keys
_KEY_COUNT_OFFSET = 16
_COPY_BYTES = 64 << 20
_BUG = "This is a bug in pi-convert; nothing was written."
# What copy_file_range gives where the file systems cannot do it; then bytes are read and written.
_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
)


@dataclass(frozen=True, slots=True)
class KeyChange:
    """One key's value before and after; None where there is none."""

    key: str
    before: object
    after: KeyValue | None


@dataclass(frozen=True, slots=True)
class RewrittenGguf:
    """What was written. ``tensor_hashes`` are SHA-256, equal in both files."""

    path: Path
    size_bytes: int
    changes: tuple[KeyChange, ...]
    tensor_hashes: Mapping[str, str]


def rewrite_gguf(
    source: GgufFile,
    out: Path,
    changes: Mapping[str, KeyValue | None],
    *,
    force: bool = False,
    progress: Progress = silent,
) -> RewrittenGguf:
    """Writes ``source`` to ``out`` with ``changes`` made; a value of None removes its key.

    A changed key keeps its place; a new one follows the last key of the architecture. Values are
    stored as llama.cpp's converter stores them: whole numbers as uint32, fractions as float32.
    Raises ``OutputError`` where ``out`` is the source or exists without ``force``, and where what
    was written differs from what was meant; nothing is left behind then.
    """
    _check_request(source, out, changes)
    header = _new_header(source, changes)
    with atomic_file(out, force=force) as partial:
        size_bytes = len(header) + source.size_bytes - source.data_offset
        require_free_space(partial.parent, size_bytes)
        with source.path.open("rb") as data, partial.open("wb") as file:
            file.write(header)
            file.flush()
            _copy(data.fileno(), file.fileno(), source, progress)
        hashes = _compare(source, partial, changes, progress)
    return RewrittenGguf(
        out,
        size_bytes,
        tuple(
            KeyChange(key, source.keys.get(key), value)
            for key, value in changes.items()
            if _differs(source, key, value)
        ),
        hashes,
    )


def _check_request(source: GgufFile, out: Path, changes: Mapping[str, KeyValue | None]) -> None:
    if ALIGNMENT_KEY in changes:
        raise ValueError(f"{ALIGNMENT_KEY} places the data and cannot be changed here")
    if out.exists() and out.samefile(source.path):
        raise OutputError(f"{out} is the file to repair", hint="Give another name to --out.")


def _new_header(source: GgufFile, changes: Mapping[str, KeyValue | None]) -> bytes:
    """The header up to the data, padded to the alignment."""
    with source.path.open("rb") as file:
        raw = file.read(source.data_offset)
    records: list[tuple[str, bytes]] = []
    position = _PREAMBLE_BYTES
    for key, start, stop in _key_spans(raw, source):
        value = changes.get(key)
        if value is not None:
            records.append((key, _record(key, value)))
        elif key not in changes:
            records.append((key, raw[start:stop]))
        position = stop
    place = _place_of_new(records, source)
    records[place:place] = [
        (key, _record(key, value))
        for key, value in changes.items()
        if value is not None and key not in source.keys
    ]
    header = raw[:_KEY_COUNT_OFFSET] + struct.pack("<Q", len(records))
    header += b"".join(record for _, record in records)
    header += raw[position : _end_of_infos(raw, position, len(source.tensors))]
    return header + bytes(-len(header) % source.alignment)


def _place_of_new(records: list[tuple[str, bytes]], source: GgufFile) -> int:
    """After the architecture's last key, else at the end."""
    prefix = f"{source.architecture}."
    own = [index for index, (key, _) in enumerate(records) if key.startswith(prefix)]
    return own[-1] + 1 if own else len(records)


def _key_spans(raw: bytes, source: GgufFile) -> Iterator[tuple[str, int, int]]:
    """(key, start, stop) of every key's bytes; the header has been parsed strictly before."""
    position = _PREAMBLE_BYTES
    for key, kind in source.key_types.items():
        start = position
        position = _after_string(raw, position) + 4
        if kind == ValueType.STRING:
            position = _after_string(raw, position)
        elif kind == ValueType.ARRAY:
            element, count = struct.unpack_from("<IQ", raw, position)
            position += 12
            if element == ValueType.STRING:
                for _ in range(count):
                    position = _after_string(raw, position)
            else:
                position += count * DTYPES[element].itemsize
        else:
            position += DTYPES[kind].itemsize
        yield key, start, position


def _after_string(raw: bytes, position: int) -> int:
    length: int = struct.unpack_from("<Q", raw, position)[0]
    return position + 8 + length


def _end_of_infos(raw: bytes, position: int, tensors: int) -> int:
    for _ in range(tensors):
        position = _after_string(raw, position)
        axes = struct.unpack_from("<I", raw, position)[0]
        position += 4 + 8 * axes + 4 + 8
    return position


def _record(key: str, value: KeyValue) -> bytes:
    """A key as stored; llama.cpp reads no whole number of another width than 32 bits."""
    if not isinstance(value, bool) and isinstance(value, int) and not 0 <= value < 2**32:
        raise OutputError(
            f"{key} = {value} does not fit the 32 bits that llama.cpp reads",
            hint="Give a smaller scale or --original-context.",
        )
    return encode_key(key, value)


def _copy(reader: int, writer: int, source: GgufFile, progress: Progress) -> None:
    """The data section, from ``data_offset`` to the end, by the kernel where it can."""
    total = source.size_bytes - source.data_offset
    os.lseek(reader, source.data_offset, os.SEEK_SET)
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < total:
        want = min(_COPY_BYTES, total - done)
        if in_kernel:
            try:
                count = os.copy_file_range(reader, writer, want)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
        else:
            count = _write_all(writer, os.read(reader, want))
        if count == 0:
            raise SourceError(
                f"{source.path}: {total - done} bytes are missing at the end",
                hint="The file became shorter while it was read.",
            )
        done += count
        progress("copy", done, total)


def _write_all(writer: int, data: bytes) -> int:
    left = memoryview(data)
    while left:
        left = left[os.write(writer, left) :]
    return len(data)


def _compare(
    source: GgufFile, partial: Path, changes: Mapping[str, KeyValue | None], progress: Progress
) -> dict[str, str]:
    """Every tensor's hash, after both files were found to differ in ``changes`` only."""
    written = read_gguf_file(partial)
    expected = {key: value for key, value in source.keys.items() if key not in changes}
    expected |= {key: _stored(value) for key, value in changes.items() if value is not None}
    if written.keys.keys() != expected.keys():
        raise OutputError("the keys that were written are not those that were meant", hint=_BUG)
    for key, value in expected.items():
        retyped = key not in changes and written.key_types[key] != source.key_types[key]
        if retyped or not _same_bits(written.keys[key], value):
            raise OutputError(
                f"{key} reads back as {shown(written.keys[key])}, not {shown(value)}", hint=_BUG
            )
    if list(written.tensors) != list(source.tensors):
        raise OutputError("the tensors that were written are not the source's", hint=_BUG)
    return _compare_tensors(source, written, progress)


def _compare_tensors(source: GgufFile, written: GgufFile, progress: Progress) -> dict[str, str]:
    hashes: dict[str, str] = {}
    done, total = 0, sum(tensor.size_bytes for tensor in source.tensors.values())
    with ThreadPoolExecutor(2) as pool:
        for name, tensor in source.tensors.items():
            other = written.tensors[name]
            first = pool.submit(tensor_hash, source.tensor(name))
            second = pool.submit(tensor_hash, written.tensor(name))
            hashes[name] = first.result()
            same = (other.shape, other.encoding) == (tensor.shape, tensor.encoding)
            if not same or hashes[name] != second.result():
                raise OutputError(
                    f"tensor {name} differs from the source's after the copy",
                    hint="Was the source being written to? Try again.",
                )
            done += tensor.size_bytes
            progress("compare", done, total)
    return hashes


def _stored(value: KeyValue) -> KeyValue:
    """The value as float32 holds it, where it is stored as that."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _differs(source: GgufFile, key: str, value: KeyValue | None) -> bool:
    if value is None:
        return key in source.keys
    return key not in source.keys or not _same_bits(source.keys[key], _stored(value))


def _same_bits(found: object, expected: object) -> bool:
    """Equality of two values as stored, where NaN is itself."""
    if isinstance(found, list) or isinstance(expected, list):
        return found == expected
    first, second = np.asarray(found), np.asarray(expected)
    return (first.dtype, first.shape) == (second.dtype, second.shape) and (
        first.tobytes() == second.tobytes()
    )
