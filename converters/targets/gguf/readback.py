"""A finished file read again by other code than wrote it: gguf-py, and ggml's own parser.

Two readers, because each sees what the other lets pass: gguf-py is what other tools read with,
ggml's parser is the one that llama.cpp loads with. Both have to find every tensor in its place and
the checkpoint's RoPE.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.gguf import DTYPES, GgufTensor, ValueType
from converters.encodings import F32
from converters.errors import OutputError
from converters.ggml.library import load_libraries
from converters.rope.gguf import DIVISORS_TENSOR, effective_rope
from converters.rope.parameters import FloatArray, ulp_distance

# float32 division and multiplication round once each.
MAX_ULP = 2

_SCALARS: Mapping[int, tuple[str, type[ctypes._SimpleCData]]] = {  # type: ignore[type-arg]
    ValueType.UINT32: ("u32", ctypes.c_uint32),
    ValueType.INT32: ("i32", ctypes.c_int32),
    ValueType.FLOAT32: ("f32", ctypes.c_float),
    ValueType.BOOL: ("bool", ctypes.c_bool),
    ValueType.STRING: ("str", ctypes.c_char_p),
}


# Longer arrays are vocabularies: gguf-py would take 2 s to make its objects for 50,000 tokens.
_LONG_ARRAY = 1024

_Place = tuple[str, int, int, int]  # a tensor's name, ggml type, offset in the file, bytes


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one reader finds in a file."""

    reader: str
    keys: Mapping[str, object]  # scalars of the architecture, without its prefix
    tensors: list[_Place] | None  # None: it does not know a type of theirs


class _InitParams(ctypes.Structure):
    """gguf.h ``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def check_file(path: Path, checkpoint: Checkpoint, tensors: Mapping[str, GgufTensor]) -> None:
    """Raises ``OutputError`` unless both readers find every tensor in its place and the RoPE."""
    written = [(t.name, t.encoding.ggml_type, t.offset, t.size_bytes) for t in tensors.values()]
    prefix = checkpoint.architecture.gguf_name
    for seen in (_read_with_ggml(path, prefix), _read_with_gguf_py(path, prefix)):
        if seen.tensors not in (written, None):
            raise _bug(path, f"{seen.reader} finds other tensors than were written")
        _check_rope(path, checkpoint, seen, tensors.get(DIVISORS_TENSOR))


def _check_rope(
    path: Path, checkpoint: Checkpoint, seen: _Seen, divisors: GgufTensor | None
) -> None:
    effective = effective_rope(
        seen.keys,
        _divisors(path, divisors),
        rotary_dim=checkpoint.hparams.head_dim,
        where=str(path),
    )
    expected, found = checkpoint.rope.inv_freq(), effective.inv_freq()
    distance = ulp_distance(expected, found) if expected.shape == found.shape else None
    if distance is None or distance > MAX_ULP:
        raise _bug(
            path,
            f"{seen.reader} reads other frequencies than the checkpoint's ({distance} ulp apart)",
        )
    contexts = (checkpoint.rope.context, checkpoint.rope.original_context)
    if (effective.context, effective.original_context) != contexts:
        raise _bug(
            path,
            f"{seen.reader} reads the contexts {effective.context} and"
            f" {effective.original_context}, expected {contexts[0]} and {contexts[1]}",
        )


def _bug(path: Path, found: str) -> OutputError:
    return OutputError(
        f"{path.name}: {found}", hint="This is a bug in pi-convert; the file was removed."
    )


def _read_with_ggml(path: Path, prefix: str) -> _Seen:
    with _opened(path) as context:
        ggml = load_libraries().ggml
        start = ggml.gguf_get_data_offset(context)
        tensors = [
            (
                ggml.gguf_get_tensor_name(context, i).decode(),
                ggml.gguf_get_tensor_type(context, i),
                start + ggml.gguf_get_tensor_offset(context, i),
                ggml.gguf_get_tensor_size(context, i),
            )
            for i in range(ggml.gguf_get_n_tensors(context))
        ]
        return _Seen("ggml", _scoped_keys(ggml, context, prefix), tensors)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ctypes.c_void_p]:
    ggml = load_libraries().ggml
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "gguf_init_from_file": (pointer, (ctypes.c_char_p, _InitParams)),
        "gguf_free": (None, (pointer,)),
        "gguf_get_n_kv": (i64, (pointer,)),
        "gguf_get_key": (ctypes.c_char_p, (pointer, i64)),
        "gguf_get_kv_type": (ctypes.c_int, (pointer, i64)),
        "gguf_get_n_tensors": (i64, (pointer,)),
        "gguf_get_data_offset": (ctypes.c_size_t, (pointer,)),
        "gguf_get_tensor_name": (ctypes.c_char_p, (pointer, i64)),
        "gguf_get_tensor_type": (ctypes.c_int, (pointer, i64)),
        "gguf_get_tensor_offset": (ctypes.c_size_t, (pointer, i64)),
        "gguf_get_tensor_size": (ctypes.c_size_t, (pointer, i64)),
        **{f"gguf_get_val_{n}": (kind, (pointer, i64)) for n, kind in _SCALARS.values()},
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    context = ggml.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if not context:
        raise _bug(path, "ggml cannot read the file that was written")
    try:
        yield ctypes.c_void_p(context)
    finally:
        ggml.gguf_free(context)


def _scoped_keys(ggml: ctypes.CDLL, context: ctypes.c_void_p, prefix: str) -> dict[str, object]:
    keys: dict[str, object] = {}
    for i in range(ggml.gguf_get_n_kv(context)):
        key = ggml.gguf_get_key(context, i).decode()
        kind = ggml.gguf_get_kv_type(context, i)
        if key.startswith(f"{prefix}.") and kind in _SCALARS:
            value = getattr(ggml, f"gguf_get_val_{_SCALARS[kind][0]}")(context, i)
            text = value.decode() if isinstance(value, bytes) else value
            keys[key.removeprefix(f"{prefix}.")] = text
    return keys


def _read_with_gguf_py(path: Path, prefix: str) -> _Seen:
    try:
        reader = _short_reader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise _bug(path, f"gguf-py cannot read the file that was written: {error}") from error
    keys = {
        name.removeprefix(f"{prefix}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{prefix}.") and len(field.types) == 1
    }
    tensors = [
        (t.name, int(t.tensor_type), int(t.data_offset), int(t.n_bytes)) for t in reader.tensors
    ]
    return _Seen("gguf-py", keys, tensors if reader.knows_types else None)


def _short_reader(path: Path) -> Any:
    """gguf-py's reader, stepping over long arrays; see ``GGUFReader`` of gguf 0.19.

    libggml has types that gguf-py has not (q2_0 today): there it reads the keys only.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

    known = set(map(int, GGMLQuantizationType))

    class ShortReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
        knows_types = True

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
                count = int(self._get(orig_offs + 4, np.uint64)[0])
                if count > _LONG_ARRAY:
                    size = 12 + _array_bytes(self.data, orig_offs + 12, item, count)
                    return size, [], [], [GGUFValueType.ARRAY, item]
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            self.knows_types = all(int(field.parts[4][0]) in known for field in fields)
            super()._build_tensors(start_offs, fields if self.knows_types else [])

    return ShortReader(path)


def _array_bytes(data: Any, start: int, item: int, count: int) -> int:
    if item != ValueType.STRING:
        return count * DTYPES[item].itemsize
    length, at = struct.Struct("<Q").unpack_from, start
    view = memoryview(data)
    for _ in range(count):
        at += 8 + length(view, at)[0]
    return at - start


def _divisors(path: Path, tensor: GgufTensor | None) -> FloatArray | None:
    if tensor is None:
        return None
    if tensor.encoding is not F32:
        raise _bug(path, f"{DIVISORS_TENSOR} is {tensor.encoding.name}, not f32")
    return np.fromfile(path, "<f4", tensor.shape[0], offset=tensor.offset)
