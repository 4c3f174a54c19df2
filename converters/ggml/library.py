"""The libraries of llama-cpp-python, found without importing it and checked before use.

Only functions of ggml.h and llama.h (llama.cpp 0c1e57098 and later builds of the same layout) are
called; the layout of every struct that is passed is verified when the library is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from converters.errors import EnvironmentNotReadyError
from converters.ggml.alignment import align_arrays

INSTALL_HINT = "Install it: pip install 'llama-cpp-python>=0.3.36,<0.4'"
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
_DEFAULT_FTYPE = 7  # llama_model_quantize_default_params: LLAMA_FTYPE_MOSTLY_Q8_0
_DEFAULT_BUFFER_BYTES = 8 << 30  # LLAMA_QUANT_MAX_BUF_SIZE, the struct's last field
_ROOM_BYTES = 256

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class TypeTraits(ctypes.Structure):
    """ggml.h ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_elements", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


class QuantizeParams(ctypes.Structure):
    """llama.h ``struct llama_model_quantize_params``, with room for a build whose has grown."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
        ("room", ctypes.c_uint8 * _ROOM_BYTES),
    )


@dataclass(frozen=True, slots=True)
class Libraries:
    """libggml-base and libllama of one build."""

    folder: Path
    ggml: ctypes.CDLL
    llama: ctypes.CDLL
    package_version: str  # llama-cpp-python's
    ggml_version: str
    ggml_commit: str


@functools.cache
def load_libraries() -> Libraries:
    """The installed libraries, with the functions that are used declared.

    Raises ``EnvironmentNotReadyError`` where llama-cpp-python is missing or its layout is another.
    """
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EnvironmentNotReadyError("llama-cpp-python is not installed", hint=INSTALL_HINT)
    folder = Path(spec.origin).parent / "lib"
    align_arrays()
    ggml = _load(folder / f"libggml-base.{_SUFFIX}")
    llama = _load(folder / f"libllama.{_SUFFIX}")
    try:
        _declare(ggml, llama)
        version = _text(ggml.ggml_version())
        commit = _text(ggml.ggml_commit())
    except AttributeError as error:
        raise EnvironmentNotReadyError(f"{folder}: {error}", hint=INSTALL_HINT) from error
    _check_quantize_params(llama, folder)
    return Libraries(
        folder, ggml, llama, importlib.metadata.version("llama-cpp-python"), version, commit
    )


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentNotReadyError(
            f"{path.name} of llama-cpp-python cannot be loaded: {error}", hint=INSTALL_HINT
        ) from error


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def _declare(ggml: ctypes.CDLL, llama: ctypes.CDLL) -> None:
    """Argument and result types; ctypes releases the GIL around every call."""
    pointer, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    functions = (
        (ggml.ggml_version, ctypes.c_char_p, ()),
        (ggml.ggml_commit, ctypes.c_char_p, ()),
        (ggml.ggml_get_type_traits, ctypes.POINTER(TypeTraits), (ctypes.c_int,)),
        (ggml.ggml_quantize_requires_imatrix, ctypes.c_bool, (ctypes.c_int,)),
        (ggml.ggml_quantize_chunk, size, (ctypes.c_int, pointer, pointer, i64, i64, i64, pointer)),
        (ggml.ggml_validate_row_data, ctypes.c_bool, (ctypes.c_int, pointer, size)),
        (llama.llama_model_quantize_default_params, QuantizeParams, ()),
        (
            llama.llama_model_quantize,
            ctypes.c_uint32,
            (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)),
        ),
        (llama.llama_log_set, None, (pointer, pointer)),
        (llama.llama_log_get, None, (ctypes.POINTER(pointer), ctypes.POINTER(pointer))),
        (llama.llama_print_system_info, ctypes.c_char_p, ()),
        (llama.llama_supports_gpu_offload, ctypes.c_bool, ()),
    )
    for function, result, arguments in functions:
        function.restype = result
        function.argtypes = arguments


def _check_quantize_params(llama: ctypes.CDLL, folder: Path) -> None:
    params = llama.llama_model_quantize_default_params()
    known = (
        params.ftype == _DEFAULT_FTYPE
        and params.quantize_output_tensor
        and not params.dry_run
        and params.max_buf_size == _DEFAULT_BUFFER_BYTES
    )
    if not known:
        raise EnvironmentNotReadyError(
            f"{folder}: llama_model_quantize_params has another layout than llama-cpp-python"
            " 0.3.36's",
            hint=INSTALL_HINT,
        )
