"""The paper's bounds against its formulas written out, term by term."""

from __future__ import annotations

import cmath
import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from converters.errors import RopeError
from converters.rope import RopeParameters
from converters.rope.bounds import score_bounds
from converters.rope.parameters import Llama3Scaling
from pi_convert import cli
from tests.tiny import write_tiny

LLAMA_7B = RopeParameters(theta=10000.0, rotary_dim=128, original_context=2048, context=2048)


def reach(d: int, c: float, s: int) -> float:
    """2 B(s) as equation 8 has it."""
    total, turning = 0.0, 0j
    for j in range(d // 2):
        turning += cmath.exp(1j * s * c ** (-2 * j / d))
        total += abs(turning)
    return 2 * total


@pytest.mark.parametrize(
    ("d", "theta", "mended", "paper", "paper_ratio"),
    [
        # c^(-4/d) is 10^-0.125, 10^-0.25 and 500000^-0.03125; 32 ln 10000 is 294.731.
        (128, 1e4, 1 / (8 * (1 - 0.749894)), 128 / 294.731, 589.46),
        (64, 1e4, 1 / (8 * (1 - 0.562341)), 64 / 294.731, 589.46),
        (128, 5e5, 1 / (8 * (1 - 0.663601)), 128 / 419.916, 839.83),
    ],
)
def test_interpolation_is_the_theorem_with_its_constant_mended(
    d: int, theta: float, mended: float, paper: float, paper_ratio: float
) -> None:
    rope = dataclasses.replace(LLAMA_7B, theta=theta, rotary_dim=d)
    bounds = score_bounds(rope.interpolate(2))
    assert bounds.interpolated == pytest.approx(mended, rel=2e-5)
    assert bounds.interpolated == pytest.approx(1 / (8 * (1 - theta ** (-4 / d))), rel=1e-6)
    assert bounds.paper == pytest.approx(paper, rel=1e-5)
    assert bounds.paper_ratio == pytest.approx(paper_ratio, rel=1e-4)


def test_extrapolation_is_the_least_of_equation_8_past_l() -> None:
    rope = dataclasses.replace(LLAMA_7B, rotary_dim=8, original_context=5, context=5)
    bounds = score_bounds(rope.interpolate(8))
    by_distance = {s: reach(8, 1e4, s) for s in range(5, 40)}
    assert bounds.extrapolated == pytest.approx(min(by_distance.values()), rel=1e-12)
    assert bounds.at == min(by_distance, key=by_distance.__getitem__)
    assert bounds.median_extrapolated == pytest.approx(sorted(by_distance.values())[17], rel=1e-12)


def test_7b_from_2048() -> None:
    """Of all distances below 4,096 the least B(s) is 142.8, at 3,643; below 32,768 it is 80.5."""
    short, long = (score_bounds(LLAMA_7B.interpolate(scale)) for scale in (2, 16))
    assert (short.at, round(short.ratio)) == (3643, 572)
    assert (long.at, round(long.ratio)) == (22297, 322)
    assert short.extrapolated == pytest.approx(reach(128, 1e4, 3643), rel=1e-9)
    assert short.least_b > 1 > long.least_b  # so the paper's 600 supposes too much from 32k on


def test_the_mended_bound_holds_and_the_papers_does_not() -> None:
    """d = 8, c = 10000: a = sum cos(s theta_j) at s = 1/2 against the line between 0 and 1."""
    d, c = 8, 1e4
    frequencies = [c ** (-2 * j / d) for j in range(d // 2)]

    def score(h: list[complex], s: float) -> float:
        return sum(
            (h_j * cmath.exp(1j * s * t)).real for h_j, t in zip(h, frequencies, strict=True)
        )

    bounds = score_bounds(
        dataclasses.replace(LLAMA_7B, rotary_dim=d, original_context=64, context=64).interpolate(2)
    )
    assert bounds.paper is not None
    random.seed(0)
    worst = 0.0
    for _ in range(500):
        h = [cmath.exp(2j * math.pi * random.random()) for _ in frequencies]
        line = (score(h, 0) + score(h, 1)) / 2
        worst = max(worst, abs(score(h, 0.5) - line))
    assert bounds.paper < worst <= bounds.interpolated


def test_llama3_takes_its_own_frequencies() -> None:
    llama3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    plain = dataclasses.replace(LLAMA_7B, theta=500000.0)
    bounds = score_bounds(dataclasses.replace(plain, llama3=llama3).interpolate(2))
    assert bounds.paper is None
    assert bounds.interpolated == pytest.approx(
        score_bounds(plain.interpolate(2)).interpolated, rel=1e-3
    )
    assert bounds.extrapolated != pytest.approx(score_bounds(plain.interpolate(2)).extrapolated)


def test_nothing_interpolated_is_refused() -> None:
    with pytest.raises(RopeError, match="factor 1: no position past L 2,048"):
        score_bounds(LLAMA_7B)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_tiny(tmp_path / "Tiny-Model")  # head_dim 24, L 128
    assert cli.run(["bound", str(model), "--scale", "8", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["interpolated"] == pytest.approx(1 / (8 * (1 - 1e4 ** (-4 / 24))), rel=1e-6)
    assert found["extrapolated"] == pytest.approx(
        min(reach(24, 1e4, s) for s in range(128, 1024)), rel=1e-9
    )
    assert cli.run(["bound", str(model), "--scale", "8"]) == 0
    text = capfd.readouterr().out
    assert "600" not in text
    assert "supposes B(s) >= d" in text
    assert cli.run(["bound", str(model)]) == 1
    assert "error: factor 1: no position past L 128" in capfd.readouterr().err
