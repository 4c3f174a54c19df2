"""Tensors in safetensors files: which goes into which, and the files as sinks of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from converters.containers.safetensors import safetensors_header
from converters.encodings import Encoding
from converters.ggml import Raw
from converters.targets.stream import Chunk, write_all
from converters.tensor import Tensor

MAX_SHARD_BYTES = 5_000_000_000  # what the hub and transformers 4 split at


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

    def header(self) -> bytes:
        """What comes before the first tensor's bytes."""
        return safetensors_header(
            (item.tensor.name, item.encoding, item.tensor.shape) for item in self.tensors
        )

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return len(self.header()) + sum(item.size_bytes for item in self.tensors)


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


class ShardSink:
    """An open shard that takes rows from a stream."""

    def __init__(self, descriptor: int, shard: Shard) -> None:
        self._descriptor = descriptor
        self._encodings = {item.tensor.name: item.encoding for item in shard.tensors}
        header = shard.header()
        write_all(descriptor, np.frombuffer(header, np.uint8), 0)
        self._offsets, offset = {}, len(header)
        for item in shard.tensors:
            self._offsets[item.tensor.name] = offset
            offset += item.size_bytes

    def encoding_of(self, name: str) -> Encoding | None:
        """The type of the tensor ``name`` in this shard."""
        return self._encodings.get(name)

    def put(self, chunk: Chunk, rows: Raw) -> None:
        """Writes the rows at their place."""
        offset = self._offsets[chunk.tensor.source.name]
        write_all(self._descriptor, rows, offset + chunk.start * rows.shape[1])
