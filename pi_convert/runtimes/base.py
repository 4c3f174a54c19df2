"""The protocol that every runtime of a causal language model keeps.

Logits are handed out chunk by chunk, so that several runtimes can go in lockstep and nothing
larger than vocabulary x chunk is held.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

CHUNK_TOKENS = 512  # fed at once; chunk shapes change rounding, so every tolerance is stated at it


class Closing:
    """Something to close, usable as a context manager."""

    def close(self) -> None:
        """Frees what it holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Session(Protocol):
    """One sequence in one runtime, with its own key and value cache."""

    def feed(self, tokens: Tokens, *, position: int, logits: bool) -> Logits | None:
        """Evaluates at most ``CHUNK_TOKENS`` tokens at ``position``, ``position + 1``, ...

        The first chunk may start anywhere; every other continues the one before. Returns the
        logits, float32 (tokens, vocabulary), or None where they were not asked for. The array
        belongs to the caller.
        """
        ...

    def keep(self, count: int) -> int:
        """Forgets all but the first ``count`` tokens; returns how many are left.

        None are left where a cache cannot be cut, and after ``keep(0)``: then the next chunk may
        start anywhere.
        """
        ...

    def close(self) -> None:
        """Frees the cache."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Runtime(Protocol):
    """A loaded model."""

    @property
    def vocabulary(self) -> int:
        """Logits a position."""
        ...

    def open_session(self, context_tokens: int) -> Session:
        """An empty sequence of at most ``context_tokens`` tokens."""
        ...

    def close(self) -> None:
        """Frees the weights."""
        ...
