"""Weights of a graph that onnxruntime-genai's model builder wrote, under Hugging Face's names.

The builder (onnxruntime-genai 0.18, ``models/builders/base.py``) transposes matrices for MatMul,
joins q, k and v where it can, adds biases in nodes of their own, and leaves a tied embedding out.
Float graphs alone: its blocks are another quantizer's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.architectures import HParams
from converters.containers.onnx import OnnxTensor
from converters.encodings import F16, F32, Encoding
from converters.tensor import Tensor

_FLOATS: Mapping[str, Encoding] = {"float32": F32, "float16": F16}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.(weight|bias)")
_JOINED = ("q_proj", "k_proj", "v_proj")
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_BUILT_HEAD = "lm_head.MatMul.weight"

Raw = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Place:
    """An initializer, whether it is transposed, and which of its columns or elements are meant."""

    initializer: str
    transposed: bool = False
    first: int = 0
    count: int | None = None


def places(name: str, sizes: HParams) -> tuple[Place, ...]:
    """Where the builder may have put the weight ``name``, the likelier first."""
    if name == _NORM:
        return (Place(f"model.layers.{sizes.layers}.final_norm_layernorm.weight"),)
    if name in (_EMBEDDING, _HEAD):
        return (Place(_BUILT_HEAD, transposed=True),)
    found = _LAYER.fullmatch(name)
    if found is None:
        return ()
    layer, block, part, kind = found.groups()
    prefix = f"model.layers.{layer}.{'attn' if block == 'self_attn' else 'mlp'}"
    node, turned = ("MatMul", True) if kind == "weight" else ("Add", False)
    alone = Place(f"{prefix}.{part}.{node}.{kind}", turned)
    if part not in _JOINED:
        return (alone,)
    widths = dict(zip(_JOINED, (sizes.query_size, sizes.kv_size, sizes.kv_size), strict=True))
    first = sum(widths[other] for other in _JOINED[: _JOINED.index(part)])
    joined = Place(f"{prefix}.qkv_proj.{node}.{kind}", turned, first, widths[part])
    return (joined, alone)


def built_weight(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, OnnxTensor], sizes: HParams
) -> tuple[Tensor, str] | None:
    """The weight and its initializer; None where the builder's names are not there, or differ."""
    for place in places(name, sizes):
        stored = tensors.get(place.initializer)
        if stored is None or stored.dtype.name not in _FLOATS:
            continue
        values = _values(stored)
        if place.count is not None:
            values = values[..., place.first : place.first + place.count]
        if place.transposed:
            values = values.T
        if values.shape == shape:
            return _tensor(name, shape, values), place.initializer
    return None


def _values(stored: OnnxTensor) -> npt.NDArray[np.floating]:
    """The initializer mapped: a transposed matrix is read by columns."""
    if stored.inline is not None or stored.file is None:
        return stored.read()
    return np.memmap(stored.file, stored.dtype, "r", stored.offset, stored.shape)


def _tensor(name: str, shape: tuple[int, ...], values: npt.NDArray[np.floating]) -> Tensor:
    rows = values.reshape(1, -1) if len(shape) == 1 else values

    def read(start: int, stop: int) -> Raw:
        raw: Raw = np.ascontiguousarray(rows[start:stop]).view(np.uint8)
        return raw

    return Tensor(name, shape, _FLOATS[values.dtype.name], read)
