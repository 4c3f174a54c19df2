"""ggml's own quantizers on numpy arrays: the bytes that ``llama_model_quantize`` would write."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from converters.encodings import ENCODINGS, F32, Encoding
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.ggml.library import INSTALL_HINT, Libraries, TypeTraits, load_libraries

Raw = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
ToFloat = Callable[[int, int, int], None]

# What the fingerprint quantizes, with rows of 256 elements for each type. Builds that contract
# to FMA differ in 1.4 % of q4_k's blocks, 1.9 % of q6_k's and 0.1 % of q5_k's: 512 blocks miss that
# with a chance of 1e-3 and 5e-5. The others have not been seen to differ; iq4 is slow, and iq3_s is
# left out: its tables take 0.15 s to set up, more than all the rest, and it is the same library.
_FINGERPRINT_ROWS: Mapping[str, int] = {
    "f16": 64,
    "bf16": 64,
    "q4_0": 64,
    "q4_1": 64,
    "q5_0": 64,
    "q5_1": 64,
    "q8_0": 64,
    "q2_k": 64,
    "q3_k": 64,
    "q4_k": 512,
    "q5_k": 512,
    "q6_k": 512,
    "iq4_nl": 16,
    "iq4_xs": 16,
    "tq1_0": 16,
    "tq2_0": 16,
    "mxfp4": 16,
    "q1_0": 16,
    "q2_0": 16,
}
_FINGERPRINT_ROW = 256


class Ggml:
    """The installed ggml. Every method may be called from several threads at once."""

    def __init__(self, libraries: Libraries) -> None:
        self.libraries = libraries
        self._to_float: dict[Encoding, ToFloat] = {}
        problems = []
        for encoding in ENCODINGS.values():
            traits: TypeTraits = libraries.ggml.ggml_get_type_traits(encoding.ggml_type).contents
            found = (traits.block_elements, traits.block_bytes)
            if found != (encoding.block_elements, encoding.block_bytes):
                problems.append(f"{encoding.name} has blocks of {found}")
            if traits.to_float:
                prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
                self._to_float[encoding] = prototype(traits.to_float)
        if problems:
            raise EnvironmentNotReadyError(
                f"{libraries.folder}: {', '.join(problems)}", hint=INSTALL_HINT
            )

    def quantize(self, encoding: Encoding, values: Floats) -> Raw:
        """``values`` (rows, elements) float32 as rows of ``encoding``, uint8 (rows, row_bytes).

        Values must be finite. Raises ``UnsupportedError`` where rows fit no block, or the type
        cannot be made without an importance matrix.
        """
        rows, elements = values.shape
        row_bytes = encoding.row_bytes(elements)
        values = np.ascontiguousarray(values, np.float32)
        if encoding is F32:
            return values.view(np.uint8)
        ggml = self.libraries.ggml
        if ggml.ggml_quantize_requires_imatrix(encoding.ggml_type):
            raise UnsupportedError(
                f"{encoding.name} needs an importance matrix", hint="Choose another type."
            )
        raw = np.empty((rows, row_bytes), np.uint8)
        ggml.ggml_quantize_chunk(
            encoding.ggml_type, values.ctypes.data, raw.ctypes.data, 0, rows, elements, None
        )
        return raw

    def dequantize(self, encoding: Encoding, raw: Raw) -> Floats:
        """The values of rows of ``encoding``, float32 (rows, elements), as llama.cpp reads them."""
        if encoding is F32:
            return raw.view(np.float32)
        convert = self._to_float.get(encoding)
        if convert is None:
            raise UnsupportedError(
                f"ggml cannot decode {encoding.name}", hint="Give a file of another type."
            )
        raw = np.ascontiguousarray(raw)
        elements = raw.shape[1] // encoding.block_bytes * encoding.block_elements
        values = np.empty((raw.shape[0], elements), np.float32)
        convert(raw.ctypes.data, values.ctypes.data, values.size)
        return values

    def is_valid(self, encoding: Encoding, raw: Raw) -> bool:
        """Whether every scale in blocks of ``encoding`` is finite."""
        valid: bool = self.libraries.ggml.ggml_validate_row_data(
            encoding.ggml_type, raw.ctypes.data, raw.nbytes
        )
        return valid

    def fingerprint(self) -> str:
        """SHA-256, in hex, of a fixed set of rows quantized to each type: one for one build.

        Two builds with the same fingerprint write the same tensors; see ``_FINGERPRINT_ROWS``.
        """
        return _fingerprint(self)

    def system_info(self) -> str:
        """The CPU features that llama.cpp was compiled with and uses, in its own words."""
        return str(self.libraries.llama.llama_print_system_info().decode(errors="replace"))

    def supports_gpu_offload(self) -> bool:
        """Whether this build can offload layers to a GPU at all."""
        return bool(self.libraries.llama.llama_supports_gpu_offload())


@functools.cache
def load_ggml() -> Ggml:
    """The installed ggml, or ``EnvironmentNotReadyError`` with the line that installs it."""
    return Ggml(load_libraries())


@functools.cache
def _fingerprint(ggml: Ggml) -> str:
    rows = max(_FINGERPRINT_ROWS.values())
    stream = hashlib.shake_256(b"pi-convert quantizer fingerprint").digest(
        2 * rows * _FINGERPRINT_ROW
    )
    uniform = np.frombuffer(stream, "<i2").astype(np.float32).reshape(rows, _FINGERPRINT_ROW)
    uniform /= np.float32(2**15)
    values = uniform * uniform * uniform * np.float32(0.1)  # few large among many small, as weights
    digest = hashlib.sha256()
    for name, count in _FINGERPRINT_ROWS.items():
        digest.update(name.encode())
        digest.update(ggml.quantize(ENCODINGS[name], values[:count]).data)
    return digest.hexdigest()
