"""A finished file read again by other code than wrote it: ggml's own parser, which llama.cpp uses.

gguf-py's reader says the same in our tests; here it would take seconds for a large vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.gguf import GgufTensor, ValueType
from converters.encodings import F32
from converters.errors import OutputError
from converters.rope.gguf import DIVISORS_TENSOR, effective_rope
from converters.rope.parameters import FloatArray, ulp_distance
from converters.targets.gguf.library import load_libraries

# float32 division and multiplication round once each.
MAX_ULP = 2

_SCALARS: Mapping[int, tuple[str, type[ctypes._SimpleCData]]] = {  # type: ignore[type-arg]
    ValueType.UINT32: ("u32", ctypes.c_uint32),
    ValueType.INT32: ("i32", ctypes.c_int32),
    ValueType.FLOAT32: ("f32", ctypes.c_float),
    ValueType.BOOL: ("bool", ctypes.c_bool),
    ValueType.STRING: ("str", ctypes.c_char_p),
}


class _InitParams(ctypes.Structure):
    """gguf.h ``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def check_file(path: Path, checkpoint: Checkpoint, tensors: Mapping[str, GgufTensor]) -> None:
    """Raises ``OutputError`` unless ggml finds every tensor in its place and the right RoPE."""
    with _opened(path) as context:
        ggml = load_libraries().ggml
        _check_tensors(ggml, context, tensors, path)
        prefix = checkpoint.architecture.gguf_name
        keys = _scoped_keys(ggml, context, prefix)
    effective = effective_rope(
        keys,
        _divisors(path, tensors.get(DIVISORS_TENSOR)),
        rotary_dim=checkpoint.hparams.head_dim,
        where=str(path),
    )
    expected = checkpoint.rope.inv_freq()
    found = effective.inv_freq()
    distance = ulp_distance(expected, found) if expected.shape == found.shape else None
    if distance is None or distance > MAX_ULP:
        raise OutputError(
            f"{path.name}: the file read back rotates by other frequencies than the checkpoint"
            f" ({distance} ulp apart)",
            hint="This is a bug in pi-convert; the file was removed.",
        )
    contexts = (checkpoint.rope.context, checkpoint.rope.original_context)
    if (effective.context, effective.original_context) != contexts:
        raise OutputError(
            f"{path.name}: the file read back has contexts {effective.context} and"
            f" {effective.original_context}, expected {contexts[0]} and {contexts[1]}",
            hint="This is a bug in pi-convert; the file was removed.",
        )


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
        raise OutputError(f"{path.name}: ggml cannot read the file that was written")
    try:
        yield ctypes.c_void_p(context)
    finally:
        ggml.gguf_free(context)


def _check_tensors(
    ggml: ctypes.CDLL, context: ctypes.c_void_p, tensors: Mapping[str, GgufTensor], path: Path
) -> None:
    start = ggml.gguf_get_data_offset(context)
    found = [
        (
            ggml.gguf_get_tensor_name(context, i).decode(),
            ggml.gguf_get_tensor_type(context, i),
            start + ggml.gguf_get_tensor_offset(context, i),
            ggml.gguf_get_tensor_size(context, i),
        )
        for i in range(ggml.gguf_get_n_tensors(context))
    ]
    expected = [(t.name, t.encoding.ggml_type, t.offset, t.size_bytes) for t in tensors.values()]
    if found != expected:
        raise OutputError(f"{path.name}: ggml finds other tensors than were written")


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


def _divisors(path: Path, tensor: GgufTensor | None) -> FloatArray | None:
    if tensor is None:
        return None
    if tensor.encoding is not F32:
        raise OutputError(f"{path.name}: {DIVISORS_TENSOR} is {tensor.encoding.name}, not f32")
    return np.fromfile(path, "<f4", tensor.shape[0], offset=tensor.offset)
