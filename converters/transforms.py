"""Named pure functions that lay a tensor out another way.

A transform takes a ``Tensor`` and gives a ``Tensor``; nothing is read until the result's rows are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from converters.errors import UnsupportedError
from converters.tensor import RowReader, Tensor


def interleave_rope(tensor: Tensor, heads: int) -> Tensor:
    """Each head's rows from halves (i, i + d/2) to interleaved pairs (2i, 2i + 1).

    ``tensor`` is a query or key projection, (heads * head_dim, hidden), or its bias,
    (heads * head_dim,). Hugging Face stores halves (``rotate_half``); llama.cpp's
    ``LLAMA_ROPE_TYPE_NORM`` architectures rotate neighbours. Only whole rows move, so quantized
    blocks stay as they are.
    """
    head_dim = _head_dim(tensor, heads)
    order = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)
    return _permute_within_heads(tensor, order)


def deinterleave_rope(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleave_rope``."""
    head_dim = _head_dim(tensor, heads)
    order = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return _permute_within_heads(tensor, order)


def _head_dim(tensor: Tensor, heads: int) -> int:
    rows = tensor.shape[0]
    if rows % heads or rows // heads % 2:
        raise UnsupportedError(
            f"{tensor.name}: {rows} rows do not divide into {heads} heads of an even size",
            hint="Check the number of heads in the config.",
        )
    return rows // heads


def _permute_within_heads(tensor: Tensor, order: npt.NDArray[np.intp]) -> Tensor:
    if len(tensor.shape) == 1:
        return dataclasses.replace(tensor, read_raw=_permuted_elements(tensor, order))
    return dataclasses.replace(tensor, read_raw=_permuted_rows(tensor, order))


def _permuted_elements(tensor: Tensor, order: npt.NDArray[np.intp]) -> RowReader:
    if not tensor.encoding.is_float:
        raise UnsupportedError(
            f"{tensor.name}: a {tensor.encoding.name} vector cannot be permuted inside its blocks",
            hint="Biases of q and k have to be stored as floats; convert the model again.",
        )

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        raw = tensor.read_raw(start, stop)
        elements = raw.reshape(-1, len(order), tensor.encoding.block_bytes)
        return np.ascontiguousarray(elements[:, order]).reshape(raw.shape)

    return read


def _permuted_rows(tensor: Tensor, order: npt.NDArray[np.intp]) -> RowReader:
    head_dim = len(order)

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        first = start // head_dim * head_dim  # whole heads: a head's rows come from that head only
        last = min(-(-stop // head_dim) * head_dim, tensor.rows)
        rows = np.arange(start, stop)
        heads = rows // head_dim * head_dim
        moved: npt.NDArray[np.uint8] = tensor.read_raw(first, last)[
            heads + order[rows % head_dim] - first
        ]
        return moved

    return read
