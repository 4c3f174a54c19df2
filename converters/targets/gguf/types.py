"""Which type each tensor gets: asked of llama.cpp itself, not copied from it.

``llama_model_quantize`` with ``dry_run`` on a skeleton (a header, and a hole where the data would
be) logs the type of every tensor in milliseconds, for every mixture that this build knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.containers.gguf_header import encode_key, lay_out
from converters.encodings import ENCODINGS, F32, Encoding
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.ggml.library import LogCallback, load_libraries

# llama.h enum llama_ftype, by the names that llama-quantize takes.
FILE_TYPES: Mapping[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "q2_k_s": 21,
    "iq3_xs": 22,
    "iq3_xxs": 23,
    "iq1_s": 24,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq4_xs": 30,
    "iq1_m": 31,
    "bf16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "mxfp4_moe": 38,
    "nvfp4": 39,
    "q1_0": 40,
    "q2_0": 41,
}

_TENSOR_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^]]*\], type = +f32, size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((?P<type>\w+)\))?$",
    re.MULTILINE,
)
_FALLBACK_LINE = re.compile(
    r"warning: (?P<name>\S+) .*required for type +(?P<wanted>\w+)\).*falling back to +(?P<used>\w+)"
)
_NEEDS_IMATRIX = "will require an imatrix"
_FAILURE = re.compile(r"failed to quantize: (?P<reason>.*)")
_log_lock = threading.Lock()  # llama.cpp has one log for the whole process


@dataclass(frozen=True, slots=True)
class Types:
    """What llama.cpp would write for one mixture."""

    name: str
    tensors: Mapping[str, Encoding]  # by GGUF name
    fallbacks: tuple[str, ...]  # tensors whose rows fit no block of the type they should have
    needs_importance_matrix: bool


@contextlib.contextmanager
def skeleton(
    keys: Mapping[str, bytes], tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> Iterator[Skeleton]:
    """A float32 GGUF of these keys and tensors whose data is a hole; removed after use."""
    layout = lay_out(keys, ((name, shape, F32) for name, shape in tensors))
    with tempfile.TemporaryDirectory(prefix="pi-convert-") as folder:
        path = Path(folder) / "skeleton.gguf"
        try:
            path.write_bytes(layout.header)
            os.truncate(path, layout.size_bytes)
        except OSError as error:
            raise EnvironmentNotReadyError(
                f"{folder}: {error.strerror}", hint="Set TMPDIR to a folder with free space."
            ) from error
        yield Skeleton(path, tuple(name for name, _ in tensors))


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model's header to ask llama.cpp about."""

    path: Path
    names: tuple[str, ...]

    def types(self, name: str) -> Types:
        """The type of every tensor for the mixture ``name``, a key of ``FILE_TYPES``.

        Raises ``UnsupportedError`` with llama.cpp's own reason where it cannot be made, and
        ``EnvironmentNotReadyError`` where this build's log is not understood.
        """
        if FILE_TYPES[name] == FILE_TYPES["f32"]:
            return Types(name, dict.fromkeys(self.names, F32), (), False)
        log = _dry_run(self.path, FILE_TYPES[name])
        if failure := _FAILURE.search(log):
            raise UnsupportedError(
                f"{name}: llama.cpp cannot make it for this model: {failure['reason'].strip()}",
                hint="`pi-convert quants` lists the types that it can.",
            )
        found = {m["name"]: _encoding(m["type"]) for m in _TENSOR_LINE.finditer(log)}
        if found.keys() != set(self.names):
            raise EnvironmentNotReadyError(
                f"{name}: llama.cpp's dry run named {len(found)} of {len(self.names)} tensors",
                hint="This build of llama-cpp-python logs in a form that is not known;"
                " install 0.3.36.",
            )
        fallbacks = tuple(
            f"{m['name']}: {m['wanted'].lower()} -> {m['used'].lower()}"
            for m in _FALLBACK_LINE.finditer(log)
        )
        types = {tensor: found[tensor] for tensor in self.names}
        return Types(name, types, fallbacks, _NEEDS_IMATRIX in log)


def _encoding(name: str | None) -> Encoding:
    """The encoding of a type's name in the log; no name: the skeleton's own float32 stays."""
    if name is None:
        return F32
    try:
        return ENCODINGS[name.lower()]
    except KeyError:
        raise UnsupportedError(
            f"llama.cpp chose the type {name}, which is not known",
            hint="`pi-convert quants` lists the types that can be written.",
        ) from None


def _dry_run(path: Path, file_type: int) -> str:
    """The log of ``llama_model_quantize``; nothing is written."""
    llama = load_libraries().llama
    pieces: list[bytes] = []

    def collect(level: int, text: bytes, user_data: int | None) -> None:
        pieces.append(text)

    callback = LogCallback(collect)
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type
    params.dry_run = True
    previous, previous_data = ctypes.c_void_p(), ctypes.c_void_p()
    with _log_lock:
        llama.llama_log_get(ctypes.byref(previous), ctypes.byref(previous_data))
        llama.llama_log_set(ctypes.cast(callback, ctypes.c_void_p), None)
        try:
            llama.llama_model_quantize(
                os.fsencode(path), os.fsencode(path.with_suffix(".unused")), ctypes.byref(params)
            )
        finally:  # `callback` must outlive its registration, or llama.cpp calls freed memory
            llama.llama_log_set(previous, previous_data)
    return b"".join(pieces).decode(errors="replace")


def skeleton_keys(keys: Mapping[str, object]) -> dict[str, bytes]:
    """The encoded keys that a skeleton needs: all but the tokenizer's."""
    return {k: encode_key(k, v) for k, v in keys.items() if not k.startswith("tokenizer.")}
