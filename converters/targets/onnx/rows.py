"""A batch's rows as the graph's input has them, and what every form of attention needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from converters.targets.onnx.ops import Ops

ROWS = "/model/rows"  # the name that index arithmetic stands under


class Rows(Protocol):
    """Rows in the order in which attention sees them."""

    @property
    def ids(self) -> ir.Value:
        """int64 (batch, sequence)."""

    @property
    def sizes(self) -> BatchSizes:
        """Of the batch as the caller gave it."""

    def restored(self, ops: Ops, states: ir.Value, *, last: bool) -> ir.Value:
        """(batch * sequence, hidden) in the caller's order, or each row's ``last`` real token."""


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sizes that are known only when the graph runs."""

    batch: ir.Value  # int64 (1,)
    sequence: ir.Value  # int64 (1,): new tokens
    total: ir.Value  # int64 (1,): past and new
    columns: ir.Value  # int64 (1, sequence): 0, 1, ...

    def shape(self, ops: Ops, size: int) -> ir.Value:
        """The shape (batch, sequence, size)."""
        return self._shape(ops, self.sequence, "sequence", size)

    def logits_shape(self, ops: Ops, size: int, *, last: bool) -> ir.Value:
        """The shape (batch, sequence or 1, size)."""
        return self._shape(ops, ops.constant([1]), "1", size) if last else self.shape(ops, size)

    def gathered(self, ops: Ops, states: ir.Value, wanted: ir.Value) -> ir.Value:
        """Columns ``wanted`` (batch, n) of each row of (batch * sequence, hidden), one by one."""
        name = f"{ROWS}/gather"
        scalar = ops(f"{name}/Squeeze", "Squeeze", self.batch)
        row = ops(f"{name}/Range", "Range", ops.constant(0), scalar, ops.constant(1))
        row = ops(f"{name}/Unsqueeze", "Unsqueeze", row, ops.constant([1]))
        first = ops(f"{name}/Mul", "Mul", row, self.sequence)
        flat = ops.reshape(f"{name}/Reshape", ops(f"{name}/Add", "Add", first, wanted), [-1])
        return ops(f"{name}/Gather", "Gather", states, flat)

    def _shape(self, ops: Ops, columns: ir.Value, label: str, size: int) -> ir.Value:
        name = f"{ROWS}/shape_{label}_{size}"
        return ops.once(
            name, lambda: ops(name, "Concat", self.batch, columns, ops.constant([size]), axis=0)
        )


def batch_sizes(ops: Ops, ids: ir.Value, mask: ir.Value) -> BatchSizes:
    """The sizes of (batch, sequence) ``ids`` under a (batch, total) ``mask``."""
    sequence = ops(f"{ROWS}/sequence", "Shape", ids, start=1, end=2)
    return BatchSizes(
        batch=ops(f"{ROWS}/batch", "Shape", ids, start=0, end=1),
        sequence=sequence,
        total=ops(f"{ROWS}/total", "Shape", mask, start=1, end=2),
        columns=count_to(ops, f"{ROWS}/columns", sequence),
    )


def count_to(ops: Ops, name: str, length: ir.Value) -> ir.Value:
    """int64 (1, length): 0, 1, ..."""
    scalar = ops(f"{name}/Squeeze", "Squeeze", length)
    counted = ops(f"{name}/Range", "Range", ops.constant(0), scalar, ops.constant(1))
    return ops(name, "Unsqueeze", counted, ops.constant([0]))


def new_columns(ops: Ops, mask: ir.Value, sizes: BatchSizes) -> ir.Value:
    """The last ``sequence`` columns of a (batch, total) ``mask``."""
    start = ops(f"{ROWS}/new/Sub", "Sub", sizes.total, sizes.sequence)
    return ops(f"{ROWS}/new/Slice", "Slice", mask, start, sizes.total, ops.constant([1]))
