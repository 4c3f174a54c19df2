"""Differences between two models' predictions, and what can be said of their means.

All in float64 and natural logarithms: KL in nats, NLL in nats a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pi_convert.runtimes.base import Logits

Vector = npt.NDArray[np.float64]

_ROWS = 32  # positions in float64 at once: 32 x 128,256 x 8 B is 31 MiB
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
    kl, nll_p, nll_q = (np.empty(len(p), dtype=np.float64) for _ in range(3))
    for start in range(0, len(p), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q, ids = _log_softmax(p[rows]), _log_softmax(q[rows]), following[rows]
        chosen = np.arange(len(ids)), np.maximum(ids, 0)
        nll_p[rows] = np.where(ids >= 0, -log_p[chosen], np.nan)
        nll_q[rows] = np.where(ids >= 0, -log_q[chosen], np.nan)
        np.subtract(log_p, log_q, out=log_q)
        kl[rows] = np.einsum("ij,ij->i", np.exp(log_p, out=log_p), log_q)
    return Pair(np.maximum(kl, 0.0), nll_p, nll_q, p.argmax(axis=1) == q.argmax(axis=1))


def kl_divergence(p: Logits, q: Logits) -> Vector:
    """KL(p || q) at every position, float64 (positions,); see ``compare_positions``."""
    return compare_positions(p, q, np.full(len(p), -1, dtype=np.int32)).kl


def negative_log_likelihood(logits: Logits, following: npt.NDArray[np.int32]) -> Vector:
    """-log p(following) at every position, float64; nan where ``following`` is -1.

    Exponentials in float32, their sum in float64, as llama-perplexity has it: some 1e-7 nats, at a
    quarter of float64's time.
    """
    out = np.full(len(logits), np.nan, dtype=np.float64)
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        ids, values = following[rows], logits[rows]
        largest = values.max(axis=1, keepdims=True)
        total = np.exp(values - largest).sum(axis=1, dtype=np.float64)
        chosen = values[np.arange(len(ids)), np.maximum(ids, 0)].astype(np.float64)
        found = np.log(total) + largest[:, 0] - chosen
        out[rows] = np.where(ids >= 0, found, np.nan)
    return out


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


@dataclass(frozen=True, slots=True)
class Mean:
    """A token-weighted mean and its standard error clustered by document; None below 2 clusters."""

    value: float
    standard_error: float | None
    tokens: int
    clusters: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval."""
        if self.standard_error is None:
            return None
        half = Z95 * self.standard_error
        return self.value - half, self.value + half


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
