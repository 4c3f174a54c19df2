"""ONNX Runtime on a decoder with past keys and values, one sequence at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters.containers.onnx import OnnxFile
from converters.errors import EnvironmentNotReadyError, SourceError, UnsupportedError
from converters.install import install_line
from pi_convert.runtimes.base import CHUNK_TOKENS, Closing, Logits, Tokens
from pi_convert.runtimes.llamacpp import cores
from pi_convert.runtimes.onnx_tables import Tables

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FATAL_ONLY = 4  # ORT_LOGGING_LEVEL_FATAL: what goes wrong is told by the exception
_PAST = "past_"
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

_GPU_WHEELS = ("linux", "win32")
RUNTIME_PACKAGE = "onnxruntime-gpu" if sys.platform in _GPU_WHEELS else "onnxruntime"


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """How ONNX Runtime runs a file. ``threads`` None: every core.

    ``cache_heads`` is (kv heads, head_dim), for a graph whose inputs give them as names only.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    cache_heads: tuple[int, int] | None = None


class OrtModel(Closing):
    """An ONNX file loaded by ONNX Runtime; close it, or use it as a context manager."""

    def __init__(
        self,
        file: OnnxFile,
        options: OrtOptions,
        tables: Tables | None,
        imposed: Tables | None = None,
    ) -> None:
        """``tables`` are the file's own, ``imposed`` others in their place.

        Raises ``SourceError`` where ONNX Runtime refuses the file, and
        ``EnvironmentNotReadyError`` where it is missing or cannot use the device.
        """
        self._file, self._options = file, options
        self._tables = tables if imposed is None else imposed
        self._imposed = imposed
        self._loaded: tuple[int, _Loaded] | None = None
        self._outputs = self.loaded_at(0).session.get_outputs()

    @property
    def vocabulary(self) -> int:
        """Logits a position."""
        return int(self._outputs[0].shape[-1])

    def open_session(self, context_tokens: int) -> OrtSession:
        """An empty sequence of at most ``context_tokens``, whose whole cache is taken at once.

        Raises ``UnsupportedError`` for a file that gives the last token's logits alone.
        """
        if self._outputs[0].shape[1] == 1:
            raise UnsupportedError(
                "the file gives logits of the last token alone",
                hint="Verify one written without --last-logits; its weights are the same.",
            )
        capacity = context_tokens if _shares_cache(self._file) else 0
        return OrtSession(self.loaded_at, self._options, capacity)

    def loaded_at(self, position: int) -> _Loaded:
        """The model with the tables turned so that row 0 is ``position``'s.

        A graph takes its positions from the mask, so an empty sequence starts at 0: a window far
        out is run with the tables' far rows in front. The last position's alone is kept, since
        each holds all weights.
        """
        if self._loaded is None or self._loaded[0] != position:
            if position and self._tables is None:
                raise SourceError(
                    f"{self._file.path}: without tables no window can start at {position}",
                    hint="Export it again: pi-convert export MODEL --to onnx --scale S",
                )
            self._loaded = None  # freed before the next is loaded
            shifted = self._tables.shifted(position) if position and self._tables else self._imposed
            self._loaded = position, _Loaded.of(self._file.path, self._options, shifted)
        return self._loaded[1]

    def close(self) -> None:
        """Frees the weights."""
        self._loaded = None


def _shares_cache(file: OnnxFile) -> bool:
    """Whether past and present may be one buffer: the operator then writes new rows in place."""
    takers = {
        node.operator for node in file.nodes if any(name.startswith(_PAST) for name in node.inputs)
    }
    return takers == {"GroupQueryAttention"}


@dataclass(frozen=True, slots=True)
class _Loaded:
    """ONNX Runtime's session, and what replaces initializers: it keeps no reference to that."""

    session: Any
    replaced: tuple[Any, ...]

    @classmethod
    def of(cls, path: Path, options: OrtOptions, tables: Tables | None) -> _Loaded:
        runtime = import_runtime()
        runtime.set_default_logger_severity(_FATAL_ONLY)  # of what loads providers
        settings = runtime.SessionOptions()
        settings.log_severity_level = _FATAL_ONLY
        settings.intra_op_num_threads = options.threads or cores()
        replaced = []
        for name, table in tables.as_mapping().items() if tables else ():
            value = runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(table))
            settings.add_initializer(name, value)
            replaced.append(value)
        provider = _PROVIDERS[options.device]
        if options.device == "cuda":
            _load_cuda(runtime)
        try:
            session = runtime.InferenceSession(os.fspath(path), settings, providers=[provider])
        except Exception as error:  # its exceptions share no base class but Exception
            raise SourceError(
                f"{path}: ONNX Runtime cannot load it: {_first_line(error)}",
                hint="`pi-convert check` tells what is wrong with the file.",
            ) from error
        if session.get_providers()[0] != provider:
            raise EnvironmentNotReadyError(
                f"ONNX Runtime does not run on {options.device}: it fell back to"
                f" {session.get_providers()[0]}",
                hint="`pi-convert doctor` tells what is missing.",
            )
        return cls(session, tuple(replaced))

    def empty_caches(self, options: OrtOptions, capacity: int) -> dict[str, Any]:
        """Past keys and values with room for ``capacity`` tokens, by input.

        Raises ``SourceError`` where neither the graph nor ``options`` give their sizes.
        """
        runtime, caches = import_runtime(), {}
        for cache in self.session.get_inputs():
            if not cache.name.startswith(_PAST):
                continue
            heads, head_dim = options.cache_heads or (cache.shape[1], cache.shape[3])
            if not isinstance(heads, int) or not isinstance(head_dim, int):
                raise SourceError(
                    f"{cache.name} is {cache.shape}: its sizes are names",
                    hint="`pi-convert verify` takes them from the source.",
                )
            empty = np.zeros((1, heads, capacity, head_dim), _FLOATS[cache.type])
            caches[cache.name] = runtime.OrtValue.ortvalue_from_numpy(empty, options.device, 0)
        return caches


class OrtSession(Closing):
    """One sequence. ``capacity`` 0: each run makes the cache anew, longer by what was fed."""

    def __init__(self, load: Callable[[int], _Loaded], options: OrtOptions, capacity: int) -> None:
        self._load = load
        self._options = options
        self._capacity = capacity
        self._first = 0  # position
        self._loaded: _Loaded | None = None
        self._fed = 0
        self._past: dict[str, Any] = {}

    def feed(self, tokens: Tokens, *, position: int, logits: bool) -> Logits | None:
        """Evaluates ``tokens``; see ``Session.feed``.

        Raises ``SourceError`` where ONNX Runtime refuses them.
        """
        if self._loaded is None or (self._fed == 0 and position != self._first):
            self._first, self._loaded = position, None  # freed before the next is loaded
            self._loaded = self._load(position)
        if not self._past:
            self._past = self._loaded.empty_caches(self._options, self._capacity)
        total = self._fed + len(tokens)
        if position != self._first + self._fed or not 0 < len(tokens) <= CHUNK_TOKENS:
            raise ValueError(f"{len(tokens)} tokens at {position}, {self._fed} were fed")
        if self._capacity and total > self._capacity:
            raise ValueError(f"{total} tokens do not fit a cache of {self._capacity}")
        binding = self._bound(self._loaded.session, tokens, total)
        try:
            self._loaded.session.run_with_iobinding(binding)
        except Exception as error:  # see ``OrtModel``
            raise SourceError(
                f"ONNX Runtime cannot evaluate {len(tokens)} tokens: {_first_line(error)}",
                hint="`pi-convert check` tells what is wrong with the file.",
            ) from error
        found, *present = binding.get_outputs()
        if not self._capacity:
            self._past = dict(zip(self._past, present, strict=True))
        self._fed = total
        return np.asarray(found.numpy()[0], np.float32) if logits else None

    def _bound(self, session: Any, tokens: Tokens, total: int) -> Any:
        """Inputs and outputs; the cache is both where it has room."""
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", tokens.astype(np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        logits, *presents = [output.name for output in session.get_outputs()]
        binding.bind_output(logits, "cpu")
        for name, value in zip(presents, self._past.values(), strict=True):
            if self._capacity:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name, self._options.device, 0)
        return binding

    def keep(self, count: int) -> int:
        """See ``Session.keep``. What is behind the tokens kept is not read: nothing is copied."""
        if not self._capacity and count < self._fed:
            for name, value in self._past.items():
                cut = np.ascontiguousarray(value.numpy()[:, :, :count])
                self._past[name] = import_runtime().OrtValue.ortvalue_from_numpy(
                    cut, self._options.device, 0
                )
        self._fed = count
        return count

    def close(self) -> None:
        """Frees the cache."""
        self._loaded, self._past = None, {}


def import_runtime() -> Any:
    """The onnxruntime package, or ``EnvironmentNotReadyError``."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise EnvironmentNotReadyError(
            "onnxruntime is not installed", hint=install_line("onnx")
        ) from None
    return onnxruntime


def _load_cuda(runtime: Any) -> None:
    """CUDA's libraries where pip's nvidia packages have them; elsewhere the loader looks itself."""
    with contextlib.redirect_stdout(io.StringIO()):  # what it misses; the session tells
        runtime.preload_dlls()


def require_onnx() -> None:
    """Raises ``EnvironmentNotReadyError`` unless what the ONNX target needs is installed."""
    missing = [name for name in ("onnx", "onnx_ir") if not importlib.util.find_spec(name)]
    if missing:
        raise EnvironmentNotReadyError(
            f"--to onnx needs {', '.join(missing)}", hint=install_line("onnx")
        )


def require_provider(options: OrtOptions) -> None:
    """Raises ``EnvironmentNotReadyError`` where this build has no provider for the device."""
    if _PROVIDERS[options.device] not in import_runtime().get_available_providers():
        raise EnvironmentNotReadyError(
            f"this build of ONNX Runtime has no provider for {options.device}",
            hint="Install onnxruntime-gpu for CUDA.",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
