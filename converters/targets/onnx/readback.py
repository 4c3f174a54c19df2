"""A finished file read again by other code than wrote it: onnx's checker and ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import Checkpoint
from converters.errors import OutputError
from converters.targets.onnx.plan import COS, SIN, OnnxPlan
from converters.targets.onnx.tables import rope_tables

_ROWS = 4096  # of a table compared at once
# numpy's cos and torch's differ in their last bits; the tables follow float64 rounded once.
TABLE_TOLERANCE = {"float32": 1e-7, "float16": 5e-4}


def check_graph(path: Path, checkpoint: Checkpoint, plan: OnnxPlan) -> None:
    """Raises ``OutputError`` unless onnx accepts the graph and its tables are the checkpoint's."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise _bug(path, f"onnx's checker refuses it: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    tables = {}
    for tensor in model.graph.initializer:
        if tensor.name in (COS, SIN):
            load_external_data_for_tensor(tensor, str(path.parent))
            tables[tensor.name] = onnx.numpy_helper.to_array(tensor)
    _check_tables(path, checkpoint, plan, tables)


def _check_tables(path: Path, checkpoint: Checkpoint, plan: OnnxPlan, tables: Any) -> None:
    rope = checkpoint.rope
    for start in range(0, plan.table_rows, _ROWS):
        stop = min(start + _ROWS, plan.table_rows)
        expected = rope_tables(rope.inv_freq(), rope.attention_factor, start, stop)
        for name, right in zip((COS, SIN), expected, strict=True):
            found = tables[name][start:stop]
            tolerance = TABLE_TOLERANCE[found.dtype.name]
            if found.shape != right.shape or not np.allclose(
                found.astype(np.float32), right, rtol=0, atol=tolerance
            ):
                raise _bug(path, f"{name} is not the table of {json.dumps(rope.kind)} RoPE")


def _bug(path: Path, found: str) -> OutputError:
    return OutputError(
        f"{path.name}: {found}", hint="This is a bug in pi-convert; the output was removed."
    )
