"""Which factor a checkpoint was tuned with, from its weights alone.

Many checkpoints in the wild lost their scaling: a merge or a converter dropped it from the config.
A model predicts best with the RoPE it was trained with, and not only past L: interpolation moves
every position, so windows below L tell the factor, where an untuned model is best with factor 1.
Past L any factor helps an untuned model, so what is seen there confirms and never decides. A model
that was tuned briefly still remembers factor 1 and is best with somewhat less than its own, where
the loss is flat: so a usual factor just above the best one is taken for it, and where more of the
usual ones lose as little, all are told.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import Checkpoint
from converters.errors import SourceError
from converters.progress import Progress, silent
from converters.rope import RopeParameters
from pi_convert.evaluate.perplexity import score_windows
from pi_convert.evaluate.statistics import Mean, Vector, clustered_mean
from pi_convert.evaluate.windows import TokenStream, Window
from pi_convert.runtimes.base import Session, Tokens
from pi_convert.runtimes.pytorch import TorchModel

# What people choose. All of them are tried: a model that looks so many tokens back, and nowhere
# else, predicts badly with every other factor, so that no coarse grid leads to its own.
FACTORS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
USUAL = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # what most checkpoints were tuned with
# Of the gain over factor 1: what a usual factor may lose to the best one. Twice the most seen:
# small LLaMAs tuned for 200 steps with 2, 3 and 4 lose 1.2, 2.5 and 1.2 % with their own, for 1,000
# with 8 0.4 %; trained with 3 or 5 from the start, the usual one above loses all of it.
USUAL_LOSES = 0.05
BELOW_TOKENS = 256  # a window; its second half is scored
BELOW_ALL_TOKENS = 2048
PAST_TOKENS = 256
# Nats a token below L by which a factor has to beat factor 1. A tiny model trained on prose with
# factor 1 loses 0.05 with 1.25, one trained with 3 gains 0.33: less than this is no tuning.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Tried:
    """One factor: NLL below L, and past L where it was measured."""

    factor: float
    below: Mean
    past: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A usual factor, and its NLL minus the best factor's, below L, paired."""

    factor: float
    behind: Mean


_UNSCALED = "no scaling predicts the text better than factor 1 does"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the weights say. ``factor`` None: no factor stands out, for ``reason``."""

    tried: tuple[Tried, ...]  # by factor
    factor: float | None
    reason: str
    told: bool  # whether the weights say anything: a factor, or that factor 1 is best
    best: float  # of all tried, whether it stands out or not; ``factor`` may be a usual one above
    gain: Mean  # NLL of factor 1 minus the best's, below L, paired
    behind: Mean | None  # NLL of ``factor`` minus the best's, where that is another
    also: tuple[Fit, ...]  # usual factors above ``factor`` that lose as little as one may
    rival: float  # the next best
    lead: Mean  # NLL of the rival minus the best's, below L, paired
    original_context: int  # L as supposed
    window: int  # tokens, below L
    windows: int
    seconds: float

    @property
    def told_apart(self) -> bool:
        """Whether the best factor is told from the next best."""
        return _is_above_zero(self.lead)


@dataclass(frozen=True, slots=True)
class ProbeWindows:
    """Where the factors are tried."""

    below: tuple[Window, ...]
    past: Window


def probe_windows(runs: Sequence[TokenStream], original_context: int) -> ProbeWindows:
    """Windows below L, spread evenly over the texts, and one across L.

    Windows do not overlap and lie in one document each where documents are long enough. The one
    across L takes texts one after the other, from the start again where they are short. Raises
    ``SourceError`` for a text that gives fewer than two windows.
    """
    size = min(BELOW_TOKENS, original_context)
    joined = TokenStream(
        np.concatenate([run.tokens for run in runs]), np.concatenate([run.document for run in runs])
    )
    parts = [part for run in runs for part in _parts(run, size)]
    if len(parts) < 2:
        parts = _parts(joined, size)
    if len(parts) < 2:
        raise SourceError(
            f"the text has {len(joined.tokens):,} tokens, and at least {2 * size:,} are needed",
            hint="Give a longer --text.",
        )
    count = max(2, BELOW_ALL_TOKENS // size)
    if len(parts) > count:
        parts = [parts[round(i)] for i in np.linspace(0, len(parts) - 1, count)]
    below = []
    for number, part in enumerate(parts):  # each a cluster of its own
        stream = TokenStream(part, np.full(size, number, dtype=np.int32))
        below.append(Window("", stream, 0, size // 2, feeds_last=False))
    past = joined.take(original_context + PAST_TOKENS + 1)
    return ProbeWindows(tuple(below), Window("", past, 0, original_context, feeds_last=False))


def _parts(run: TokenStream, size: int) -> list[Tokens]:
    return [run.tokens[i : i + size] for i in range(0, len(run.tokens) - size + 1, size)]


def probe(
    checkpoint: Checkpoint, model: TorchModel, windows: ProbeWindows, progress: Progress = silent
) -> Probe:
    """Tries every factor below L, and past it factor 1, the two best and the likely one."""
    started = time.monotonic()
    trial = _Trial(checkpoint, model, windows)
    for done, factor in enumerate(FACTORS):
        progress("factors below L", done, len(FACTORS))
        trial.below(float(factor))
    means = {factor: float(nll.mean()) for factor, nll in trial.nll.items()}
    best, rival, *_ = sorted(means, key=means.__getitem__)
    likely, *others = likely_factors(means, lambda f: _is_above_zero(trial.paired(f, best)))
    past = {}
    for done, factor in enumerate(chosen := sorted({1.0, best, rival, likely})):
        progress("factors past L", done, len(chosen))
        past[factor] = trial.past(factor)
    tried = tuple(
        Tried(factor, clustered_mean(trial.nll[factor], trial.document), past.get(factor))
        for factor in sorted(trial.nll)
    )
    gain = trial.paired(1.0, best)
    stands_out, reason = _decide(best, gain, tried, model.vocabulary)
    if stands_out is not None:
        stands_out = likely
    return Probe(
        tried=tried,
        factor=stands_out,
        reason=reason,
        told=stands_out is not None or reason == _UNSCALED,
        best=best,
        gain=gain,
        behind=trial.paired(likely, best) if stands_out not in (None, best) else None,
        also=tuple(Fit(f, trial.paired(f, best)) for f in others if stands_out is not None),
        rival=rival,
        lead=trial.paired(rival, best),
        original_context=checkpoint.rope.original_context,
        window=windows.below[0].tokens,
        windows=len(windows.below),
        seconds=time.monotonic() - started,
    )


def likely_factors(
    nll: Mapping[float, float], is_worse: Callable[[float], bool] = lambda _: True
) -> list[float]:
    """Usual factors from the best of NLL by factor on that lose next to nothing, or the best.

    Next to nothing is little of the gain over factor 1, or what ``is_worse`` does not tell from
    none.
    """
    best = min(nll, key=nll.__getitem__)
    most = nll[best] + USUAL_LOSES * (nll[1.0] - nll[best])
    above = [float(f) for f in USUAL if f >= best]
    return [f for f in above if nll[f] <= most or not is_worse(f)] or [best]


def _is_above_zero(mean: Mean) -> bool:
    return mean.interval is not None and mean.interval[0] > 0


def _decide(
    best: float, gain: Mean, tried: Sequence[Tried], vocabulary: int
) -> tuple[float | None, str]:
    """The factor that stands out, or None, and the sentence that says why."""
    by_factor = {one.factor: one for one in tried}
    past, plain = by_factor[best].past, by_factor[1.0].past
    nll, chance = by_factor[best].below.value, math.log(vocabulary)
    if not nll < chance:
        return None, (
            f"with every factor the text is predicted no better than by chance"
            f" ({nll:.2f} nats a token, chance is {chance:.2f})"
        )
    if best == 1.0:
        return None, _UNSCALED
    if not _is_above_zero(gain) or gain.value < LEAST_GAIN:
        return None, (
            f"factor {best:g} is {gain.value:.3f} nats better than factor 1, which is too little to"
            " tell"
        )
    if past is not None and plain is not None and past >= plain:
        return None, (
            f"factor {best:g} is better below L, and past L it is not ({past:.2f} nats a token,"
            f" factor 1 {plain:.2f})"
        )
    return best, f"factor {best:g} predicts the text best, below L and past it"


class _Trial:
    """NLL by factor, on the same tokens."""

    def __init__(self, checkpoint: Checkpoint, model: TorchModel, windows: ProbeWindows) -> None:
        self._base = checkpoint.rope.unscaled()
        self._model, self._windows = model, windows
        self.nll: dict[float, Vector] = {}
        self.document = np.empty(0, np.int32)

    def below(self, factor: float) -> None:
        runtime = self._with(factor)
        self.nll[factor], self.document = score_windows(runtime, self._windows.below, "")

    def past(self, factor: float) -> float:
        nll, _ = score_windows(self._with(factor), [self._windows.past], "")
        return float(nll.mean())

    def paired(self, a: float, b: float) -> Mean:
        """NLL of factor ``a`` minus that of ``b``."""
        return clustered_mean(self.nll[a] - self.nll[b], self.document)

    def _with(self, factor: float) -> _Scaled:
        return _Scaled(self._model, dataclasses.replace(self._base, factor=factor))


class _Scaled:
    """A model that opens its sessions with a RoPE."""

    def __init__(self, model: TorchModel, rope: RopeParameters) -> None:
        self._model, self._rope = model, rope
        self.vocabulary = model.vocabulary

    def open_session(self, context_tokens: int) -> Session:
        return self._model.open_session(context_tokens, rope=self._rope)

    def close(self) -> None:
        """The model is somebody else's."""
