"""One hash for a checkpoint's weights, whatever files hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from converters.tensor import Tensor

_CHUNK_BYTES = 4 << 20


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the tensor's stored bytes, row after row, in hex."""
    digest = hashlib.sha256()
    rows = max(1, _CHUNK_BYTES // max(tensor.row_bytes, 1))
    for start in range(0, tensor.rows, rows):
        digest.update(tensor.read_rows(start, min(start + rows, tensor.rows)).data)
    return digest.hexdigest()


def content_hash(tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> str:
    """SHA-256 over every tensor's name, encoding, shape and ``tensor_hash``, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"{name} {tensor.encoding.name} {shape} {hashes[name]}\n".encode())
    return digest.hexdigest()
