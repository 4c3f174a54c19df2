"""ONNX files: the graph parsed by onnx, the weights beside it checked and read on demand.

Format: onnx 1.x ``TensorProto`` with ``data_location`` EXTERNAL (docs/ExternalData.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import EnvironmentNotReadyError, SourceError
from converters.install import install_line

_MAX_GRAPH_BYTES = 2**31 - 1  # protobuf's own limit
_REFETCH = "Export it again, or copy the .onnx file together with its .onnx_data file."


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """An initializer: inline, or ``offset`` bytes into ``file``."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0
    inline: npt.NDArray[Any] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis; of all of it where there is one axis."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return prod(self.shape) * self.dtype.itemsize // max(rows, 1)

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` along the first axis."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        if self.inline is not None:
            return self.inline[start:stop] if self.shape else self.inline
        if self.file is None:
            raise SourceError(f"{self.name}: it has no data", hint=_REFETCH)
        count = prod((stop - start, *self.shape[1:])) if self.shape else 1
        step = prod(self.shape[1:]) * self.dtype.itemsize
        with self.file.open("rb") as file:
            raw = os.pread(file.fileno(), count * self.dtype.itemsize, self.offset + start * step)
        if len(raw) != count * self.dtype.itemsize:
            raise SourceError(f"{self.file}: {self.name} is cut off", hint=_REFETCH)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return np.frombuffer(raw, self.dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """A node: its name, operator, and the names of its inputs ("" where one is left out)."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A parsed graph; ``properties`` are its metadata_props."""

    path: Path
    tensors: Mapping[str, OnnxTensor]
    nodes: tuple[OnnxNode, ...]
    inputs: Mapping[str, tuple[int | str, ...]]  # name -> shape
    input_types: Mapping[str, str]  # name -> float32, int64, ...
    outputs: Mapping[str, tuple[int | str, ...]]
    properties: Mapping[str, str]
    size_bytes: int  # of the graph and of its data files

    def nodes_of(self, *operators: str) -> tuple[OnnxNode, ...]:
        """The nodes of some operators, in the graph's order."""
        return tuple(node for node in self.nodes if node.operator in operators)


def read_onnx_file(path: Path) -> OnnxFile:
    """The graph at ``path``. Raises ``SourceError`` for what is no whole ONNX model.

    Every initializer has to lie inside a data file in the graph's own folder.
    """
    onnx = _onnx()
    if not path.is_file():
        raise SourceError(f"{path}: no such file", hint="Give an .onnx file or its folder.")
    if path.stat().st_size > _MAX_GRAPH_BYTES:
        raise SourceError(f"{path}: a graph of more than 2 GiB is no ONNX file", hint=_REFETCH)
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError; its class depends on the implementation
        if isinstance(error, OSError):
            raise
        raise SourceError(f"{path}: no ONNX model: {error}", hint=_REFETCH) from error
    if not model.graph.node:
        raise SourceError(f"{path}: the model has no nodes", hint=_REFETCH)
    tensors = {t.name: _tensor(onnx, t, path) for t in model.graph.initializer}
    files = {t.file for t in tensors.values() if t.file is not None}
    return OnnxFile(
        path=path,
        tensors=tensors,
        nodes=tuple(_node(onnx, node) for node in model.graph.node),
        inputs={value.name: _shape(value) for value in model.graph.input},
        input_types={value.name: _type(onnx, value) for value in model.graph.input},
        outputs={value.name: _shape(value) for value in model.graph.output},
        properties={entry.key: entry.value for entry in model.metadata_props},
        size_bytes=path.stat().st_size + sum(file.stat().st_size for file in files),
    )


def companion_folder(path: Path) -> Path:
    """The folder of config.json and the tokenizer: the graph's own, or the one above ``onnx/``."""
    return path.parent.parent if path.parent.name == "onnx" else path.parent


def graph_files(path: Path) -> list[Path]:
    """The .onnx files of ``path``: itself, or those of a folder and of its subfolder onnx."""
    if path.is_file():
        return [path]
    return sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError:
        raise EnvironmentNotReadyError("onnx is not installed", hint=install_line("onnx")) from None
    return onnx


def _tensor(onnx: Any, proto: Any, path: Path) -> OnnxTensor:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    shape = tuple(proto.dims)
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        values = onnx.numpy_helper.to_array(proto)
        return OnnxTensor(proto.name, dtype, shape, inline=values)
    place = {entry.key: entry.value for entry in proto.external_data}
    file = _data_file(place.get("location", ""), proto.name, path)
    size = prod(shape) * dtype.itemsize
    try:
        offset, length = int(place.get("offset", 0)), int(place.get("length", size))
    except ValueError as error:
        raise SourceError(f"{path}: {proto.name}: {error}", hint=_REFETCH) from error
    if length != size:
        raise SourceError(
            f"{path}: {proto.name} has {length} bytes, its shape needs {size}", hint=_REFETCH
        )
    if offset < 0 or offset + size > file.stat().st_size:
        raise SourceError(
            f"{file}: {proto.name} ends at byte {offset + size}, the file has"
            f" {file.stat().st_size}",
            hint=_REFETCH,
        )
    return OnnxTensor(proto.name, dtype, shape, file, offset)


def _data_file(location: str, name: str, path: Path) -> Path:
    inside = Path(location)
    if not location or inside.is_absolute() or ".." in inside.parts:
        raise SourceError(
            f"{path}: {name} points to {location!r}",
            hint="Weights have to lie in the folder of the graph.",
        )
    file = path.parent / inside
    if not file.is_file():
        raise SourceError(f"{path}: its data file {location} is missing", hint=_REFETCH)
    return file


def _node(onnx: Any, node: Any) -> OnnxNode:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return OnnxNode(node.name, node.op_type, tuple(node.input), attributes)


def _shape(value: Any) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)


def _type(onnx: Any, value: Any) -> str:
    kind = value.type.tensor_type.elem_type
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else ""
