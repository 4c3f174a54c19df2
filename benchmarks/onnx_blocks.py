"""What each block type of an ONNX file costs: size, error of a weight, error and time of a product.

usage: python benchmarks/onnx_blocks.py [OUT INPUT]    # a weight's sizes; default 1536 576
Prints a Markdown table. The weight is normal; products are ONNX Runtime's MatMulNBits on one thread
of the CPU, against numpy's float64 product with the dequantized weight: the product's own error.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from converters.encodings import NBITS, Encoding, decode_f32
from converters.ggml import load_ggml
from converters.nbits import quantize_nbits
from converters.targets.onnx.weights import BITS, OFFSETS, Q4_0, Q4_1, Q8_0, parts_of, split_parts

FLOATS = np.dtype("f4")
REPEATS = 40


def encodings(columns: int) -> list[Encoding]:
    own = [e for e, kind in NBITS.items() if kind.scale == FLOATS]
    return [e for e in (Q4_0, Q4_1, Q8_0, *own) if columns % e.block_elements == 0]


def product(raw: Any, encoding: Encoding, shape: tuple[int, int], level: int) -> Any:
    """A session of one MatMulNBits, and what adds a Q4_1's offsets."""
    parts = parts_of(shape, encoding, FLOATS)
    arrays = {
        part.suffix: made.view(part.dtype).reshape(part.shape)
        for part, made in zip(parts, split_parts(raw, encoding, FLOATS), strict=True)
    }
    offsets = arrays.pop(OFFSETS, None)
    size, columns = encoding.block_elements, shape[1]
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", *arrays], ["p" if offsets is not None else "y"],
            domain="com.microsoft", K=columns, N=shape[0], bits=BITS[encoding], block_size=size,
            accuracy_level=level,
        )
    ]  # fmt: skip
    if offsets is not None:
        arrays |= {OFFSETS: offsets, "split": np.array([-1, columns // size, size])}
        arrays |= {"axis": np.array([2])}
        nodes += [
            helper.make_node("Reshape", ["x", "split"], ["blocks"]),
            helper.make_node("ReduceSum", ["blocks", "axis"], ["sums"], keepdims=0),
            helper.make_node("Gemm", ["sums", OFFSETS], ["o"], transB=1),
            helper.make_node("Add", ["p", "o"], ["y"]),
        ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info("x", kind, [None, columns])],
        [helper.make_tensor_value_info("y", kind, [None, shape[0]])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def milliseconds(session: Any, values: Any) -> float:
    """The fastest of some runs."""
    count, best = max(1, 50 // len(values)), float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(count):
            session.run(None, {"x": values})
        best = min(best, (time.perf_counter() - started) / count)
    return 1e3 * best


def relative(found: Any, right: Any) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def main(rows: int = 1536, columns: int = 576) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    one, many = (rng.standard_normal((n, columns)).astype(np.float32) for n in (1, 512))
    print(f"{rows} x {columns}, ONNX Runtime {onnxruntime.__version__}, onnx {onnx.__version__}")
    print("| blocks | bits a weight | error of the weight | level | error of a product"
          " | ms, 1 token | ms, 512 |")  # fmt: skip
    print("| --- " * 7 + "|")
    for encoding in encodings(columns):
        quantize = quantize_nbits if encoding in NBITS else None
        raw = quantize(weight, encoding) if quantize else load_ggml().quantize(encoding, weight)
        stored = sum(part.size_bytes for part in parts_of(weight.shape, encoding, FLOATS))
        dequantized = decode_f32(raw, encoding)
        right = many.astype(np.float64) @ dequantized.astype(np.float64).T
        for level in (0, 4):
            session = product(raw, encoding, (rows, columns), level)
            error = relative(session.run(None, {"x": many})[0], right)
            times = [milliseconds(session, values) for values in (one, many)]
            print(f"| {encoding.name} | {8 * stored / weight.size:.2f}"
                  f" | {relative(dequantized, weight):.2%} | {level} | {error:.1e}"
                  f" | {times[0]:.3f} | {times[1]:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
