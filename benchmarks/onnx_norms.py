"""A residual and its norm as one fused operator, or as two: what an ONNX graph had better have.

usage: python benchmarks/onnx_norms.py [LAYERS HIDDEN]    # default 60 576
Prints a Markdown table: a chain of additions and RMS norms in float32 on the CPU provider,
all cores, the fastest of 40 interleaved runs. The fused graph takes com.microsoft's
SkipSimplifiedLayerNormalization, the other Add and RMSNormalization of opset 23.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

REPEATS = 40
EPSILON = 1e-5


def chain(layers: int, hidden: int, *, fused: bool) -> Any:
    """A session: every layer adds the input to the running sum and norms it."""
    nodes, total = [], "x"
    for i in range(layers):
        names = {"normed": f"normed{i}", "sum": f"sum{i}"}
        if fused:
            nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization", [total, "x", "w"],
                    [names["normed"], "", "", names["sum"]],
                    domain="com.microsoft", epsilon=EPSILON,
                )
            )  # fmt: skip
        else:
            nodes += [
                helper.make_node("Add", [total, "x"], [names["sum"]]),
                helper.make_node(
                    "RMSNormalization", [names["sum"], "w"], [names["normed"]],
                    axis=-1, epsilon=EPSILON,
                ),
            ]  # fmt: skip
        nodes.append(helper.make_node("Add", [names["sum"], names["normed"]], [f"total{i}"]))
        total = f"total{i}"
    shape = ["rows", hidden]
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ones(hidden, np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString())


def main(layers: int = 60, hidden: int = 576) -> None:
    print(f"{layers} layers of {hidden}, ONNX Runtime {onnxruntime.__version__}\n")
    print("| rows | fused, ms | two operators, ms | fused / two | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    sessions = [chain(layers, hidden, fused=fused) for fused in (True, False)]
    rng = np.random.default_rng(0)
    for rows in (1, 128, 512):
        x = rng.standard_normal((rows, hidden)).astype(np.float32)
        best, found = [float("inf")] * 2, [s.run(None, {"x": x})[0] for s in sessions]
        for _ in range(REPEATS):
            for i, session in enumerate(sessions):
                started = time.perf_counter()
                session.run(None, {"x": x})
                best[i] = min(best[i], 1e3 * (time.perf_counter() - started))
        difference = np.abs(found[0] - found[1]).max() / np.abs(found[1]).max()
        print(f"| {rows} | {best[0]:.3f} | {best[1]:.3f} | {best[0] / best[1]:.2f}"
              f" | {difference:.1e} |")  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
