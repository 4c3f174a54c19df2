"""The frequencies that an ONNX file's cos and sin tables were made of, recovered from the tables.

A table's column follows one frequency: row p is cos(p f) and sin(p f), the angle rounded to
float32 (transformers' ``LlamaRotaryEmbedding.forward``). Near candidates a few units in the last
place apart are tried on every row, so a column is either reproduced from first to last row or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.containers.onnx import OnnxFile
from converters.errors import SourceError
from converters.rope.parameters import FloatArray

_ROWS = 4096  # compared at once
# float64 cos rounded to float32 and torch's own differ by 6e-8; float16 rounds by 2.4e-4, and by
# twice that where the float32 values it rounds lie on either side of a middle.
TABLE_TOLERANCE = {"float32": 1.5e-7, "float16": 5e-4}

_HINT = "Export it again: pi-convert export MODEL --to onnx --scale S"
# operator -> which inputs are the cos and the sin table
_ROTATING = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
_STANDARD_ROTARY = (1, 2)  # ai.onnx's RotaryEmbedding of opset 23

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tables:
    """The cos and sin tables of a file and their initializers, (positions, rotary_dim / 2)."""

    cos_name: str
    sin_name: str
    cos: npt.NDArray[np.floating]
    sin: npt.NDArray[np.floating]

    @property
    def rows(self) -> int:
        """Positions."""
        return int(self.cos.shape[0])

    @property
    def rotary_dim(self) -> int:
        """Channels that are rotated."""
        return 2 * int(self.cos.shape[1])

    def amplitude(self) -> float:
        """What cos and sin are multiplied by: the attention factor."""
        return float(self.cos[0].mean(dtype=np.float64))

    def shifted(self, position: int) -> Tables:
        """Row 0 is ``position``'s; rows before it come last."""
        cos, sin = np.roll(self.cos, -position, axis=0), np.roll(self.sin, -position, axis=0)
        return Tables(self.cos_name, self.sin_name, cos, sin)

    def as_mapping(self) -> dict[str, npt.NDArray[np.floating]]:
        """Initializer name to values."""
        return {self.cos_name: self.cos, self.sin_name: self.sin}


def stored_tables(file: OnnxFile) -> Tables:
    """The one pair of tables that every rotating node of a graph takes.

    Raises ``SourceError`` where there are none, several, or they are computed in the graph.
    """
    pairs = set()
    for node in file.nodes_of(*_ROTATING):
        places = _ROTATING[node.operator]
        if node.operator == "RotaryEmbedding" and len(node.inputs) > _STANDARD_ROTARY[1]:
            # com.microsoft's takes position_ids second, ai.onnx's last.
            second = node.inputs[_STANDARD_ROTARY[0]]
            places = _STANDARD_ROTARY if second in file.tensors else places
        pair = tuple(node.inputs[i] if i < len(node.inputs) else "" for i in places)
        if all(pair):
            pairs.add(pair)
    if len(pairs) != 1:
        found = "no cos and sin tables" if not pairs else f"{len(pairs)} pairs of tables"
        raise SourceError(f"{file.path.name}: {found}, expected one for all layers", hint=_HINT)
    ((cos, sin),) = pairs
    for name in (cos, sin):
        tensor = file.tensors.get(name)
        if tensor is None:
            raise SourceError(
                f"{file.path.name}: the table {name} is computed, not stored", hint=_HINT
            )
        if (
            tensor.dtype.name not in TABLE_TOLERANCE
            or len(tensor.shape) != 2
            or tensor.shape[0] < 2
        ):
            raise SourceError(
                f"{file.path.name}: {name} is {tensor.dtype.name} {list(tensor.shape)}, expected"
                " float32 or float16 (positions, rotary_dim / 2)",
                hint=_HINT,
            )
    cos_table, sin_table = file.tensors[cos].read(), file.tensors[sin].read()
    if cos_table.shape != sin_table.shape or cos_table.dtype != sin_table.dtype:
        raise SourceError(
            f"{file.path.name}: {cos} and {sin} are not of one shape and type", hint=_HINT
        )
    return Tables(cos, sin, cos_table, sin_table)


def tolerance(tables: Tables) -> float:
    """How far a right entry may be from its float64 value."""
    return TABLE_TOLERANCE[tables.cos.dtype.name]


def nearest_ulp(tables: Tables, expected: FloatArray, attention: float, limit: int) -> list[int]:
    """By how many units in the last place each column's frequency is off, ``limit + 1`` for more.

    A column counts as a frequency's where every row of cos and sin is within the tolerance.
    """
    offsets = sorted(range(-limit, limit + 1), key=abs)
    found = np.full(len(expected), limit + 1)
    for offset in offsets:
        left = found > limit
        if not left.any():
            break
        candidate = (expected.view(np.int32) + np.int32(offset)).view(np.float32)
        fits = _reproduced(tables, candidate, attention, left)
        found[left & fits] = abs(offset)
    return [int(value) for value in found]


def recovered_frequencies(tables: Tables) -> Floats:
    """Radians a position of every column, (rotary_dim / 2,); good to the tables' precision.

    The phase of row 1 is unwrapped at rows 2, 4, 8, ..., each halving the error that is left.
    """
    angles = np.arctan2(tables.sin[1].astype(np.float64), tables.cos[1].astype(np.float64))
    frequencies: Floats = np.mod(angles, 2 * np.pi)
    row = 2
    while row < tables.rows:
        sin, cos = tables.sin[row].astype(np.float64), tables.cos[row].astype(np.float64)
        expected = frequencies * row
        error = np.arctan2(sin, cos) - expected
        frequencies = (expected + np.mod(error + np.pi, 2 * np.pi) - np.pi) / row
        row *= 2
    return frequencies


def right_tables(
    tables: Tables, frequencies: FloatArray, attention: float
) -> npt.NDArray[np.floating]:
    """(2, rows, columns): what the file's tables would be of ``frequencies``, in its own type."""
    made = np.empty((2, *tables.cos.shape), tables.cos.dtype)
    for start, cos, sin in _rebuilt(tables.rows, frequencies, attention):
        made[0, start : start + len(cos)] = cos
        made[1, start : start + len(sin)] = sin
    return made


def _reproduced(
    tables: Tables, frequencies: FloatArray, attention: float, columns: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    fits = columns.copy()
    for start, cos, sin in _rebuilt(tables.rows, frequencies, attention):
        stop = start + len(cos)
        for found, right in ((tables.cos, cos), (tables.sin, sin)):
            difference = np.abs(found[start:stop] - right)
            fits &= (difference <= tolerance(tables) * max(1.0, attention)).all(axis=0)
        if not fits.any():
            break
    return fits


def _rebuilt(
    rows: int, frequencies: FloatArray, attention: float
) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    for start in range(0, rows, _ROWS):
        positions = np.arange(start, min(start + _ROWS, rows), dtype=np.float32)
        angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
        cos, sin = np.cos(angles) * attention, np.sin(angles) * attention
        yield start, cos.astype(np.float32), sin.astype(np.float32)
