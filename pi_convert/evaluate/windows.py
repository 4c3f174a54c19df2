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

# With one run or two: so many bytes of each one's logits at once. Long chunks are faster.
_LOGITS_BYTES = 128 << 20

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


def scored_chunk(vocabulary: int) -> int:
    """How many positions to score at once where one session runs or two, at most a chunk."""
    return max(1, min(CHUNK_TOKENS, _LOGITS_BYTES // (4 * vocabulary)))


def in_lockstep(
    window: Window,
    sessions: Sequence[Session],
    stage: str,
    progress: Progress = silent,
    *,
    chunk_tokens: int = SCORED_CHUNK_TOKENS,
) -> Iterator[Chunk]:
    """Feeds ``window`` to every session chunk by chunk and yields the scored positions.

    A chunk never straddles ``scored_from``, so logits are asked for only where they are scored,
    ``chunk_tokens`` positions at a time.
    """
    start, lead = 0, window.scored_from - window.position
    while start < window.fed:
        wanted = start >= lead
        stop = min(start + chunk_tokens, window.fed) if wanted else min(start + CHUNK_TOKENS, lead)
        if wanted:
            # No name here holds the chunk: a runtime may use its memory again once it is let go.
            yield _scored(window, sessions, start, stop)
        else:
            _feed(window, sessions, slice(start, stop), logits=False)
        progress(stage, stop, window.fed)
        start = stop


def _scored(window: Window, sessions: Sequence[Session], start: int, stop: int) -> Chunk:
    stream = window.stream
    following = np.append(stream.tokens[start + 1 : stop + 1], [-1])[: stop - start]
    document = np.append(stream.document[start + 1 : stop + 1], [-1])[: stop - start]
    return Chunk(
        _feed(window, sessions, slice(start, stop), logits=True),
        following.astype(np.int32),
        document.astype(np.int32),
    )


def _feed(
    window: Window, sessions: Sequence[Session], span: slice, *, logits: bool
) -> tuple[Logits, ...]:
    """Every session's logits; none where they are not asked for."""
    tokens = np.ascontiguousarray(window.stream.tokens[span])
    position = window.position + span.start
    given = (session.feed(tokens, position=position, logits=logits) for session in sessions)
    return tuple(out for out in given if out is not None)
