"""Differences between two models' predictions, and what can be said of their means.

Exponentials in float32, sums in float64; natural logarithms: KL in nats, NLL in nats a token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pi_convert.runtimes.base import Logits
from pi_convert.runtimes.llamacpp import cores

Vector = npt.NDArray[np.float64]
_Found = TypeVar("_Found")

_ROWS = 16  # positions at once: 16 x 49,152 x 4 B is 3 MiB, which stays in a core's cache
_CLOSE = 0.5  # logits; the largest difference of a position that is computed by differences
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models' predictions position by position, float64 (positions,)."""

    kl: Vector  # KL(p || q), never below 0
    nll_p: Vector  # of the token that follows; nan where none does
    nll_q: Vector
    same_top: npt.NDArray[np.bool_]  # whether both rank the same token first


def compare_positions(p: Logits, q: Logits, following: npt.NDArray[np.int32]) -> Pair:
    """Logits (positions, vocabulary) of two models compared; not finite gives not finite.

    ``following`` is the token after each position, -1 where there is none.
    """
    starts = range(0, len(p), _ROWS)
    parts = [slice(start, start + _ROWS) for start in starts]
    found = list(_map(lambda rows: _compare(p[rows], q[rows], following[rows]), parts))
    kl, nll_p, nll_q, same_top = (np.concatenate(column) for column in zip(*found, strict=True))
    return Pair(kl, nll_p, nll_q, same_top)


def _compare(
    p: Logits, q: Logits, following: npt.NDArray[np.int32]
) -> tuple[Vector, Vector, Vector, npt.NDArray[np.bool_]]:
    """A few rows of ``compare_positions``.

    With w = exp(p - max p) and d = p - q: KL = sum(w d) / sum(w) + log Z_q - log Z_p. Where d is
    small that is a difference of near numbers, and log Z_q - log Z_p is taken from
    log1p(sum(w (exp(-d) - 1)) / sum(w)): the rounding of w is in both terms and goes out.
    """
    row = np.arange(len(p))
    top_p, top_q = p.argmax(axis=1), q.argmax(axis=1)
    largest_p, largest_q = (x[row, top] for x, top in ((p, top_p), (q, top_q)))
    weight = np.exp(p - largest_p[:, None])
    total = weight.sum(axis=1, dtype=np.float64)
    log_p = np.log(total) + largest_p
    log_q = np.log(np.exp(q - largest_q[:, None]).sum(axis=1, dtype=np.float64)) + largest_q
    difference = p - q
    close = np.abs(difference).max(axis=1) < _CLOSE
    change = log_q - log_p
    if close.any():
        less = np.expm1(-difference[close])
        less *= weight[close]
        change[close] = np.log1p(less.sum(axis=1, dtype=np.float64) / total[close])
    weight *= difference
    kl = weight.sum(axis=1, dtype=np.float64) / total + change
    chosen = row, np.maximum(following, 0)
    nll_p = np.where(following >= 0, log_p - p[chosen], np.nan)
    nll_q = np.where(following >= 0, log_p + change - q[chosen], np.nan)
    return np.maximum(kl, 0.0), nll_p, nll_q, top_p == top_q


def kl_divergence(p: Logits, q: Logits) -> Vector:
    """KL(p || q) at every position, float64 (positions,); see ``compare_positions``."""
    return compare_positions(p, q, np.full(len(p), -1, dtype=np.int32)).kl


def negative_log_likelihood(logits: Logits, following: npt.NDArray[np.int32]) -> Vector:
    """-log p(following) at every position, float64; nan where ``following`` is -1.

    Exponentials in float32, their sum in float64, as llama-perplexity has it: some 1e-7 nats, at a
    quarter of float64's time.
    """

    def of(rows: slice) -> Vector:
        ids, values = following[rows], logits[rows]
        row = np.arange(len(ids))
        largest = values[row, values.argmax(axis=1)]
        total = np.exp(values - largest[:, None]).sum(axis=1, dtype=np.float64)
        chosen = values[row, np.maximum(ids, 0)].astype(np.float64)
        return np.where(ids >= 0, np.log(total) + largest - chosen, np.nan)

    return np.concatenate(
        list(_map(of, [slice(i, i + _ROWS) for i in range(0, len(logits), _ROWS)]))
    )


def limit_threads(threads: int | None) -> None:
    """No more than so many threads from here on, in the whole process; None: every core."""
    _pool.cache_clear()
    _settings.threads = threads


@dataclass(slots=True)
class _Settings:
    threads: int | None = None


_settings = _Settings()


def _map(function: Callable[[slice], _Found], parts: Sequence[slice]) -> Iterator[_Found]:
    """In so many threads; numpy lets go of the interpreter meanwhile."""
    if len(parts) < 2:
        return map(function, parts)
    return _pool().map(function, parts)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_settings.threads or cores())


@dataclass(frozen=True, slots=True)
class Mean:
    """A token-weighted mean and its standard error clustered by document; None below 2 clusters."""

    value: float
    standard_error: float | None
    tokens: int
    clusters: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval, by Student's t with a degree less than clusters."""
        if self.standard_error is None:
            return None
        half = student_t95(self.clusters - 1) * self.standard_error
        return self.value - half, self.value + half


@functools.cache
def student_t95(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t with so many degrees of freedom, at least 1.

    With few documents 1.96 standard errors are too few: 3.18 are right for 4. Halves the interval
    in which the distribution function of Abramowitz and Stegun 26.7.3 and 26.7.4 crosses 0.95.
    """
    low, high = Z95, 12.8  # the normal distribution's, and more than that of one degree
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(-t < T < t) of Student's t."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def clustered_mean(values: Vector, cluster: npt.NDArray[np.int32]) -> Mean:
    """Mean over tokens; tokens of one document are not independent, so documents are clusters.

    The variance of a ratio estimator: with r_g the summed residuals of cluster g of G,
    G / (G - 1) * sum(r_g^2) / n^2.
    """
    mean = float(np.mean(values))
    groups, where = np.unique(cluster, return_inverse=True)
    count = len(groups)
    if count < 2:
        return Mean(mean, None, len(values), count)
    residuals = np.bincount(where, weights=values - mean, minlength=count)
    variance = count / (count - 1) * float(np.sum(residuals**2)) / len(values) ** 2
    return Mean(mean, float(np.sqrt(variance)), len(values), count)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a success rate (Wilson 1927); 0 to 1 without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, weight = successes / trials, Z95**2 / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = Z95 / (1 + weight) * np.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


@dataclass(slots=True)
class Comparison:
    """Position by position, one model (p) against another (q), gathered chunk after chunk."""

    kl: list[Vector] = field(default_factory=list)
    nll_difference: list[Vector] = field(default_factory=list)  # p's minus q's; nan without a token
    same_top: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    document: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(
        self,
        p: Logits,
        q: Logits,
        following: npt.NDArray[np.int32],
        document: npt.NDArray[np.int32],
    ) -> None:
        """Adds the positions of one chunk."""
        pair = compare_positions(p, q, following)
        self.kl.append(pair.kl)
        self.nll_difference.append(pair.nll_p - pair.nll_q)
        self.same_top.append(pair.same_top)
        self.document.append(document)

    @property
    def positions(self) -> int:
        """How many were added."""
        return sum(map(len, self.kl))

    @property
    def mean_kl(self) -> float:
        """Mean KL(p || q) over positions, in nats."""
        return float(np.mean(np.concatenate(self.kl)))

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both rank the same token first."""
        return float(np.mean(np.concatenate(self.same_top)))

    def clustered_kl(self) -> Mean:
        """Mean KL with its standard error, clustered by document."""
        known = np.concatenate(self.document) >= 0
        kl, document = np.concatenate(self.kl)[known], np.concatenate(self.document)[known]
        return clustered_mean(kl, document)

    def clustered_nll_difference(self) -> Mean:
        """Mean paired difference of NLL, clustered by document."""
        values, document = np.concatenate(self.nll_difference), np.concatenate(self.document)
        known = document >= 0
        return clustered_mean(values[known], document[known])
