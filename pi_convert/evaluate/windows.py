"""Windows of tokens, and chunk by chunk through several runtimes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.progress import Progress, silent
from pi_convert.evaluate.texts import Document
from pi_convert.runtimes.base import CHUNK_TOKENS, Logits, Session, Tokens

# Where logits are wanted: 128 x 151,936 x 4 B is 74 MiB for each of up to nine runs in lockstep.
SCORED_CHUNK_TOKENS = 128

# With a single run: so many bytes of logits at once.
_SINGLE_RUN_BYTES = 128 << 20

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents as one run of tokens; ``document`` says which one each token is of."""

    tokens: Tokens
    document: npt.NDArray[np.int32]

    def take(self, count: int) -> TokenStream:
        """The first ``count`` tokens; the run starts over where it is too short."""
        indices = np.arange(count) % len(self.tokens)
        return TokenStream(self.tokens[indices], self.document[indices])

    def documents(self, count: int, longest: int) -> tuple[TokenStream, ...]:
        """The first ``count`` documents, each cut to ``longest`` tokens; those under 2 left out."""
        runs = []
        for index in np.unique(self.document):
            (where,) = np.nonzero(self.document == index)
            if len(where) >= 2:
                runs.append(
                    TokenStream(self.tokens[where[:longest]], self.document[where[:longest]])
                )
        return tuple(runs[:count])


@dataclass(frozen=True, slots=True)
class Window:
    """Contiguous tokens at ``position``, ``position + 1``, ...; ``scored_from`` and after count."""

    name: str
    stream: TokenStream
    position: int
    scored_from: int  # position
    feeds_last: bool = True  # False: the last token is only predicted

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return len(self.stream.tokens)

    @property
    def scored(self) -> int:
        """How many positions are scored."""
        return self.position + self.fed - self.scored_from

    @property
    def fed(self) -> int:
        """How many tokens a session is fed."""
        return self.tokens if self.feeds_last else self.tokens - 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """The scored positions of one chunk: every session's logits, and the token that came next."""

    logits: tuple[Logits, ...]  # (positions, vocabulary) for every session
    following: npt.NDArray[np.int32]  # (positions,); -1 after the last token of the window
    document: npt.NDArray[np.int32]  # (positions,) of the following token


def encode_documents(
    documents: Sequence[Document], encode: Encode, *, at_least: int
) -> TokenStream:
    """The documents' tokens one after the other, as many documents as give ``at_least`` tokens."""
    tokens: list[npt.NDArray[np.int32]] = []
    numbers: list[npt.NDArray[np.int32]] = []
    total = 0
    for number, document in enumerate(documents):
        ids = np.asarray(encode(document.text + "\n\n"), dtype=np.int32)
        tokens.append(ids)
        numbers.append(np.full(len(ids), number, dtype=np.int32))
        total += len(ids)
        if total >= at_least:
            break
    return TokenStream(np.concatenate(tokens), np.concatenate(numbers))


def scored_chunk_alone(vocabulary: int) -> int:
    """How many positions to score at once where one session runs alone, at most a chunk."""
    return max(1, min(CHUNK_TOKENS, _SINGLE_RUN_BYTES // (4 * vocabulary)))


def in_lockstep(
    window: Window,
    sessions: Sequence[Session],
    stage: str,
    progress: Progress = silent,
    *,
    scored_chunk: int = SCORED_CHUNK_TOKENS,
) -> Iterator[Chunk]:
    """Feeds ``window`` to every session chunk by chunk and yields the scored positions.

    A chunk never straddles ``scored_from``, so logits are asked for only where they are scored,
    ``scored_chunk`` positions at a time.
    """
    stream, start = window.stream, 0
    lead = window.scored_from - window.position
    while start < window.fed:
        wanted = start >= lead
        stop = min(start + scored_chunk, window.fed) if wanted else min(start + CHUNK_TOKENS, lead)
        tokens = np.ascontiguousarray(stream.tokens[start:stop])
        logits = []
        for session in sessions:
            out = session.feed(tokens, position=window.position + start, logits=wanted)
            if out is not None:
                logits.append(out)
        progress(stage, stop, window.fed)
        if wanted:
            following = np.append(stream.tokens[start + 1 : stop + 1], [-1])[: stop - start]
            document = np.append(stream.document[start + 1 : stop + 1], [-1])[: stop - start]
            yield Chunk(tuple(logits), following.astype(np.int32), document.astype(np.int32))
        start = stop
