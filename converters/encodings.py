"""How a tensor's numbers are stored: floats, ggml's block types, ONNX Runtime's; with their sizes.

ONNX Runtime's MatMulNBits has blocks that ggml has not: of 128 elements, and with a zero point.
Here such a block is one run of bytes: its scale, its zero point where it has one, its codes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping


NO_GGML_TYPE = -1


@dataclass(frozen=True, slots=True)
class Encoding:
    """A storage type: ``block_elements`` numbers in ``block_bytes`` bytes, along the last axis."""

    name: str  # ggml's type name in lower case
    ggml_type: int  # NO_GGML_TYPE: ggml has none such
    block_elements: int
    block_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether every number stands alone, so that any permutation keeps values exact."""
        return self.block_elements == 1

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of ``elements`` numbers; ``UnsupportedError`` where no block fits."""
        if elements % self.block_elements:
            raise UnsupportedError(
                f"a row of {elements} elements does not divide into {self.name} blocks"
                f" of {self.block_elements}",
                hint="Choose a type whose blocks fit, or a float type.",
            )
        return elements // self.block_elements * self.block_bytes


def _table() -> Mapping[str, Encoding]:
    rows = (
        # name, enum ggml_type, elements a block, bytes a block
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q8_1", 9, 32, 36),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("q8_k", 15, 256, 292),
        ("iq2_xxs", 16, 256, 66),
        ("iq2_xs", 17, 256, 74),
        ("iq3_xxs", 18, 256, 98),
        ("iq1_s", 19, 256, 50),
        ("iq4_nl", 20, 32, 18),
        ("iq3_s", 21, 256, 110),
        ("iq2_s", 22, 256, 82),
        ("iq4_xs", 23, 256, 136),
        ("i8", 24, 1, 1),
        ("i16", 25, 1, 2),
        ("i32", 26, 1, 4),
        ("i64", 27, 1, 8),
        ("f64", 28, 1, 8),
        ("iq1_m", 29, 256, 56),
        ("bf16", 30, 1, 2),
        ("tq1_0", 34, 256, 54),
        ("tq2_0", 35, 256, 66),
        ("mxfp4", 39, 32, 17),
        ("nvfp4", 40, 64, 36),
        ("q1_0", 41, 128, 18),
        ("q2_0", 42, 64, 18),
    )
    return {row[0]: Encoding(*row) for row in rows}


ENCODINGS: Mapping[str, Encoding] = _table()
_BY_GGML_TYPE: Mapping[int, Encoding] = {e.ggml_type: e for e in ENCODINGS.values()}

F32 = ENCODINGS["f32"]
F16 = ENCODINGS["f16"]
BF16 = ENCODINGS["bf16"]


@dataclass(frozen=True, slots=True)
class NBits:
    """What a block of MatMulNBits holds: value = (code - zero point) * scale.

    Codes of 4 bits stand two a byte, the even element in the low half. Without a zero point of its
    own, a block's is ``middle``.
    """

    bits: int
    asymmetric: bool
    scale: np.dtype[np.floating]

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


def _nbits_table() -> Mapping[Encoding, NBits]:
    """Every form that is not one of ggml's: block 32, symmetric, is q4_0 and q8_0."""
    found = {}
    for bits, block, asymmetric, scale in itertools.product(
        (4, 8), (32, 128), (False, True), ("f4", "f2")
    ):
        if block == 32 and not asymmetric:
            continue
        kind = NBits(bits, asymmetric, np.dtype(scale))
        name = f"int{bits}_b{block}{'_asym' * asymmetric}{'_f16' * (scale == 'f2')}"
        block_bytes = kind.scale.itemsize + asymmetric + block * bits // 8
        found[Encoding(name, NO_GGML_TYPE, block, block_bytes)] = kind
    return found


NBITS: Mapping[Encoding, NBits] = _nbits_table()


def nbits_encoding(block_elements: int, kind: NBits) -> Encoding | None:
    """The encoding of such blocks; None where it is one of ggml's, or none that is known."""
    return next(
        (e for e, k in NBITS.items() if (e.block_elements, k) == (block_elements, kind)), None
    )


def encoding_of_ggml_type(ggml_type: int) -> Encoding:
    """The encoding with ggml's type number. Raises ``UnsupportedError`` for an unknown number."""
    try:
        return _BY_GGML_TYPE[ggml_type]
    except KeyError:
        raise UnsupportedError(
            f"tensor type {ggml_type} is not one of ggml's {len(_BY_GGML_TYPE)} known types",
            hint="The file is damaged, or made for another llama.cpp: fetch or convert it again.",
        ) from None


def decode_f32(raw: npt.NDArray[np.uint8], encoding: Encoding) -> npt.NDArray[np.float32]:
    """The values of raw rows as float32.

    ``raw`` is (rows, row_bytes) of ``encoding``; the result is (rows, elements). f32, f16 and bf16
    are exact; block types follow gguf-py's reference dequantization. f64 rounds to nearest.
    """
    if encoding is F32:
        return raw.view(np.float32)
    if encoding is F16:
        return raw.view(np.float16).astype(np.float32)
    if encoding is BF16:
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if encoding.name == "f64":
        return raw.view(np.float64).astype(np.float32)
    if encoding in NBITS:
        return _decode_nbits(raw, encoding)
    return _dequantize_blocks(raw, encoding)


def _decode_nbits(raw: npt.NDArray[np.uint8], encoding: Encoding) -> npt.NDArray[np.float32]:
    kind = NBITS[encoding]
    blocks = raw.reshape(len(raw), -1, encoding.block_bytes)
    size = kind.scale.itemsize
    scales = np.ascontiguousarray(blocks[:, :, :size]).view(kind.scale).astype(np.float32)
    zero = blocks[:, :, size : size + 1].astype(np.float32) if kind.asymmetric else kind.middle
    codes = blocks[:, :, size + kind.asymmetric :]
    if kind.bits == 4:
        codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*blocks.shape[:2], -1)
    values: npt.NDArray[np.float32] = (codes - np.float32(zero)) * scales
    return values.reshape(len(raw), -1)


def _dequantize_blocks(raw: npt.NDArray[np.uint8], encoding: Encoding) -> npt.NDArray[np.float32]:
    import gguf

    refusal = UnsupportedError(
        f"{encoding.name} cannot be decoded by gguf-py", hint="Give a file of another type."
    )
    try:
        ggml_type = gguf.GGMLQuantizationType(encoding.ggml_type)
    except ValueError:
        raise refusal from None
    try:
        values: npt.NDArray[np.float32] = gguf.dequantize(raw, ggml_type)
    except NotImplementedError:
        raise refusal from None
    return values
