"""Nodes appended to an onnx-ir graph one by one, each named after its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"

Shape = Sequence[int | str | None]


class Ops:
    """The nodes and initializers of one graph, in order; every method gives the node's output."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype  # of activations
        self.initializers: list[ir.Value] = []
        self._nodes: dict[str, ir.Node] = {}
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._once: dict[str, ir.Value] = {}

    @property
    def is_float32(self) -> bool:
        """Whether activations are float32."""
        return self.dtype is ir.DataType.FLOAT

    @property
    def nodes(self) -> list[ir.Node]:
        """Every node, each after those it takes its inputs from."""
        return list(self._nodes.values())

    def __call__(
        self,
        name: str,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """One node; ``outputs`` names its outputs, "" for one that is not wanted."""
        if name in self._nodes:
            raise ValueError(f"two nodes are named {name}")
        names = outputs or [f"{name}/output_0"]
        values = [ir.Value(name=output) for output in names]
        node = ir.node(op_type, list(inputs), attributes, domain=domain, outputs=values, name=name)
        self._nodes[name] = node
        return values[0]

    def all(self, name: str, op_type: str, *inputs: ir.Value | None, **keywords: Any) -> list[Any]:
        """As a call, with every output of the node."""
        self(name, op_type, *inputs, **keywords)
        return list(self._nodes[name].outputs)

    def once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """What ``make`` gives, made the first time that ``name`` is asked for."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, stored in the graph once."""
        array = np.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            kind = array.dtype.name
            joined = "_".join(str(v) for v in array.reshape(-1).tolist())
            shape = "x".join(map(str, array.shape)) or "scalar"
            self._constants[key] = self._add(
                ir.tensor(array, name=f"/constants/{kind}/{shape}/{joined}")
            )
        return self._constants[key]

    def external(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], place: tuple[str, int, int]
    ) -> ir.Value:
        """An initializer whose bytes are at (file, offset, length) of the data file."""
        location, offset, length = place
        return self._add(
            ir.ExternalTensor(location, offset, length, dtype, shape=ir.Shape(shape), name=name)
        )

    def _add(self, tensor: Any) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def reshape(self, name: str, value: ir.Value, shape: ir.Value | Sequence[int]) -> ir.Value:
        """``value`` in another shape; no bytes move."""
        target = shape if isinstance(shape, ir.Value) else self.constant(list(shape))
        return self(name, "Reshape", value, target)

    def cast(self, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``."""
        return self(name, "Cast", value, to=dtype)
