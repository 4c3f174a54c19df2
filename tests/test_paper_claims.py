"""The committed results of ``make paper``: the page is what the numbers give; claims can fail."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_report

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture
def document() -> Any:
    return json.loads((RESULTS / "paper.json").read_text())


def verdict(document: Any, claim: str) -> str:
    """What is said of the claim that begins so."""
    text, _ = paper_report.render(copy.deepcopy(document))
    (line,) = [line for line in text.splitlines() if line.startswith(f"- **{claim}")]
    return line.split("**")[1].rpartition(": ")[2]


def test_the_page_is_what_the_numbers_give(document: Any) -> None:
    text, plots = paper_report.render(document)
    assert text == (RESULTS / "paper.md").read_text()
    for name, drawn in plots.items():
        assert drawn == (RESULTS / name).read_text()


# A paired change of perplexity to twice the window: 1 % more is let pass as "stays".
@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-0.02, 0.009, "shown"),
        (0.002, 0.009, "shown"),
        (-0.001, 0.02, "cannot be told"),
        (0.012, 0.02, "refuted"),
    ],
)
def test_one_doubling_decides_whether_perplexity_stays(
    document: Any, low: float, high: float, says: str
) -> None:
    interval = [math.log1p(low), math.log1p(high)]
    document["paired"]["grows to 1024"] = {"value": sum(interval) / 2, "interval": interval}
    assert verdict(document, "Perplexity falls or stays") == says


@pytest.mark.parametrize(("shift", "says"), [(-0.2, "shown"), (0.2, "refuted")])
def test_recovery_can_fail(document: Any, shift: float, says: str) -> None:
    document["paired"]["recovered PI x4"] = {
        "value": shift,
        "interval": [shift - 0.01, shift + 0.01],
    }
    assert verdict(document, "200 steps recover what PI x4 cost") == says


@pytest.mark.parametrize(("found", "says"), [(30, "shown"), (0, "refuted")])
def test_passkeys_are_found_or_not(document: Any, found: int, says: str) -> None:
    (row,) = [
        row for row in document["passkey"] if (row["arm"], row["step"]) == ("taught PI x4", 1000)
    ]
    for depth in row["depths"]:
        depth["found"] = found
    farthest = max(depth["distance"] for depth in row["depths"])
    row["k_max"] = row["k_max_bounds"][0] = row["k_max_bounds"][1] = farthest if found else 0
    claim = "PI x4 finds passkeys as far as its window reaches after 1,000 steps"
    assert verdict(document, claim) == says
