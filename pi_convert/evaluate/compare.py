"""Two models position by position: KL, agreement on the first token, paired difference of NLL.

Logits are compared chunk by chunk as both runtimes give them; what is kept is a few numbers a
position.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import SourceError
from converters.progress import Progress, silent
from pi_convert.evaluate.statistics import Mean, Vector, clustered_mean, compare_positions
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep, scored_chunk
from pi_convert.runtimes.base import Runtime

_FIRST_SPAN = 64  # positions; each span after it is twice as long as the one before


@dataclass(frozen=True, slots=True)
class Span:
    """What was found at positions ``start`` <= position < ``stop``."""

    start: int
    stop: int
    kl: Mean
    top1: float


@dataclass(frozen=True, slots=True)
class Paired:
    """Model A against model B; KL is KL(A || B) in nats, NLL in nats a token."""

    kl: Mean
    kl_median: float
    kl_99: float  # of 100 positions 99 are below
    kl_largest: float
    top1: float
    nll_a: Mean
    nll_b: Mean
    nll_change: Mean  # A's minus B's, token by token
    spans: tuple[Span, ...]
    positions: int
    seconds: float

    @property
    def perplexities(self) -> tuple[float, float]:
        """A's and B's."""
        return exp(self.nll_a.value), exp(self.nll_b.value)


def document_windows(
    runs: Sequence[TokenStream], context_tokens: int, most: int
) -> tuple[Window, ...]:
    """The starts of ``most`` documents (0: all) spread over the texts, every position scored.

    A document shorter than ``context_tokens`` gives what it has. Raises ``SourceError`` where no
    document has two tokens.
    """
    usable = [run for run in runs if len(run.tokens) >= 2]
    if not usable:
        raise SourceError("no text has two tokens", hint="Give a longer --text.")
    if most and most < len(usable):
        usable = [usable[round(i)] for i in np.linspace(0, len(usable) - 1, most)]
    cut = slice(context_tokens)
    return tuple(
        Window("", TokenStream(run.tokens[cut], run.document[cut]), 0, 0, feeds_last=False)
        for run in usable
    )


def compare(
    a: Runtime, b: Runtime, windows: Sequence[Window], progress: Progress = silent
) -> Paired:
    """A against B over ``windows``, in lockstep.

    Raises ``SourceError`` where their vocabularies are not of one size, and ``ConvertError`` from a
    runtime.
    """
    if a.vocabulary != b.vocabulary:
        raise SourceError(
            f"one has {a.vocabulary} logits a position, the other {b.vocabulary}",
            hint="Only models with one vocabulary can be compared.",
        )
    started, found = time.monotonic(), _Found()
    longest = max(window.fed for window in windows)
    at_once = scored_chunk(a.vocabulary)
    total, before = sum(window.fed for window in windows), 0
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(r.open_session(longest)) for r in (a, b)]
        for window in windows:
            for session in sessions:
                session.keep(0)
            done = 0
            for chunk in in_lockstep(window, sessions, "comparing", chunk_tokens=at_once):
                found.add(window.scored_from + done, chunk.following, chunk.document, chunk.logits)
                done += len(chunk.following)
                fed = window.scored_from - window.position + done
                progress("comparing, two runs in lockstep", before + fed, total)
                del chunk  # or the next chunk's logits stand beside it
            before += window.fed
    return found.summary(time.monotonic() - started)


class _Found:
    """A few numbers for each position, chunk after chunk."""

    def __init__(self) -> None:
        self._columns: list[tuple[npt.NDArray[Any], ...]] = []

    def add(
        self,
        first: int,
        following: npt.NDArray[np.int32],
        document: npt.NDArray[np.int32],
        logits: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        pair = compare_positions(logits[0], logits[1], following)
        position = np.arange(first, first + len(following))
        self._columns.append((pair.kl, pair.nll_p, pair.nll_q, pair.same_top, document, position))

    def summary(self, seconds: float) -> Paired:
        kl, nll_a, nll_b, top, document, position = (
            np.concatenate(column) for column in zip(*self._columns, strict=True)
        )
        return Paired(
            kl=clustered_mean(kl, document),
            kl_median=float(np.median(kl)),
            kl_99=float(np.quantile(kl, 0.99)),
            kl_largest=float(kl.max()),
            top1=float(top.mean()),
            nll_a=clustered_mean(nll_a, document),
            nll_b=clustered_mean(nll_b, document),
            nll_change=clustered_mean(nll_a - nll_b, document),
            spans=tuple(_spans(kl, top, document, position)),
            positions=len(kl),
            seconds=seconds,
        )


def _spans(
    kl: Vector,
    top: npt.NDArray[np.bool_],
    document: npt.NDArray[np.int32],
    position: npt.NDArray[np.int64],
) -> list[Span]:
    spans, start, stop, last = [], 0, _FIRST_SPAN, int(position.max())
    while start <= last:
        inside = (position >= start) & (position < stop)
        if inside.any():
            spans.append(
                Span(
                    start,
                    min(stop, last + 1),
                    clustered_mean(kl[inside], document[inside]),
                    float(np.mean(top[inside])),
                )
            )
        start, stop = stop, 2 * stop
    return spans
