"""Rows of blocks as numbers, by standard operators alone.

That is what an embedding needs, a row a token. com.microsoft's GatherBlockQuantized does it in one
node, but onnxruntime-web's WebAssembly has no kernel for it (1.31.0-dev, read from its error).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from converters.encodings import Encoding
from converters.targets.onnx.ops import Ops
from converters.targets.onnx.weights import BITS, CODES, OFFSETS, SCALES, ZERO_POINTS


def multiplied_out(
    ops: Ops, name: str, rows: Mapping[str, ir.Value], encoding: Encoding
) -> ir.Value:
    """Rows of the parts of a weight (``parts_of``), by suffix -> (batch, sequence, hidden).

    (code - zero point) scale + offset in the graph's own type, as MatMulNBits has it. Each of
    ``rows`` has two axes, batch and sequence, before its own.
    """
    bits, size = BITS[encoding], encoding.block_elements
    codes = _numbers(ops, f"{name}/codes", rows[CODES], bits)
    codes = ops.reshape(f"{name}/codes/Blocks", codes, [0, 0, -1, size])
    zero = ops.constant([2 ** (bits - 1)], ops.dtype.numpy())
    if ZERO_POINTS in rows:
        scale_count = ops(f"{name}/blocks", "Shape", rows[SCALES], start=2)
        zero = _zero_points(ops, f"{name}/zero_points", rows[ZERO_POINTS], bits, scale_count)
    whole = ops(f"{name}/Sub", "Sub", codes, zero)
    found = ops(f"{name}/Mul", "Mul", whole, _column(ops, f"{name}/scales", rows[SCALES]))
    if OFFSETS in rows:
        offsets = _column(ops, f"{name}/offsets", rows[OFFSETS])
        if not ops.is_float32:
            offsets = ops.cast(f"{name}/offsets/Cast", offsets, ops.dtype)
        found = ops(f"{name}/Add", "Add", found, offsets)
    return ops.reshape(f"{name}/Rows", found, [0, 0, -1])


def _zero_points(ops: Ops, name: str, packed: ir.Value, bits: int, blocks: ir.Value) -> ir.Value:
    """(batch, sequence, blocks, 1); where two share a byte, an odd number has one over."""
    flat = ops.reshape(f"{name}/Flat", _numbers(ops, name, packed, bits), [0, 0, -1])
    span = (ops.constant([0]), blocks, ops.constant([2]))
    return _column(ops, name, ops(f"{name}/Slice", "Slice", flat, *span))


def _numbers(ops: Ops, name: str, packed: ir.Value, bits: int) -> ir.Value:
    """The numbers in bytes, in the graph's own type; of 4 bits (.., 2), the low half first."""
    if bits == 8:
        return ops.cast(f"{name}/Cast", packed, ops.dtype)
    whole = ops.cast(f"{name}/Cast", packed, ir.DataType.INT32)
    sixteen = ops.constant([16], np.int32)
    high = ops(f"{name}/High", "Div", whole, sixteen)
    low = ops(f"{name}/Low", "Sub", whole, ops(f"{name}/Mul", "Mul", high, sixteen))
    halves = [_column(ops, f"{name}/Low", low), _column(ops, f"{name}/High", high)]
    pairs = ops(f"{name}/Concat", "Concat", *halves, axis=-1)
    return ops.cast(f"{name}/Numbers", pairs, ops.dtype)


def _column(ops: Ops, name: str, value: ir.Value) -> ir.Value:
    """With an axis of 1 behind the others."""
    return ops(f"{name}/Unsqueeze", "Unsqueeze", value, ops.constant([-1]))
