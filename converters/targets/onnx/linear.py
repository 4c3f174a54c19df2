"""Weights as a graph multiplies by them: plain floats, or blocks through com.microsoft's nodes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from converters.targets.onnx.blocks import multiplied_out
from converters.targets.onnx.ops import MICROSOFT, Ops
from converters.targets.onnx.plan import EMBEDDING, OnnxPlan, Place
from converters.targets.onnx.weights import BITS, CODES, OFFSETS, SCALES, ZERO_POINTS

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
        ops, encoding = self._ops, self._plan.encodings[EMBEDDING]
        if encoding not in BITS:
            return ops(f"{name}/Gather", "Gather", self.value(EMBEDDING), ids)
        rows = {
            suffix: ops(f"{name}/Gather{suffix}", "Gather", self._stored(place), ids)
            for suffix, place in self._parts(EMBEDDING).items()
        }
        return multiplied_out(ops, name, rows, encoding)

    def linear(self, name: str, weight: str, states: ir.Value) -> ir.Value:
        """States (rows, in) times a weight (out, in) transposed, plus its bias where it has one."""
        ops, encoding = self._ops, self._plan.encodings[f"{weight}.weight"]
        bias = self.value(f"{weight}.bias") if f"{weight}.bias" in self._plan.places else None
        if encoding not in BITS:
            value = self.value(f"{weight}.weight")
            return ops(f"{name}/MatMul", "Gemm", states, value, bias, transB=1)
        parts = self._parts(f"{weight}.weight")
        out, blocks, _ = parts[CODES].part.shape
        size = encoding.block_elements
        scales, zeros = [*self._scaling(parts), None][:2]
        product = ops(
            f"{name}/MatMul", "MatMulNBits",
            states, self._stored(parts[CODES]), scales, zeros, None, bias,
            domain=MICROSOFT, K=blocks * size, N=out, bits=BITS[encoding], block_size=size,
            accuracy_level=self._accuracy_level,
        )  # fmt: skip
        if OFFSETS not in parts:
            return product
        sums = self._block_sum(states, blocks, size)
        offset = ops(f"{name}/Offset/MatMul", "Gemm", sums, self._stored(parts[OFFSETS]), transB=1)
        return ops(f"{name}/Offset/Add", "Add", product, self._back(f"{name}/Offset", offset))

    def _parts(self, weight: str) -> dict[str, Place]:
        return {place.part.suffix: place for place in self._plan.places[weight]}

    def _scaling(self, parts: Mapping[str, Place]) -> list[ir.Value]:
        """Scales, and zero points where blocks have their own."""
        return [self._stored(parts[suffix]) for suffix in (SCALES, ZERO_POINTS) if suffix in parts]

    def _back(self, name: str, value: ir.Value) -> ir.Value:
        """A float32 value in the graph's own type."""
        return (
            value
            if self._ops.is_float32
            else self._ops.cast(f"{name}/Cast", value, self._ops.dtype)
        )

    def _block_sum(self, states: ir.Value, blocks: int, size: int) -> ir.Value:
        """(rows, in) -> the float32 sum of each block, (rows, in / size); once for each input."""
        ops, name = self._ops, f"{states.name}/BlockSum"

        def make() -> ir.Value:
            split = ops.reshape(f"{name}/Reshape", states, [-1, blocks, size])
            if not ops.is_float32:
                split = ops.cast(f"{name}/Cast", split, ir.DataType.FLOAT)
            return ops(f"{name}/ReduceSum", "ReduceSum", split, ops.constant([2]), keepdims=0)

        return ops.once(name, make)

    def _stored(self, place: Place) -> ir.Value:
        part, name = place.part, place.name
        where = (self._plan.precision.data_name, place.offset, part.size_bytes)
        kind = _TYPES[part.dtype.str[1:]]
        return self._ops.once(name, lambda: self._ops.external(name, kind, part.shape, where))
