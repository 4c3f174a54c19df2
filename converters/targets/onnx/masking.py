"""Rows of a batch left as they are, with positions and a mask for the standard Attention operator.

Every column of the cache is the mask's column of the same number, so padding may stand anywhere,
and a batch may have several new tokens after a past. The price is a mask of new by all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from converters.targets.onnx.ops import Ops
from converters.targets.onnx.rows import ROWS, BatchSizes, batch_sizes, count_to, new_columns


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """A batch's rows in the caller's order."""

    ids: ir.Value  # (batch, sequence)
    sizes: BatchSizes
    new_mask: ir.Value  # int64 (batch, sequence)
    positions: ir.Value  # int64 (batch, sequence); 0 for what comes before a row's first token
    visible: ir.Value  # bool (batch, 1, sequence, total)

    def restored(self, ops: Ops, states: ir.Value, *, last: bool) -> ir.Value:
        """The states as they are, or each row's ``last`` real token."""
        if not last:
            return states
        wanted = ops(
            f"{ROWS}/Last", "ArgMax", self.new_mask, axis=1, keepdims=1, select_last_index=1
        )
        return self.sizes.gathered(ops, states, wanted)


def mask_rows(ops: Ops, ids: ir.Value, mask: ir.Value) -> MaskedRows:
    """The rows of (batch, sequence) ``ids`` under a (batch, total) ``mask`` of ones and zeros."""
    sizes = batch_sizes(ops, ids, mask)
    counted = ops(f"{ROWS}/positions/CumSum", "CumSum", mask, ops.constant(1))
    start = ops(f"{ROWS}/positions/Sub", "Sub", sizes.total, sizes.sequence)
    new = ops(f"{ROWS}/positions/Slice", "Slice", counted, start, sizes.total, ops.constant([1]))
    before = ops(f"{ROWS}/positions/Minus", "Sub", new, ops.constant([1]))
    return MaskedRows(
        ids=ids,
        sizes=sizes,
        new_mask=new_columns(ops, mask, sizes),
        positions=ops(f"{ROWS}/positions", "Max", before, ops.constant([0])),
        visible=_visible(ops, mask, sizes, start),
    )


def _visible(ops: Ops, mask: ir.Value, sizes: BatchSizes, start: ir.Value) -> ir.Value:
    """Which columns each new token sees: real ones up to its own, and always its own.

    A token of padding would see nothing without its own column, and a softmax of nothing is NaN.
    """
    name = f"{ROWS}/visible"
    every = count_to(ops, f"{name}/columns", sizes.total)  # (1, total)
    moved = ops(f"{name}/Add", "Add", sizes.columns, start)
    own = ops(f"{name}/Unsqueeze", "Unsqueeze", moved, ops.constant([2]))  # (1, sequence, 1)
    past = ops(f"{name}/LessOrEqual", "LessOrEqual", every, own)
    itself = ops(f"{name}/Equal", "Equal", every, own)
    real = ops.cast(f"{name}/Cast", mask, ir.DataType.BOOL)
    real = ops(f"{name}/Real", "Unsqueeze", real, ops.constant([1]))  # (batch, 1, total)
    seen = ops(f"{name}/And", "And", past, real)
    seen = ops(f"{name}/Or", "Or", seen, itself)
    return ops(name, "Unsqueeze", seen, ops.constant([1]))
