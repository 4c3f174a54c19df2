"""llama.cpp through llama-cpp-python's low-level API.

llama.cpp aborts the process on some malformed files (an unknown ``rope.scaling.type`` is one), so
a file is read with ``converters.containers.gguf`` before it comes here.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters.errors import ConvertError, EnvironmentNotReadyError, SourceError
from converters.ggml.alignment import align_arrays
from converters.rope import RopeParameters
from converters.rope import gguf as rope_keys
from pi_convert.runtimes.base import CHUNK_TOKENS, Closing, Logits, Tokens

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # enum ggml_type
_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # enum llama_flash_attn_type
_STRING_OVERRIDE, _FLOAT_OVERRIDE = 3, 1  # enum llama_model_kv_override_type
_ALL_LAYERS = 999
_LOG_LINES = 40
_CHECK_HINT = "`pi-convert check` tells what is wrong with the file."
_ERROR_LEVEL = 4  # enum ggml_log_level
_CONTINUED_LEVEL = 5
_CHILD_SECONDS = 600  # to read every weight once: 60 GB from a disk of 100 MB/s
_CHILD_REFUSED, _CHILD_NOT_READY = 3, 4  # exit codes; 1 is Python's own


@dataclass(frozen=True, slots=True)
class LlamaCppOptions:
    """How llama.cpp runs. ``flash_attention`` None leaves it to llama.cpp."""

    threads: int | None = None  # None: every core this process may use
    ubatch: int = CHUNK_TOKENS
    flash_attention: bool | None = None
    kv_cache_type: str = "f16"
    device: Literal["cpu", "cuda"] = "cpu"
    n_gpu_layers: int | None = None  # None: all of them on cuda, none on cpu


@dataclass(frozen=True, slots=True)
class ImposedRope:
    """RoPE put in place of what a file says, as model-load overrides; None leaves a key alone.

    Factor tensors (``rope_freqs``) cannot be imposed.
    """

    type: str | None = None
    factor: float | None = None
    theta: float | None = None
    attention_factor: float | None = None

    @classmethod
    def of(cls, rope: RopeParameters) -> ImposedRope:
        """Everything that ``rope`` says."""
        kind = "none" if rope.factor == 1.0 else "linear"
        return cls(kind, rope.factor, rope.theta, rope.attention_factor)

    def keys(self) -> dict[str, str | float]:
        """GGUF key, without the architecture's prefix, to the value imposed."""
        values = {
            rope_keys.TYPE_KEY: self.type,
            rope_keys.FACTOR_KEY: self.factor,
            rope_keys.THETA_KEY: self.theta,
            rope_keys.ATTENTION_KEY: self.attention_factor,
        }
        return {key: value for key, value in values.items() if value is not None}


class LlamaCppModel(Closing):
    """A GGUF file loaded by llama.cpp; close it, or use it as a context manager."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        options: LlamaCppOptions,
        imposed: ImposedRope | None = None,
    ) -> None:
        """Loads ``path``, whose ``general.architecture`` is ``architecture``.

        Raises ``EnvironmentNotReadyError`` where this build cannot use the device, and
        ``SourceError`` in llama.cpp's own words where it cannot load the file.
        """
        require_device(options)
        self.path, self.options = path, options
        api, log = _library(), _log()
        log.install()
        params = api.llama_model_default_params()
        params.n_gpu_layers = _gpu_layers(options)
        overrides = _overrides(architecture, imposed)  # kept until the load has copied them
        if overrides is not None:
            params.kv_overrides = overrides
        self._model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            reason = log.errors()
            if "allocate" in reason:
                raise EnvironmentNotReadyError(
                    f"{path}: no memory for it: {reason}", hint="Free some memory."
                )
            raise SourceError(
                f"{path}: llama.cpp cannot load it: {reason}",
                hint=_CHECK_HINT,
            )
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocabulary = int(api.llama_vocab_n_tokens(self._vocab))

    def open_session(self, context_tokens: int) -> LlamaCppSession:
        """An empty sequence of at most ``context_tokens`` tokens, whatever the file's context."""
        if not self._model:
            raise ValueError(f"{self.path}: the model is closed")
        return LlamaCppSession(self._model, self, context_tokens)

    def close(self) -> None:
        """Frees the model."""
        if self._model:
            _library().llama_model_free(self._model)
            self._model = None


def _context_hint(options: LlamaCppOptions) -> str:
    if options.flash_attention is False and options.kv_cache_type not in ("f32", "f16", "bf16"):
        return f"A {options.kv_cache_type} cache needs --flash-attention."
    return "Free some memory or give another --kv-cache-type."


class LlamaCppSession(Closing):
    """One sequence in llama.cpp."""

    def __init__(self, model: Any, owner: LlamaCppModel, context_tokens: int) -> None:
        api, log, options = _library(), _log(), owner.options
        log.install()
        params = api.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = min(CHUNK_TOKENS, context_tokens)
        params.n_ubatch = min(options.ubatch, params.n_batch)
        params.n_threads = params.n_threads_batch = options.threads or cores()
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.type_k = params.type_v = CACHE_TYPES[options.kv_cache_type]
        params.offload_kqv = params.op_offload = options.device == "cuda"
        params.no_perf = True
        self._owner, self._context = owner, api.llama_init_from_model(model, params)
        if not self._context:
            raise EnvironmentNotReadyError(
                f"{owner.path}: llama.cpp cannot open a context of {context_tokens} tokens"
                f" with a {options.kv_cache_type} cache: {log.errors()}",
                hint=_context_hint(options),
            )
        self._batch = api.llama_batch_init(params.n_batch, 0, 1)
        self._first: int | None = None  # position
        self._logits = np.empty((0, owner.vocabulary), np.float32)

    def feed(self, tokens: Tokens, *, position: int, logits: bool) -> Logits | None:
        """See ``Session.feed``. Raises ``SourceError`` where llama.cpp refuses the tokens."""
        api, count = _library(), len(tokens)
        if self._first is None:
            self._first = position
        batch = self._batch
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (count,))[:] = np.arange(position, position + count)
        np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (count,))[:] = logits
        for i in range(count):
            batch.seq_id[i][0] = 0
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise SourceError(
                f"{self._owner.path}: llama.cpp cannot evaluate {count} tokens at position"
                f" {position} (code {code}): {_log().errors()}",
                hint=_CHECK_HINT,
            )
        if not logits:
            return None
        given = np.ctypeslib.as_array(
            api.llama_get_logits(self._context), (count, self._owner.vocabulary)
        )
        # A fresh array's pages cost more than the copy: the last one is used again where nobody
        # else has it or a view of it (one count is the attribute's, one the argument's).
        if len(self._logits) < count or sys.getrefcount(self._logits) > 2:
            self._logits = np.empty_like(given)
        np.copyto(self._logits[:count], given)
        return self._logits[:count]

    def keep(self, count: int) -> int:
        """See ``Session.keep``."""
        api = _library()
        memory = api.llama_get_memory(self._context)
        stop = None if self._first is None or count == 0 else self._first + count
        if stop is not None and api.llama_memory_seq_rm(memory, 0, stop, -1):
            return count
        api.llama_memory_clear(memory, True)
        self._first = None
        return 0

    def close(self) -> None:
        """Frees the cache."""
        if self._context:
            _library().llama_batch_free(self._batch)
            _library().llama_free(self._context)
            self._context = None


class LlamaCppTokenizer(Closing):
    """A GGUF file's own tokenizer in llama.cpp; no weight is read."""

    def __init__(self, path: Path) -> None:
        """Raises ``SourceError`` in llama.cpp's own words where it cannot load the vocabulary."""
        api, log = _library(), _log()
        log.install()
        params = api.llama_model_default_params()
        params.vocab_only = True
        self._model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise SourceError(
                f"{path}: llama.cpp cannot load its tokenizer: {log.errors()}", hint=_CHECK_HINT
            )
        self._vocab = api.llama_model_get_vocab(self._model)
        self._room = 1 << 16

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``; special tokens in it are matched where ``parse_special``."""
        api, data = _library(), text.encode()
        while True:
            ids = (ctypes.c_int32 * self._room)()
            count = api.llama_tokenize(
                self._vocab, data, len(data), ids, self._room, add_special, parse_special
            )
            if count >= 0:
                return list(ids[:count])
            self._room = -count

    @property
    def add_bos(self) -> bool:
        """Whether BOS is put before a text."""
        return bool(_library().llama_vocab_get_add_bos(self._vocab))

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of bos, eos and the like as llama.cpp resolved them; -1 where there is none."""
        api = _library()
        names = ("bos", "eos", "eot", "sep", "pad", "mask")
        return {name: int(getattr(api, f"llama_vocab_{name}")(self._vocab)) for name in names}

    def close(self) -> None:
        """Frees the vocabulary."""
        if self._model:
            _library().llama_model_free(self._model)
            self._model = None


def require_device(options: LlamaCppOptions) -> None:
    """Raises ``EnvironmentNotReadyError`` unless this build of llama.cpp can use the device."""
    if options.kv_cache_type not in CACHE_TYPES:
        raise ConvertError(
            f"a KV cache of type {options.kv_cache_type}",
            hint=f"llama.cpp has {', '.join(CACHE_TYPES)}.",
        )
    wants_gpu = options.device == "cuda" or (options.n_gpu_layers or 0) > 0
    if wants_gpu and not _library().llama_supports_gpu_offload():
        raise EnvironmentNotReadyError(
            "this build of llama-cpp-python cannot use a GPU",
            hint="Install one that can: CMAKE_ARGS='-DGGML_CUDA=on' pip install --force-reinstall"
            " --no-binary llama-cpp-python llama-cpp-python; or leave --device at cpu.",
        )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_layers(options: LlamaCppOptions) -> int:
    if options.n_gpu_layers is not None:
        return options.n_gpu_layers
    return _ALL_LAYERS if options.device == "cuda" else 0


def _overrides(architecture: str, imposed: ImposedRope | None) -> Any:
    """The array that llama.cpp reads up to an empty key, or None."""
    if imposed is None:
        return None
    api, keys = _library(), imposed.keys()
    array = (api.llama_model_kv_override * (len(keys) + 1))()
    for slot, (key, value) in zip(array, keys.items(), strict=False):
        slot.key = f"{architecture}.{key}".encode()
        if isinstance(value, str):
            slot.tag = _STRING_OVERRIDE
            slot.value.val_str = value.encode()
        else:
            slot.tag = _FLOAT_OVERRIDE
            slot.value.val_f64 = value
    return array


class _Log:
    """llama.cpp's last log lines; it would otherwise print every one on stderr."""

    def __init__(self, callback_type: Callable[..., Any]) -> None:
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=_LOG_LINES)
        # Kept referenced: llama.cpp calls it for as long as the process lives.
        self._callback = callback_type(self._write)

    def install(self) -> None:
        """Makes llama.cpp log here, from a clean sheet; others may have set their own."""
        self._lines.clear()
        _library().llama_log_set(self._callback, ctypes.c_void_p(0))

    def errors(self) -> str:
        """The error lines since ``install``, else the last line of any kind."""
        errors = [text for level, text in self._lines if level >= _ERROR_LEVEL]
        return "; ".join(_unique(errors or [text for _, text in self._lines][-1:])) or "no reason"

    def _write(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if line and level != _CONTINUED_LEVEL:
            self._lines.append((level, line))


def _unique(lines: list[str]) -> Iterator[str]:
    yield from dict.fromkeys(lines)


@functools.cache
def _log() -> _Log:
    return _Log(_library().llama_log_callback)


@functools.cache
def _library() -> Any:
    align_arrays()
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"llama-cpp-python cannot be imported: {error}",
            hint="Install it: pip install llama-cpp-python",
        ) from error
    llama_cpp.llama_backend_init()
    return llama_cpp


def load_in_child(path: Path) -> str | None:
    """Loads the file and opens a context in a child process; why that fails, None where it works.

    llama.cpp aborts or crashes on some malformed files; here it takes no other process with it.
    Raises ``EnvironmentNotReadyError`` where it was the machine that failed: memory or time.
    """
    package = os.fspath(Path(__file__).parents[2])
    # -P: what lies in the current folder is not imported.
    command = [sys.executable, "-P", "-c", _CHILD, os.fspath(path), package]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_CHILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentNotReadyError(
            f"{path}: llama.cpp did not load it within {_CHILD_SECONDS} s",
            hint="Put the file on a faster disk, or free some memory.",
        ) from error
    if done.returncode == 0:
        return None
    words = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines()
    last = words[-1] if words else "no reason given"
    if done.returncode == -signal.SIGKILL:
        raise EnvironmentNotReadyError(
            f"{path}: the process that loads it was killed, as happens where memory runs out",
            hint="Free some memory.",
        )
    if done.returncode == _CHILD_NOT_READY:
        raise EnvironmentNotReadyError(last, hint="Free some memory.")
    if done.returncode < 0:
        aborts = [line for line in words if "ASSERT" in line or "abort" in line.lower()]
        return f"it dies of signal {-done.returncode}: {(aborts or [last])[-1]}"
    return last.rpartition("cannot load it: ")[2]


_CHILD = f"""
import sys
from pathlib import Path
sys.path.append(sys.argv[2])  # a source tree that was never installed
from converters.errors import ConvertError, EnvironmentNotReadyError
from pi_convert.runtimes import llamacpp
try:
    with llamacpp.LlamaCppModel(Path(sys.argv[1]), "", llamacpp.LlamaCppOptions()) as model:
        with model.open_session(32) as session:
            session.feed(llamacpp.np.arange(2, dtype="int32"), position=0, logits=True)
except (EnvironmentNotReadyError, MemoryError) as error:
    print(getattr(error, "message", "memory ran out"))
    sys.exit({_CHILD_NOT_READY})
except ConvertError as error:
    print(error.message)
    sys.exit({_CHILD_REFUSED})
"""
