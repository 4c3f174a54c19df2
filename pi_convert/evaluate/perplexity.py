"""Perplexity over a sliding window, the same tokens scored at every context.

The paper's protocol (arXiv 2306.15595, section 3.2, after Press et al. 2022): a window of so many
tokens moves by a stride, and the stride's last tokens are scored. Here every scored token stands at
least the largest context into its text, so that windows of every size end at the same tokens and
differences between them are paired.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from converters.errors import SourceError, UnsupportedError
from converters.progress import Progress, silent
from pi_convert.evaluate.statistics import (
    Mean,
    Vector,
    clustered_mean,
    negative_log_likelihood,
)
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep, scored_chunk
from pi_convert.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens to score: the ``stride`` that end before ``stop`` in a run."""

    run: TokenStream
    stop: int

    def window(self, context_tokens: int, stride: int) -> Window:
        """The window of ``context_tokens`` that ends there; its last token is only predicted."""
        span = slice(self.stop - context_tokens, self.stop)
        stream = TokenStream(self.run.tokens[span], self.run.document[span])
        return Window("", stream, 0, context_tokens - stride - 1, feeds_last=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tokens are scored, of how many that could be, at which contexts (ascending)."""

    contexts: tuple[int, ...]
    stride: int
    stretches: tuple[Stretch, ...]
    available: int  # stretches in the texts
    documents_available: int  # that those are of
    too_short: int  # documents
    joined: bool

    @property
    def scored_tokens(self) -> int:
        """Tokens scored, the same at every context."""
        return self.stride * len(self.stretches)

    @property
    def documents(self) -> int:
        """Documents that scored tokens are of."""
        return _documents(self.stretches, self.stride)

    def windows(self, context_tokens: int) -> tuple[Window, ...]:
        """One window for each stretch."""
        return tuple(s.window(context_tokens, self.stride) for s in self.stretches)


def _documents(stretches: Sequence[Stretch], stride: int) -> int:
    """Documents that the ``stretches`` fall into."""
    ends = [s.run.document[s.stop - stride : s.stop] for s in stretches]
    return len(np.unique(np.concatenate(ends)))


def plan_windows(
    runs: Sequence[TokenStream],
    contexts: Sequence[int],
    *,
    stride: int,
    most: int,
    joined: bool = False,
) -> Plan:
    """Stretches spread evenly over all texts; at most ``most`` of them, 0 for all.

    ``joined`` puts the texts one after the other; otherwise a window lies in one document, and
    those shorter than the largest context are left out. Raises ``SourceError`` where none is left.
    """
    sizes = tuple(sorted(set(contexts)))
    if joined:
        runs = [
            TokenStream(
                np.concatenate([run.tokens for run in runs]),
                np.concatenate([run.document for run in runs]),
            )
        ]
    long_enough = [run for run in runs if len(run.tokens) >= sizes[-1]]
    if not long_enough:
        longest = max((len(run.tokens) for run in runs), default=0)
        what = "all texts together have" if joined else "the longest text has"
        raise SourceError(
            f"{what} {longest:,} tokens, and the largest context is {sizes[-1]:,}",
            hint="Give a longer text or smaller contexts"
            + (".", "; --join puts short texts one after the other.")[not joined and len(runs) > 1],
        )
    every = [
        Stretch(run, stop)
        for run in long_enough
        for stop in range(sizes[-1], len(run.tokens) + 1, stride)
    ]
    chosen = every
    if most and most < len(every):
        chosen = [every[round(i)] for i in np.linspace(0, len(every) - 1, most)]
    return Plan(
        sizes,
        stride,
        tuple(chosen),
        len(every),
        _documents(every, stride),
        len(runs) - len(long_enough),
        joined,
    )


@dataclass(frozen=True, slots=True)
class AtContext:
    """What one model makes of the scored tokens with windows of ``context`` tokens."""

    context: int
    nll: Mean

    @property
    def perplexity(self) -> float:
        """The perplexity: exp of the mean NLL."""
        return exp(self.nll.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the perplexity; None with one document."""
        ends = self.nll.interval
        return None if ends is None else (exp(ends[0]), exp(ends[1]))


@dataclass(frozen=True, slots=True)
class Growth:
    """The change of NLL from the smallest context to another, paired token by token."""

    start: int
    stop: int
    change: Mean


@dataclass(frozen=True, slots=True)
class Measured:
    """One model over a plan."""

    at: tuple[AtContext, ...]
    growth: tuple[Growth, ...]
    nll: Mapping[int, Vector]  # by context: every scored token
    document: np.ndarray[tuple[int], np.dtype[np.int32]]  # of every scored token
    seconds: float


def against(first: Measured, other: Measured) -> dict[int, Mean]:
    """By context: the change of NLL from ``first`` to ``other``, paired token by token.

    Both were measured on one plan.
    """
    return {
        context: clustered_mean(other.nll[context] - values, first.document)
        for context, values in first.nll.items()
    }


def measure_perplexity(
    runtime: Runtime, plan: Plan, progress: Progress = silent, name: str = ""
) -> Measured:
    """Scores the plan's tokens at every context. Raises ``ConvertError`` from the runtime."""
    started = time.monotonic()
    nll: dict[int, Vector] = {}
    documents = np.empty(0, np.int32)
    for context in plan.contexts:
        stage = f"{name}perplexity with {context:,} tokens"
        nll[context], documents = score_windows(runtime, plan.windows(context), stage, progress)
    at = tuple(AtContext(c, clustered_mean(values, documents)) for c, values in nll.items())
    base = plan.contexts[0]
    growth = tuple(
        Growth(base, context, clustered_mean(nll[context] - nll[base], documents))
        for context in plan.contexts[1:]
    )
    return Measured(at, growth, nll, documents, time.monotonic() - started)


def score_windows(
    runtime: Runtime, windows: Sequence[Window], stage: str, progress: Progress = silent
) -> tuple[Vector, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """(NLL, document) of every scored token of ``windows``, which start sequences of their own."""
    nll: list[Vector] = []
    documents = []
    total, done = sum(window.fed for window in windows), 0
    chunk_tokens = scored_chunk(runtime.vocabulary)
    with runtime.open_session(max(window.fed for window in windows)) as session:
        for window in windows:
            session.keep(0)
            before = done

            def tell(_: str, fed: int, __: int, before: int = before) -> None:
                progress(stage, before + fed, total)

            for chunk in in_lockstep(window, [session], stage, tell, chunk_tokens=chunk_tokens):
                known = chunk.following >= 0
                values = negative_log_likelihood(chunk.logits[0], chunk.following)
                nll.append(values[known])
                documents.append(chunk.document[known])
                del chunk  # or the next one's logits need memory of their own
            done += window.fed
    return np.concatenate(nll), np.concatenate(documents)


@dataclass(frozen=True, slots=True)
class LlamaCppPerplexity:
    """llama-perplexity's two numbers: the perplexity, and its standard error taking tokens for
    independent, which they are not.
    """

    context: int
    windows: int
    perplexity: float
    standard_error: float
    tokens: int


_LEAST_WINDOW = 3  # tokens


def llamacpp_windows(
    run: TokenStream, bos: Sequence[int], context_tokens: int, most: int = 0
) -> tuple[Window, ...]:
    """llama-perplexity's windows (llama.cpp tools/perplexity, ``perplexity``), the first ``most``.

    BOS stands before the text where the model adds one, and in place of each window's first token;
    windows do not overlap, and the second half of each is scored. Raises ``SourceError`` for a text
    shorter than two windows, as llama-perplexity refuses it, and ``UnsupportedError`` for windows
    in which nothing is scored.
    """
    if context_tokens < _LEAST_WINDOW:
        raise UnsupportedError(
            f"in windows of {context_tokens} tokens llama-perplexity's protocol scores none",
            hint=f"Give a context of {_LEAST_WINDOW} tokens or more.",
        )
    head = np.asarray(bos, np.int32)
    tokens = np.concatenate([head, run.tokens])
    document = np.concatenate([np.zeros(len(head), np.int32), run.document])
    if len(tokens) < 2 * context_tokens:
        raise SourceError(
            f"the text has {len(tokens):,} tokens, and llama-perplexity's protocol needs at least"
            f" two windows: {2 * context_tokens:,}",
            hint="Give a longer text or a smaller context.",
        )
    windows = []
    for start in range(0, len(tokens) - context_tokens + 1, context_tokens):
        part = tokens[start : start + context_tokens].copy()
        part[: len(head)] = head
        stream = TokenStream(part, document[start : start + context_tokens])
        windows.append(Window("", stream, 0, context_tokens // 2, feeds_last=False))
    return tuple(windows[: most or None])


def measure_llamacpp(
    runtime: Runtime, windows: Sequence[Window], stage: str, progress: Progress = silent
) -> LlamaCppPerplexity:
    """The perplexity of ``llamacpp_windows``, with llama-perplexity's own standard error."""
    nll, _ = score_windows(runtime, windows, stage, progress)
    value, count = float(np.mean(nll)), len(nll)
    spread = float(np.mean(nll**2)) - value**2
    error = (max(spread, 0.0) / (count - 1)) ** 0.5 if count > 1 else 0.0
    return LlamaCppPerplexity(
        windows[0].tokens, len(windows), exp(value), error * exp(value), count
    )
