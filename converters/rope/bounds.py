"""The PI paper's bounds on attention scores (arXiv 2306.15595, section 3.3), for a model's RoPE.

With h_j the products of query and key pairs, an attention score over a distance of s tokens is
a(s) = Re sum_j h_j exp(i s theta_j). All values here are in units of max |h_j|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.errors import RopeError
from converters.rope.parameters import RopeParameters

Vector = npt.NDArray[np.float64]

_DISTANCES = 4096  # at once: 4,096 x 64 complex numbers are 4 MiB


@dataclass(frozen=True, slots=True)
class ScoreBounds:
    """How far scores can go, interpolated and extrapolated, in units of max |h_j|.

    ``interpolated`` is Theorem 2.1 between whole positions with its constant mended:
    |a - a_linear| <= sum_j theta_j^2 / 8, which without llama3 is 1 / (8 (1 - c^(-4/d))). The
    paper has d / (32 ln c) (``paper``): its equation 14 takes 1 / (1 - exp(-x)) to be at most 1 / x
    where it is at least that.
    ``extrapolated`` is the least of equation 8's 2 B(s) over distances L <= s < L', ``at`` that
    distance: what extrapolation can reach at every distance past L.
    """

    rotary_dim: int
    theta: float
    factor: float
    original_context: int
    context: int
    interpolated: float
    paper: float | None  # None with llama3, whose frequencies are no powers of theta
    extrapolated: float
    at: int
    median_extrapolated: float

    @property
    def ratio(self) -> float:
        """The extrapolation bound over the interpolation bound, where it is smallest."""
        return self.extrapolated / self.interpolated

    @property
    def paper_ratio(self) -> float | None:
        """The paper's own figure, 2 d over its coefficient ("about 600x"); it takes B(s) >= d."""
        return None if self.paper is None else 2 * self.rotary_dim / self.paper

    @property
    def least_b(self) -> float:
        """The least B(s) / d past L; the paper's figure supposes at least 1."""
        return self.extrapolated / 2 / self.rotary_dim


def score_bounds(rope: RopeParameters) -> ScoreBounds:
    """The bounds for an interpolated RoPE. Raises ``RopeError`` where nothing is interpolated."""
    if rope.factor == 1.0 or rope.context <= rope.original_context:
        raise RopeError(
            f"factor {rope.factor:g}: no position past L {rope.original_context:,} is interpolated",
            hint="Give a --scale above 1, such as 8.",
        )
    frequencies = _frequencies(rope)
    reach = 2 * partial_sums(frequencies, rope.original_context, rope.context)
    least = int(np.argmin(reach))
    return ScoreBounds(
        rotary_dim=rope.rotary_dim,
        theta=rope.theta,
        factor=rope.factor,
        original_context=rope.original_context,
        context=rope.context,
        interpolated=float(np.sum(frequencies**2)) / 8,
        paper=None if rope.llama3 else rope.rotary_dim / (32 * math.log(rope.theta)),
        extrapolated=float(reach[least]),
        at=rope.original_context + least,
        median_extrapolated=float(np.median(reach)),
    )


def partial_sums(frequencies: Vector, start: int, stop: int) -> Vector:
    """B(s) of equation 8 for start <= s < stop: the sum over k of |sum_{j<k} exp(i s theta_j)|."""
    out = np.empty(stop - start, dtype=np.float64)
    for first in range(start, stop, _DISTANCES):
        distances = np.arange(first, min(first + _DISTANCES, stop), dtype=np.float64)
        turns = np.cumsum(np.exp(1j * distances[:, None] * frequencies), axis=1)
        out[first - start : first - start + len(distances)] = np.abs(turns).sum(axis=1)
    return out


def _frequencies(rope: RopeParameters) -> Vector:
    """theta_j without interpolation, in float64: phases reach 1e5 radians."""
    if rope.llama3 is not None:
        return rope.unscaled().inv_freq().astype(np.float64)
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies: Vector = rope.theta**-exponents
    return frequencies
