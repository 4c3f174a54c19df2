"""Rows of a batch turned so that their real tokens come first, as GroupQueryAttention wants them.

GroupQueryAttention takes a row's length, not a mask, and counts positions from its first column: a
row with padding on the left would be attended to wrongly, without an error. So each row's new
columns are rotated left by their leading zeros, and the results rotated back. The past of a row
holds its real tokens first, whatever zeros stand in the mask's past columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.targets.onnx.ops import Ops
from converters.targets.onnx.rows import ROWS, BatchSizes, batch_sizes, new_columns


@dataclass(frozen=True, slots=True)
class TurnedRows:
    """A batch's rows with the padding of each behind its real tokens."""

    ids: ir.Value  # (batch, sequence), rotated
    sizes: BatchSizes
    last_index: ir.Value  # int32 (batch,): real tokens, past and new, minus one
    total: ir.Value  # int32 scalar: columns of the mask
    leading: ir.Value  # int64 (batch, 1): by how much a row was rotated
    new: ir.Value  # int64 (batch, 1): its real new tokens
    blame: ir.Value  # float (batch, 1): NaN where a row's new tokens have a hole, else 0

    def positions(self, ops: Ops) -> ir.Value:
        """int64 (batch, sequence): where each rotated column stands in its row."""
        return ops.once(f"{ROWS}/positions", lambda: self._positions(ops))

    def restored(self, ops: Ops, states: ir.Value, *, last: bool) -> ir.Value:
        """(batch * sequence, hidden) in the caller's order, or each row's ``last`` real token."""
        name = f"{ROWS}/restore"
        if last:
            wanted = ops(f"{name}/Last", "Sub", self.new, ops.constant([1]))
            wanted = ops(f"{name}/Max", "Max", wanted, ops.constant([0]))
        else:
            back = ops(f"{name}/Sub", "Sub", self.sizes.columns, self.leading)
            wanted = ops(f"{name}/Mod", "Mod", back, self.sizes.sequence)
        found = self.sizes.gathered(ops, states, wanted)
        shape = ops(f"{name}/Blame/Shape", "Shape", wanted)
        blame = ops(f"{name}/Blame/Expand", "Expand", self.blame, shape)
        blame = ops.reshape(f"{name}/Blame/Reshape", blame, [-1, 1])
        return ops(f"{name}/Blame/Add", "Add", found, blame)

    def _positions(self, ops: Ops) -> ir.Value:
        name = f"{ROWS}/positions"
        real = ops.cast(f"{name}/Cast", self.last_index, ir.DataType.INT64)
        ends = ops(f"{name}/Add", "Add", real, ops.constant([1]))
        column = ops(f"{name}/Unsqueeze", "Unsqueeze", ends, ops.constant([1]))
        past = ops(f"{name}/Sub", "Sub", column, self.new)
        return ops(name, "Add", past, self.sizes.columns)


def turn_rows(ops: Ops, ids: ir.Value, mask: ir.Value) -> TurnedRows:
    """The rows of (batch, sequence) ``ids`` under a (batch, total) ``mask`` of ones and zeros."""
    sizes = batch_sizes(ops, ids, mask)
    scalar = ops(f"{ROWS}/total/Squeeze", "Squeeze", sizes.total)
    new_mask = new_columns(ops, mask, sizes)
    axes = ops.constant([1])
    new = ops(f"{ROWS}/new/ReduceSum", "ReduceSum", new_mask, axes, keepdims=1)
    leading = ops(f"{ROWS}/leading", "ArgMax", new_mask, axis=1, keepdims=1)
    moved = ops(f"{ROWS}/ids/Add", "Add", sizes.columns, leading)
    index = ops(f"{ROWS}/ids/Mod", "Mod", moved, sizes.sequence)
    real = ops(f"{ROWS}/last/ReduceSum", "ReduceSum", mask, axes, keepdims=0)
    last = ops(f"{ROWS}/last/Sub", "Sub", real, ops.constant([1]))
    return TurnedRows(
        ids=ops(f"{ROWS}/ids", "GatherElements", ids, index, axis=1),
        sizes=sizes,
        last_index=ops.cast(f"{ROWS}/last", last, ir.DataType.INT32),
        total=ops.cast(f"{ROWS}/total/Cast", scalar, ir.DataType.INT32),
        leading=leading,
        new=new,
        blame=_blame(ops, new_mask, new, leading),
    )


def _blame(ops: Ops, new_mask: ir.Value, new: ir.Value, leading: ir.Value) -> ir.Value:
    """NaN where the ones of a row's new columns do not stand together."""
    name = f"{ROWS}/holes"
    last = ops(f"{name}/Last", "ArgMax", new_mask, axis=1, keepdims=1, select_last_index=1)
    span = ops(f"{name}/Sub", "Sub", last, leading)
    span = ops(f"{name}/Add", "Add", span, ops.constant([1]))
    whole = ops(f"{name}/Equal", "Equal", span, new)
    empty = ops(f"{name}/Empty", "Equal", new, ops.constant([0]))
    fine = ops(f"{name}/Or", "Or", whole, empty)
    kind = np.float32 if ops.dtype is ir.DataType.FLOAT else np.float16
    return ops(
        f"{name}/Where", "Where", fine, ops.constant([0], kind), ops.constant([np.nan], kind)
    )
