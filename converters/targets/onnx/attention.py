"""Attention over past and new tokens, rotated by the tables: fused, or in standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir

from converters.architectures import HParams
from converters.targets.onnx.masking import MaskedRows
from converters.targets.onnx.ops import MICROSOFT, Ops
from converters.targets.onnx.padding import TurnedRows

_ROTARY_MULTIPLE = 16  # what GroupQueryAttention's own rotation takes


@dataclass(frozen=True, slots=True)
class States:
    """One layer's projections (batch, sequence, heads * head_dim) and its cache."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past: Sequence[ir.Value]  # key and value
    present: Sequence[ir.Value]  # key and value as the graph's outputs declare them


class Attention(Protocol):
    """One form of attention."""

    def __call__(self, prefix: str, states: States) -> tuple[ir.Value, list[ir.Value]]:
        """What was attended to, (batch, sequence, query size), and the present key and value."""


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """com.microsoft's GroupQueryAttention, which rotates where it can: no matrix of new by all."""

    ops: Ops
    sizes: HParams
    rows: TurnedRows
    tables: tuple[ir.Value, ir.Value]  # cos, sin

    def __call__(self, prefix: str, states: States) -> tuple[ir.Value, list[ir.Value]]:
        """What was attended to, (batch, sequence, query size), and the present key and value."""
        inside = self.sizes.head_dim % _ROTARY_MULTIPLE == 0
        query, key = states.query, states.key
        if not inside:
            query = self._rotated(f"{prefix}/q_proj", query, self.sizes.heads)
            key = self._rotated(f"{prefix}/k_proj", key, self.sizes.kv_heads)
        tables = self.tables if inside else ()
        inputs = query, key, states.value, *states.past, self.rows.last_index, self.rows.total
        return _attend(
            self.ops, f"{prefix}/GroupQueryAttention", (*inputs, *tables), states.present,
            domain=MICROSOFT, num_heads=self.sizes.heads, kv_num_heads=self.sizes.kv_heads,
            scale=self.sizes.head_dim**-0.5, do_rotary=int(inside), rotary_interleaved=0,
        )  # fmt: skip

    def _rotated(self, prefix: str, states: ir.Value, heads: int) -> ir.Value:
        return self.ops(
            f"{prefix}/RotaryEmbedding", "RotaryEmbedding",
            states, self.rows.positions(self.ops), *self.tables,
            domain=MICROSOFT, num_heads=heads, interleaved=0, rotary_embedding_dim=0,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StandardAttention:
    """Opset 23's RotaryEmbedding, and its Attention with a mask."""

    ops: Ops
    sizes: HParams
    rows: MaskedRows
    tables: tuple[ir.Value, ir.Value]

    def __call__(self, prefix: str, states: States) -> tuple[ir.Value, list[ir.Value]]:
        """What was attended to, (batch, sequence, query size), and the present key and value."""
        query = self._rotated(f"{prefix}/q_proj", states.query, self.sizes.heads)
        key = self._rotated(f"{prefix}/k_proj", states.key, self.sizes.kv_heads)
        return _attend(
            self.ops, f"{prefix}/Attention",
            (query, key, states.value, self.rows.visible, *states.past), states.present,
            q_num_heads=self.sizes.heads, kv_num_heads=self.sizes.kv_heads,
            scale=self.sizes.head_dim**-0.5, softmax_precision=ir.DataType.FLOAT.value,
        )  # fmt: skip

    def _rotated(self, prefix: str, states: ir.Value, heads: int) -> ir.Value:
        return self.ops(
            f"{prefix}/RotaryEmbedding", "RotaryEmbedding",
            states, *self.tables, self.rows.positions, num_heads=heads, interleaved=0,
        )  # fmt: skip


def _attend(
    ops: Ops,
    name: str,
    inputs: Sequence[ir.Value],
    present: Sequence[ir.Value],
    **attributes: Any,
) -> tuple[ir.Value, list[ir.Value]]:
    op_type = name.rsplit("/", 1)[-1]
    outputs = [f"{name}/output_0", *(value.name or "" for value in present)]
    attended, *made = ops.all(name, op_type, *inputs, outputs=outputs, **attributes)
    for value, declared in zip(made, present, strict=True):
        value.type, value.shape = declared.type, declared.shape
    return attended, made
