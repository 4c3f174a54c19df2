"""Tensors streamed into safetensors files: the stored bytes, or values rounded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.containers.safetensors import safetensors_header
from converters.encodings import BF16, F16, F32, Encoding, decode_f32
from converters.errors import TensorError
from converters.tensor import Tensor

MAX_SHARD_BYTES = 5_000_000_000  # what the hub and transformers 4 split at
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the encoding it is written in."""

    tensor: Tensor
    encoding: Encoding

    @property
    def size_bytes(self) -> int:
        """Size as written."""
        return prod(self.tensor.shape) * self.encoding.block_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One file and what it holds, in order."""

    name: str
    tensors: tuple[StoredTensor, ...]


def plan_shards(
    stored: Iterable[StoredTensor], *, max_bytes: int = MAX_SHARD_BYTES
) -> tuple[Shard, ...]:
    """The tensors in files of at most ``max_bytes``, named as transformers names them."""
    parts: list[list[StoredTensor]] = [[]]
    size = 0
    for item in stored:
        if parts[-1] and size + item.size_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.size_bytes
    if len(parts) == 1:
        return (Shard("model.safetensors", tuple(parts[0])),)
    count = len(parts)
    return tuple(
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(part))
        for i, part in enumerate(parts, 1)
    )


def shard_index(shards: Iterable[Shard]) -> bytes:
    """``model.safetensors.index.json``."""
    items = [(item, shard.name) for shard in shards for item in shard.tensors]
    index = {
        "metadata": {"total_size": sum(item.size_bytes for item, _ in items)},
        "weight_map": {item.tensor.name: name for item, name in items},
    }
    return json.dumps(index, indent=2).encode() + b"\n"


def write_shard(shard: Shard, folder: Path, advance: Callable[[int], None]) -> str:
    """The SHA-256 in hex of the file, written; ``advance`` is told the bytes of each chunk.

    Raises ``TensorError`` for a value that is not finite or that the encoding cannot hold.
    """
    header = safetensors_header((i.tensor.name, i.encoding, i.tensor.shape) for i in shard.tensors)
    digest = hashlib.sha256(header)
    with (folder / shard.name).open("wb") as file:
        file.write(header)
        for item in shard.tensors:
            for chunk in _chunks(item):
                digest.update(chunk.data)
                file.write(chunk.data)
                advance(chunk.nbytes)
    return digest.hexdigest()


def encode_f32(values: npt.NDArray[np.float32], encoding: Encoding) -> npt.NDArray[np.uint8]:
    """``values`` (rows, elements) as raw rows of f32, f16 or bf16, rounded to nearest even.

    What is too large becomes infinite; NaN is not expected.
    """
    if encoding is F32:
        return values.view(np.uint8)
    if encoding is F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8)
    if encoding is not BF16:
        raise ValueError(f"{encoding.name} is not a float that can be written")
    bits = values.view(np.uint32)
    nearest_even = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return (nearest_even >> 16).astype(np.uint16).view(np.uint8)


def _chunks(item: StoredTensor) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows as they are written, a few MiB at a time."""
    tensor = item.tensor
    wide_row = max(tensor.row_elements * 4, 1)
    step = max(1, _CHUNK_BYTES // wide_row)
    for start in range(0, tensor.rows, step):
        raw = tensor.read_rows(start, min(start + step, tensor.rows))
        values = decode_f32(raw, tensor.encoding)
        if not np.isfinite(values).all():
            row = start + int(np.argmin(np.isfinite(values).all(axis=1)))
            raise TensorError(
                f"{tensor.name} holds NaN or Inf in row {row}",
                hint="The checkpoint is damaged; fetch or save it again.",
            )
        yield raw if item.encoding is tensor.encoding else _converted(values, item)


def _converted(values: npt.NDArray[np.float32], item: StoredTensor) -> npt.NDArray[np.uint8]:
    raw = encode_f32(np.ascontiguousarray(values), item.encoding)
    if item.encoding is not F32 and not np.isfinite(decode_f32(raw, item.encoding)).all():
        largest = float(np.abs(values).max())
        raise TensorError(
            f"{item.tensor.name} holds {largest:g}, which {item.encoding.name} cannot hold",
            hint="Give --dtype bf16 or f32.",
        )
    return raw
