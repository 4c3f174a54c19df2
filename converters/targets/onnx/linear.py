"""Weights as a graph multiplies by them: plain floats, or blocks through com.microsoft's nodes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from converters.targets.onnx.ops import MICROSOFT, Ops
from converters.targets.onnx.plan import EMBEDDING, OnnxPlan, Place
from converters.targets.onnx.weights import BITS, BLOCK, Q4_1

_TYPES = {"f4": ir.DataType.FLOAT, "f2": ir.DataType.FLOAT16, "u1": ir.DataType.UINT8}


class Weights:
    """The initializers of ``plan`` in one graph; each stands in it once it is asked for."""

    def __init__(self, ops: Ops, plan: OnnxPlan, accuracy_level: int) -> None:
        self._ops = ops
        self._plan = plan
        self._accuracy_level = accuracy_level

    def value(self, name: str) -> ir.Value:
        """A weight or table that is stored as plain floats."""
        (place,) = self._plan.places[name]
        return self._stored(place)

    def embedding(self, name: str, ids: ir.Value) -> ir.Value:
        """(batch, sequence) ids -> (batch, sequence, hidden)."""
        encoding = self._plan.encodings[EMBEDDING]
        if encoding not in BITS:
            return self._ops(f"{name}/Gather", "Gather", self.value(EMBEDDING), ids)
        codes, scales = self._plan.places[EMBEDDING]
        # The bytes of MatMulNBits' codes, as (rows, bytes): on disk they stand once.
        rows = codes.part.shape[0]
        table = self._stored(codes, "_flat", (rows, codes.part.size_bytes // rows))
        return self._ops(
            f"{name}/Gather", "GatherBlockQuantized", table, ids, self._stored(scales),
            domain=MICROSOFT, bits=BITS[encoding], block_size=BLOCK,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def linear(self, name: str, weight: str, states: ir.Value) -> ir.Value:
        """States (rows, in) times a weight (out, in) transposed, plus its bias where it has one."""
        ops, encoding = self._ops, self._plan.encodings[f"{weight}.weight"]
        parts = self._plan.places[f"{weight}.weight"]
        values = [self._stored(place) for place in parts]
        bias = self.value(f"{weight}.bias") if f"{weight}.bias" in self._plan.places else None
        if encoding not in BITS:
            return ops(f"{name}/MatMul", "Gemm", states, values[0], bias, transB=1)
        out, blocks, _ = parts[0].part.shape
        product = ops(
            f"{name}/MatMul", "MatMulNBits", states, *values[:2], None, None, bias,
            domain=MICROSOFT, K=blocks * BLOCK, N=out, bits=BITS[encoding], block_size=BLOCK,
            accuracy_level=self._accuracy_level,
        )  # fmt: skip
        if encoding is not Q4_1:
            return product
        sums = self._block_sum(states, blocks)
        offset = ops(f"{name}/Offset/MatMul", "Gemm", sums, values[2], transB=1)
        return ops(f"{name}/Offset/Add", "Add", product, offset)

    def _block_sum(self, states: ir.Value, blocks: int) -> ir.Value:
        """(rows, in) -> the sum of each block of 32, (rows, in / 32); made once for each input."""
        ops, name = self._ops, f"{states.name}/BlockSum"

        def make() -> ir.Value:
            split = ops.reshape(f"{name}/Reshape", states, [-1, blocks, BLOCK])
            return ops(f"{name}/ReduceSum", "ReduceSum", split, ops.constant([2]), keepdims=0)

        return ops.once(name, make)

    def _stored(
        self, place: Place, suffix: str = "", shape: Sequence[int] | None = None
    ) -> ir.Value:
        part, name = place.part, f"{place.name}{suffix}"
        where = (self._plan.precision.data_name, place.offset, part.size_bytes)
        kind = _TYPES[part.dtype.str[1:]]
        return self._ops.once(
            name, lambda: self._ops.external(name, kind, shape or part.shape, where)
        )
