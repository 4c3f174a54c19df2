"""pi-convert's own K-quant kernels: ggml's bytes, many times faster, where they are shown to agree.

``native/kquants.cpp`` is compiled when the package is built, once for each instruction set. Before
a type is used it is quantized by both on this machine; one byte that differs, and ggml makes it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.encodings import ENCODINGS, Encoding
from converters.ggml.checked_values import checked_values
from converters.ggml.quantize import Floats, Ggml, Raw

_log = logging.getLogger(__name__)

INSTRUCTION_SETS = ("avx512", "avx2")  # the first that the processor has is used
# type -> ggml's function, which makes the blocks that the kernel hands over
_REFERENCES: Mapping[str, str] = {
    "q2_k": "quantize_q2_K",
    "q3_k": "quantize_q3_K",
    "q4_k": "quantize_q4_K",
    "q5_k": "quantize_q5_K",
    "q6_k": "quantize_q6_K",
    "iq4_nl": "quantize_iq4_nl",
    "iq4_xs": "quantize_iq4_xs",
}
KERNEL_TYPES = tuple(_REFERENCES)
# So many that a kernel, or a ggml, that was compiled with any one of its expressions contracted
# differs in 10 of them and more, tests/converters/test_agreement.py. All types take 3.2 s of one
# AVX-512 core, once.
_CHECKED_ROWS = {"iq4_nl": 6144, "iq4_xs": 6144}
_CHECKED_ROWS_ELSE = 24576
_EVERY_KIND = 512  # rows among which are all kinds of checked values


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows that were quantized; ``handed`` blocks of them were made by ggml's own function."""

    raw: Raw
    handed: int


class Kernels:
    """One compiled library with the references of one ggml; thread-safe, without the GIL."""

    def __init__(self, path: Path, library: ctypes.CDLL, ggml: Ggml) -> None:
        self.path = path
        self.instruction_set = path.stem.removeprefix("_kquants_")
        self._functions: dict[Encoding, Callable[..., int]] = {}
        self._references: dict[Encoding, int | None] = {}
        for name, reference in _REFERENCES.items():
            function = getattr(library, f"pi_quantize_{name}")
            function.restype = ctypes.c_int64
            function.argtypes = (
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_int64,
                ctypes.c_void_p,
            )
            encoding = ENCODINGS[name]
            pointer = getattr(ggml.libraries.ggml, reference, None)
            if pointer is not None:
                self._functions[encoding] = function
                self._references[encoding] = ctypes.cast(pointer, ctypes.c_void_p).value

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """The types that it makes."""
        return tuple(self._functions)

    def quantize(self, encoding: Encoding, values: Floats) -> Counted:
        """``values`` (rows, elements) float32, finite, as rows of ``encoding``."""
        values = np.ascontiguousarray(values, np.float32)
        raw = np.empty((values.shape[0], encoding.row_bytes(values.shape[1])), np.uint8)
        handed = self._functions[encoding](
            values.ctypes.data, raw.ctypes.data, values.size, self._references[encoding]
        )
        return Counted(raw, handed)


def find_kernels(ggml: Ggml, folder: Path | None = None) -> Kernels | str:
    """The fastest kernels that this processor runs, or why there are none.

    ``folder`` None is where the package keeps what was compiled with it.
    """
    folder = Path(__file__).parent if folder is None else folder
    found = [folder / f"_kquants_{name}.so" for name in INSTRUCTION_SETS]
    if not any(path.is_file() for path in found):
        return (
            "not compiled with this installation: it needs a C++ compiler and an x86-64 processor"
        )
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
            if library.pi_supported():
                return Kernels(path, library, ggml)
        except OSError as error:
            _log.debug("%s: %s", path, error)
    return "this processor has neither AVX-512 nor AVX2"


def agrees(kernels: Kernels, ggml: Ggml, encoding: Encoding) -> bool:
    """Whether both make the same bytes of ``values_to_check``."""
    values = values_to_check(encoding)
    return bool(
        np.array_equal(kernels.quantize(encoding, values).raw, ggml.quantize(encoding, values))
    )


def values_to_check(encoding: Encoding) -> Floats:
    """As many of ``checked_values`` as ``encoding`` needs."""
    return checked_values(_CHECKED_ROWS.get(encoding.name, _CHECKED_ROWS_ELSE))


class Agreement:
    """Which types agree, asked once a machine and build and kept in a file of the user's cache."""

    def __init__(self, kernels: Kernels, ggml: Ggml, cache: Path | None) -> None:
        self._kernels, self._ggml, self._cache = kernels, ggml, cache
        self._known = self._read()
        self._warned: set[Encoding] = set()
        self._lock = threading.Lock()  # of trying a type out

    def __call__(self, encoding: Encoding) -> bool:
        """Whether ``encoding`` agrees; tried out the first time. One warning where it does not."""
        if encoding not in self._kernels.encodings:
            return False
        with self._lock:
            if encoding.name not in self._known:
                self._known[encoding.name] = agrees(self._kernels, self._ggml, encoding)
                self._write()
            if not self._known[encoding.name] and encoding not in self._warned:
                self._warned.add(encoding)
                _log.warning(
                    "%s: the %s kernels do not agree with this build of ggml and are not used",
                    encoding.name,
                    self._kernels.instruction_set,
                )
            return self._known[encoding.name]

    def _read(self) -> dict[str, bool]:
        if self._cache is None:
            return {}
        try:
            known = json.loads(self._cache.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {str(name): value for name, value in known.items() if isinstance(value, bool)}

    def _write(self) -> None:
        """Whole or not at all; a home that cannot be written is asked again next time."""
        if self._cache is None:
            return
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._cache.parent, delete=False) as file:
                json.dump(self._known, file)
            Path(file.name).replace(self._cache)
        except OSError as error:
            _log.debug("%s: %s", self._cache, error)


def cache_file(kernels: Kernels, ggml: Ggml) -> Path:
    """Where agreement is kept: named by both libraries, the processor and what is checked."""
    digest = hashlib.sha256()
    for path in (kernels.path, Path(str(ggml.libraries.ggml._name))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(_processor().encode())
    digest.update(f"{_CHECKED_ROWS} {_CHECKED_ROWS_ELSE}".encode())
    digest.update(checked_values(_EVERY_KIND).data)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "pi-convert" / f"kernels-{digest.hexdigest()[:32]}.json"


@functools.cache
def _processor() -> str:
    """The processor's model and features, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
