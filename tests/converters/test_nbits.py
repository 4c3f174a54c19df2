"""ONNX Runtime's blocks, made and read here, against ONNX Runtime's own quantizer and kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from converters.encodings import ENCODINGS, NBITS, NO_GGML_TYPE, Encoding, NBits, decode_f32
from converters.errors import UnsupportedError
from converters.nbits import fingerprint, has_finite_scales, quantize_nbits

Array = npt.NDArray[Any]
EVERY = pytest.mark.parametrize("encoding", NBITS, ids=lambda encoding: encoding.name)


def parts_by_onnxruntime(values: Array, encoding: Encoding) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points as onnxruntime.quantization writes them."""
    kind, block = NBITS[encoding], encoding.block_elements
    rows, columns = values.shape
    count = columns // block
    codes = np.zeros((rows, count, block * kind.bits // 8), np.uint8)
    scales = np.zeros((rows, count), kind.scale)
    zeros = np.zeros((rows, (count * kind.bits + 7) // 8), np.uint8)
    quantize = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[kind.bits]
    transposed = np.ascontiguousarray(values.T.astype(kind.scale))
    quantize(codes, transposed, scales, zeros, block, rows, columns, not kind.asymmetric)
    return codes, scales, zeros


def laid_out(codes: Array, scales: Array, zeros: Array, encoding: Encoding) -> Array:
    """The same, block after block, byte by byte."""
    kind = NBITS[encoding]
    rows = []
    for row in range(len(codes)):
        for block in range(codes.shape[1]):
            scale = scales[row, block]
            rows.append((scale if scale else scale * 0 + kind.scale.type(0)).tobytes())
            if kind.asymmetric:
                at = block * kind.bits // 8
                zero = (
                    zeros[row, at] >> (4 * (block % 2)) & 15 if kind.bits == 4 else zeros[row, at]
                )
                rows.append(bytes([zero]))
            rows.append(codes[row, block].tobytes())
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(codes), -1)


def normal(rng: np.random.Generator) -> Array:
    return rng.standard_normal((24, 640)).astype(np.float32)


def sparse(rng: np.random.Generator, value: float) -> Array:
    return np.where(rng.random((24, 640)) < 0.01, np.float32(value), np.float32(0))


VALUES: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": normal,
    "bfloat16": lambda rng: (normal(rng).view(np.uint32) & 0xFFFF0000).view(np.float32),
    "heavy tails": lambda rng: rng.standard_t(2, (24, 640)).astype(np.float32),
    "whole numbers": lambda rng: rng.integers(-8, 9, (24, 640)).astype(np.float32),
    "halves": lambda rng: rng.integers(-16, 17, (24, 640)).astype(np.float32) / 2,
    "positive": lambda rng: np.abs(normal(rng)),
    "negative": lambda rng: -np.abs(normal(rng)),
    "constant": lambda rng: np.full((24, 640), 0.3, np.float32),
    "zeros in between": lambda rng: sparse(rng, 1.0),
    "denormal": lambda rng: sparse(rng, -1e-42),
    "tiny": lambda rng: normal(rng) * np.float32(1e-37),
    "large": lambda rng: normal(rng) * np.float32(1e3),
}


@EVERY
@pytest.mark.parametrize("kind", VALUES)
def test_the_bytes_are_onnxruntimes(encoding: Encoding, kind: str) -> None:
    values = VALUES[kind](np.random.default_rng(7))
    found = quantize_nbits(values, encoding)
    expected = laid_out(*parts_by_onnxruntime(values, encoding), encoding)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (24, encoding.row_bytes(640))
    assert has_finite_scales(found, encoding)


@EVERY
def test_values_are_what_onnxruntime_makes_of_the_blocks(encoding: Encoding) -> None:
    """GatherBlockQuantized of every row dequantizes them all."""
    values = normal(np.random.default_rng(3))
    kind = NBITS[encoding]
    codes, scales, zeros = parts_by_onnxruntime(values, encoding)
    initializers = [
        numpy_helper.from_array(codes.reshape(len(codes), -1), "codes"),
        numpy_helper.from_array(scales, "scales"),
        *([numpy_helper.from_array(zeros, "zeros")] if kind.asymmetric else []),
    ]
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "ids", "scales", *(["zeros"] if kind.asymmetric else [])],
        ["values"], domain="com.microsoft", bits=kind.bits, block_size=encoding.block_elements,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    onnx_type = TensorProto.FLOAT if kind.scale == np.float32 else TensorProto.FLOAT16
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("values", onnx_type, None)],
        initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {"ids": np.arange(len(values))})
    found = decode_f32(quantize_nbits(values, encoding), encoding)
    np.testing.assert_array_equal(found.astype(kind.scale), expected)
    error = np.linalg.norm(found - values) / np.linalg.norm(values)
    assert error < {4: 0.2, 8: 0.02}[kind.bits]


def test_rows_are_independent_and_threads_make_no_difference() -> None:
    values = normal(np.random.default_rng(1))
    for encoding in NBITS:
        whole = quantize_nbits(values, encoding)
        with ThreadPoolExecutor(4) as pool:
            rows = pool.map(
                lambda i, e=encoding: quantize_nbits(values[i : i + 3], e), range(0, 24, 3)
            )
            np.testing.assert_array_equal(np.concatenate(list(rows)), whole)


def test_the_source_is_left_as_it_was() -> None:
    values = normal(np.random.default_rng(1))
    before = values.copy()
    for encoding in NBITS:
        quantize_nbits(values, encoding)
    np.testing.assert_array_equal(values, before)


@EVERY
def test_a_scale_that_its_type_cannot_hold_is_told(encoding: Encoding) -> None:
    values = normal(np.random.default_rng(1))
    values[3, 5] = 3e38 if NBITS[encoding].scale == np.float32 else 1e5
    values[3, 6] = -values[3, 5]
    symmetric_float32 = not NBITS[encoding].asymmetric and NBITS[encoding].scale == np.float32
    assert has_finite_scales(quantize_nbits(values, encoding), encoding) == symmetric_float32


@EVERY
def test_rows_that_fit_no_block_are_refused(encoding: Encoding) -> None:
    with pytest.raises(UnsupportedError, match="does not divide"):
        quantize_nbits(np.zeros((1, encoding.block_elements + 8), np.float32), encoding)


def test_the_fingerprint_sees_another_rounding() -> None:
    def by_onnxruntime(values: Array, encoding: Encoding) -> Array:
        return laid_out(*parts_by_onnxruntime(values, encoding), encoding)

    def rounding_down(values: Array, encoding: Encoding) -> Array:
        return quantize_nbits(np.nextafter(values, np.float32(0)), encoding)

    assert fingerprint() == fingerprint(by_onnxruntime)
    assert fingerprint(rounding_down) != fingerprint()


def test_every_form_is_there_once_and_none_is_ggmls() -> None:
    assert len({(e.block_elements, k) for e, k in NBITS.items()}) == len(NBITS) == 12
    assert not {e.name for e in NBITS} & set(ENCODINGS)
    assert all(e.ggml_type == NO_GGML_TYPE for e in NBITS)
    for encoding, kind in NBITS.items():
        zero = 1 if kind.asymmetric else 0
        codes = encoding.block_elements * kind.bits // 8
        assert encoding.block_bytes == kind.scale.itemsize + zero + codes
    assert NBits(4, False, np.dtype("f4")).middle == 8
