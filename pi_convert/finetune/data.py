"""Documents as tokens in memory-mapped shards, and windows over them.

A shard is written whole or not at all, and its name is its number: a run that was stopped while
tokenising goes on at the first shard that is missing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.errors import SourceError, TokenizerError
from converters.progress import Progress, silent

SHARD_DOCUMENTS = 256
_END = "complete.json"

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int32]
Encode = Callable[[str], Sequence[int]]
Segment = tuple[int, int]  # first token, length


@dataclass(frozen=True, slots=True)
class TokenStore:
    """All tokens, each document's followed by EOS, mapped from its shards."""

    shards: tuple[Ids, ...]
    starts: npt.NDArray[np.int64]  # (shards + 1,) of the shards' first tokens
    lengths: npt.NDArray[np.int64]  # (documents,) in tokens, EOS counted

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> Ids:
        """Tokens ``start`` to ``start + length``, int32 (length,)."""
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            offset = start - int(self.starts[shard])
            part = self.shards[shard][offset : offset + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Encoder:
    """How text becomes ids: without EOS, which follows each document."""

    encode: Encode
    eos: int
    vocabulary: int  # rows of the embedding


def tokenise(
    texts: Iterable[str], encoder: Encoder, folder: Path, progress: Progress = silent
) -> TokenStore:
    """The tokens of ``texts`` in ``folder``, which holds shards of these texts or none.

    Raises ``TokenizerError`` for an id past the embedding.
    """
    if not (folder / _END).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        documents = 0
        for number, batch in enumerate(_batches(texts, SHARD_DOCUMENTS)):
            documents += len(batch)
            if not _shard(folder, number).is_file():
                _write_shard(_shard(folder, number), batch, encoder)
            progress("tokenising documents", documents, documents)
        shards = -(-documents // SHARD_DOCUMENTS)
        _replace(folder / _END, json.dumps({"shards": shards, "documents": documents}).encode())
    return open_store(folder)


def open_store(folder: Path) -> TokenStore:
    """The store that ``tokenise`` completed in ``folder``."""
    count = json.loads((folder / _END).read_bytes())["shards"]
    shards, lengths = [], []
    for number in range(count):
        stored = np.load(_shard(folder, number), mmap_mode="r")
        documents = int(stored[0])
        lengths.append(np.asarray(stored[1 : 1 + documents], dtype=np.int64))
        shards.append(stored[1 + documents :])
    starts = np.cumsum([0, *(len(shard) for shard in shards)], dtype=np.int64)
    return TokenStore(tuple(shards), starts, np.concatenate(lengths))


def windows(store: TokenStore, window: int) -> list[tuple[Segment, ...]]:
    """Windows of exactly ``window`` tokens, as segments of the store; deterministic.

    A document that is long enough gives windows of its own; what is left of it and shorter
    documents are joined, EOS between them. Raises ``SourceError`` where there is not one window.
    """
    found: list[tuple[Segment, ...]] = []
    joined: list[Segment] = []
    filled = start = 0
    for stored in store.lengths:
        length, position = int(stored), start
        start += length
        while length >= window:
            found.append(((position, window),))
            position, length = position + window, length - window
        while length > 0:
            part = min(length, window - filled)
            joined.append((position, part))
            position, length, filled = position + part, length - part, filled + part
            if filled == window:
                found.append(tuple(joined))
                joined, filled = [], 0
    if not found:
        raise SourceError(
            f"the text has {store.tokens:,} tokens, fewer than one window of {window:,}",
            hint="Give more text, or a shorter window (`pi-convert finetune --window`).",
        )
    return found


class WindowDataset:
    """Windows by number, as torch's data loaders ask for them."""

    def __init__(self, store: TokenStore, segments: Sequence[tuple[Segment, ...]]) -> None:
        self._store, self._segments = store, segments

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import torch

        ids = np.concatenate([self._store.read(*segment) for segment in self._segments[index]])
        return {"input_ids": torch.from_numpy(ids.astype(np.int64))}


def _batches(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    left = iter(texts)
    while batch := tuple(itertools.islice(left, size)):
        yield batch


def _shard(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05d}.npy"


def _write_shard(path: Path, texts: Sequence[str], encoder: Encoder) -> None:
    """One int32 array: number of documents, their lengths, their tokens."""
    encoded = [np.asarray([*encoder.encode(text), encoder.eos], dtype=np.int64) for text in texts]
    tokens = np.concatenate(encoded)
    if tokens.max() >= encoder.vocabulary or tokens.min() < 0:
        raise TokenizerError(
            f"the tokenizer gives id {tokens.max()}, the embedding has {encoder.vocabulary} rows",
            hint="The tokenizer belongs to another model, or the embedding was not resized.",
        )
    header = [len(encoded), *(len(ids) for ids in encoded)]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, np.concatenate([np.asarray(header), tokens]).astype(np.int32))
    partial.replace(path)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
