"""A report with one of everything, and text that would break a page that does not escape it."""

from __future__ import annotations

from pi_convert.report.document import (
    Check,
    HeatMap,
    Line,
    LineChart,
    Point,
    Report,
    Result,
    Section,
    Table,
    Tone,
)

CHART = LineChart(
    "A chart",
    "context (tokens)",
    "perplexity",
    (
        Line("<one> & other", (Point(512, 12.0, 11.0, 13.0), Point(2048, 9.5, 9.0, 10.0))),
        Line("control", (Point(512, 40.0), Point(2048, 90.0)), is_control=True),
    ),
    ((1024.0, "L"),),
    log_x=True,
)
MAP = HeatMap(
    "A map", "distance", "trial", ("100", "200"), ("1", "2"),
    ((0.25, 1.0), (None, 0.0)), (("-8.63", "-0.50"), ("-", "-11.51")),
    (("a", "b"), ("not run", "<d>")), ((False, True), (False, False)), "where it was found",
    ("chance", "certain"),
)  # fmt: skip
REPORT = Report(
    kind="perplexity",
    title="Perplexity of <model>",
    verdict="It falls | as the window grows",
    tone=Tone.GOOD,
    lines=("A line.",),
    sections=(
        Section("Charts", (CHART, MAP)),
        Section("Table", ("A paragraph.", Table(("name", "n"), (("a|b", "1"),), frozenset({1})))),
    ),
    checks=(
        Check("m", "right", Result.PASSED, "fine"),
        Check("m", "wrong", Result.FAILED, "off by\x00 2"),
        Check("m", "left out", Result.SKIPPED, "no runtime"),
    ),
    environment={"python": "3.11"},
    seconds=2.5,
    data={"perplexity": 9.5},
)
