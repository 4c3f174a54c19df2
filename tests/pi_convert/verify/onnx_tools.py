"""ONNX folders for tests, edited through the onnx library: none of our writing code takes part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

COS, SIN = "cos_cache", "sin_cache"
ROPE = "pi_convert.rope"


@dataclass
class EditableOnnx:
    """A graph with its weights in memory, and the small files beside it."""

    model: onnx.ModelProto
    files: dict[str, dict[str, Any]]  # JSON files of the folder, by name
    removed: set[str] = field(default_factory=set)

    def names(self) -> list[str]:
        return [tensor.name for tensor in self.model.graph.initializer]

    def get(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._proto(name)).copy()

    def set(self, name: str, values: np.ndarray) -> None:
        self._proto(name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type == operator]

    def record(self) -> dict[str, Any]:
        """What the file says of its own RoPE."""
        return json.loads(next(p.value for p in self.model.metadata_props if p.key == ROPE))

    def set_record(self, **values: Any) -> None:
        for entry in self.model.metadata_props:
            if entry.key == ROPE:
                entry.value = json.dumps({**self.record(), **values})

    def remove_property(self, key: str) -> None:
        kept = [entry for entry in self.model.metadata_props if entry.key != key]
        del self.model.metadata_props[:]
        self.model.metadata_props.extend(kept)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Cos and sin, float64 (positions, rotary_dim / 2)."""
        return self.get(COS).astype(np.float64), self.get(SIN).astype(np.float64)

    def set_tables(self, frequencies: np.ndarray, *, rows: int | None = None) -> None:
        """Tables of other frequencies, in the file's own type."""
        old = self.get(COS)
        positions = np.arange(rows or len(old), dtype=np.float32)
        angles = (positions[:, None] * frequencies.astype(np.float32)[None]).astype(np.float64)
        self.set(COS, np.cos(angles).astype(old.dtype))
        self.set(SIN, np.sin(angles).astype(old.dtype))

    def _proto(self, name: str) -> onnx.TensorProto:
        return next(t for t in self.model.graph.initializer if t.name == name)


def frequencies(theta: float, factor: float, columns: int) -> np.ndarray:
    """Radians a position, as the paper writes them: theta^(-2j/d) / s."""
    return theta ** (-np.arange(columns) / columns) / factor


def edit_onnx(graph: Path, folder: Path, change: Callable[[EditableOnnx], None]) -> Path:
    """A copy of the export that ``graph`` stands in, changed; the path of its graph."""
    source = graph.parent.parent
    shutil.copytree(source, folder)
    copy = folder / "onnx" / graph.name
    files = {
        path.name: json.loads(path.read_text("utf-8"))
        for path in folder.glob("*.json")
        if path.name != "tokenizer.json"
    }
    editable = EditableOnnx(onnx.load(str(copy)), files)
    change(editable)
    data = f"{graph.name}_data"
    copy.unlink()
    (copy.parent / data).unlink(missing_ok=True)
    onnx.save_model(
        editable.model, str(copy), save_as_external_data=True, all_tensors_to_one_file=True,
        location=data, size_threshold=1024,
    )  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    for name in editable.removed:
        (folder / name).unlink()
    return copy
