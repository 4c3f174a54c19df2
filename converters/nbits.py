"""The quantizer of ONNX Runtime's block types, which ggml has not: float rows to blocks.

It rounds as ``MlasQuantizeBlockwise`` of ONNX Runtime 1.31 does (onnxruntime/core/mlas/lib,
q4_dq.cpp), bit for bit, so that a file is what ONNX Runtime's own tool would make. That one wants
whole matrices, transposed, and holds Python's lock; this one takes any rows, from any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from converters.encodings import NBITS, Encoding, NBits

Raw = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Quantizer = Callable[[Floats, Encoding], Raw]

FINGERPRINT_KEY = "quantizer.nbits"  # what a file records its quantizer's fingerprint under
_FINGERPRINT_ROWS, _FINGERPRINT_ROW = 16, 256


def quantize_nbits(values: Floats, encoding: Encoding) -> Raw:
    """``values`` (rows, elements) as rows of ``encoding``, one of ``NBITS``, uint8.

    Values must be finite. A scale that its type cannot hold is infinite: see ``has_finite_scales``.
    """
    kind = NBITS[encoding]
    encoding.row_bytes(values.shape[1])  # raises where rows fit no block
    if kind.scale == np.float16:  # the tool quantizes a float16 weight then
        with np.errstate(over="ignore"):
            values = values.astype(np.float16).astype(np.float32)
    blocks = values.reshape(len(values), -1, encoding.block_elements)
    scales, zeros = _scales_and_zeros(blocks, kind)
    codes = _codes(blocks, scales.astype(np.float32), zeros, kind)
    parts = [scales[:, :, None].view(np.uint8), codes]
    if kind.asymmetric:
        parts.insert(1, zeros.astype(np.uint8)[:, :, None])
    return np.concatenate(parts, axis=2).reshape(len(values), -1)


def has_finite_scales(raw: Raw, encoding: Encoding) -> bool:
    """Whether the scale of every block is a number."""
    size = NBITS[encoding].scale.itemsize
    blocks = raw.reshape(-1, encoding.block_bytes)
    return bool(
        np.isfinite(np.ascontiguousarray(blocks[:, :size]).view(NBITS[encoding].scale)).all()
    )


def fingerprint(quantizer: Quantizer = quantize_nbits) -> str:
    """SHA-256, in hex, of a fixed set of rows in every encoding: one for one way of rounding."""
    count = _FINGERPRINT_ROWS * _FINGERPRINT_ROW
    stream = hashlib.shake_256(b"pi-convert nbits fingerprint").digest(2 * count)
    uniform = np.frombuffer(stream, "<i2").astype(np.float32) / np.float32(2**15)
    values = (uniform**3 * np.float32(0.1)).reshape(_FINGERPRINT_ROWS, _FINGERPRINT_ROW)
    digest = hashlib.sha256()
    for encoding in NBITS:
        digest.update(encoding.name.encode())
        digest.update(quantizer(values, encoding).data)
    return digest.hexdigest()


def _scales_and_zeros(
    blocks: Floats, kind: NBits
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.float32]]:
    """Of every block: its scale as stored, and its zero point as a whole number."""
    low, high = _extremes(blocks)
    scales, zeros = (_asymmetric if kind.asymmetric else _symmetric)(low, high, kind)
    with np.errstate(over="ignore"):
        stored = scales.astype(kind.scale)
    return stored + kind.scale.type(0), zeros  # -0, the scale of zeros, becomes 0


def _symmetric(low: Floats, high: Floats, kind: NBits) -> tuple[Floats, Floats]:
    peak = np.where(np.abs(high) > np.abs(low), high, low)
    scales: Floats = np.divide(peak, np.float32(-kind.middle), dtype=np.float32)
    return scales, np.full_like(scales, kind.middle)


def _asymmetric(low: Floats, high: Floats, kind: NBits) -> tuple[Floats, Floats]:
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = (high - low) / np.float32(kind.largest)
        zeros = np.where(scales != 0, np.float32(0) - low / scales, np.float32(0))
    return scales, _rounded(zeros, kind.largest).astype(np.float32)


def _extremes(blocks: Floats) -> tuple[Floats, Floats]:
    """The least and the largest element of every block.

    Halves are compared with halves: numpy's own reduction of a short last axis takes twice as long.
    """
    low = high = blocks
    while low.shape[-1] > 1:
        half = low.shape[-1] // 2
        low = np.minimum(low[..., :half], low[..., half:])
        high = np.maximum(high[..., :half], high[..., half:])
    return low[..., 0], high[..., 0]


def _codes(blocks: Floats, scales: Floats, zeros: Floats, kind: NBits) -> Raw:
    """uint8 (rows, blocks, bytes of codes)."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factors = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
        scaled = blocks * factors[:, :, None]  # 0 * inf, of a denormal scale, is NaN and becomes 0
    scaled += zeros[:, :, None]
    codes = _rounded(scaled, kind.largest)
    if kind.bits == 8:
        return codes
    pairs = codes.view(np.uint16)  # the even element in the low byte
    packed: Raw = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
    return packed


def _rounded(values: Floats, largest: int) -> Raw:
    """``values`` as whole numbers from 0 to ``largest``, halves up; ``values`` is used up."""
    np.fmax(values, np.float32(0), out=values)
    np.minimum(values, np.float32(largest), out=values)
    codes: Raw = values.astype(np.uint8)
    values -= codes
    codes += values >= np.float32(0.5)
    return codes
