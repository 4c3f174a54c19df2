"""A source's values in an artifact's encoding, by other people's code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.encodings import F32, NBITS, Encoding
from converters.ggml import load_ggml


def encode(values: npt.NDArray[np.float32], encoding: Encoding) -> npt.NDArray[np.uint8]:
    """Rows of float32 values in an encoding, uint8 (rows, row_bytes).

    Float types are gguf-py's, block types libggml's, ONNX Runtime's blocks its own quantizer's.
    Raises ``UnsupportedError`` for a type that needs an importance matrix.
    """
    if encoding in NBITS:
        return _onnxruntime_blocks(values, encoding)
    if encoding is F32:
        return np.ascontiguousarray(values).view(np.uint8)
    if encoding.is_float:
        import gguf

        data = gguf.quantize(values, gguf.GGMLQuantizationType(encoding.ggml_type))
        return np.ascontiguousarray(data).view(np.uint8).reshape(len(values), -1)
    return load_ggml().quantize(encoding, values)


def _onnxruntime_blocks(
    values: npt.NDArray[np.float32], encoding: Encoding
) -> npt.NDArray[np.uint8]:
    """What onnxruntime.quantization's MatMulNBitsQuantizer calls, laid out as ``encoding``."""
    from onnxruntime.capi import _pybind_state as native

    kind, size = NBITS[encoding], encoding.block_elements
    rows, columns = values.shape
    count = columns // size
    codes = np.zeros((rows, count, size * kind.bits // 8), np.uint8)
    scales = np.zeros((rows, count), kind.scale)
    zeros = np.zeros((rows, -(-count * kind.bits // 8)), np.uint8)
    quantize = native.quantize_matmul_4bits if kind.bits == 4 else native.quantize_matmul_8bits
    with np.errstate(over="ignore"):
        transposed = np.ascontiguousarray(values.T.astype(kind.scale))
    quantize(codes, transposed, scales, zeros, size, rows, columns, not kind.asymmetric)
    scales += 0  # -0, which blocks of zeros may get, is 0 in the file
    parts = [scales[:, :, None].view(np.uint8), codes]
    if kind.asymmetric:
        if kind.bits == 4:
            zeros = np.stack([zeros & 0x0F, zeros >> 4], axis=-1).reshape(rows, -1)[:, :count]
        parts.insert(1, zeros[:, :, None])
    return np.concatenate(parts, axis=2).reshape(rows, -1)
