"""Verdicts as a report."""

from __future__ import annotations

from collections.abc import Sequence

from pi_convert.report.document import (
    Block,
    Check,
    Line,
    LineChart,
    Point,
    Report,
    Result,
    Section,
    Table,
    Tone,
)
from pi_convert.report.verdict import number_text, outcome_text
from pi_convert.verify.verdict import LinkResult, Outcome, Status, Verdict

_TONES = {
    Outcome.PROVEN: Tone.GOOD,
    Outcome.NOT_PROVEN: Tone.BAD,
    Outcome.INCONCLUSIVE: Tone.UNSURE,
}
_RESULTS = {
    Status.PASSED: Result.PASSED,
    Status.REPORTED: Result.PASSED,
    Status.FAILED: Result.FAILED,
    Status.INCONCLUSIVE: Result.FAILED,
    Status.NOT_RUN: Result.SKIPPED,
}
_WORST = (Outcome.PROVEN, Outcome.INCONCLUSIVE, Outcome.NOT_PROVEN)


def verdict_page(verdicts: Sequence[Verdict]) -> Report:
    """The five links of each artifact, with their controls, and KL by position."""
    worst = max(verdicts, key=lambda v: _WORST.index(v.outcome))
    several = len(verdicts) > 1
    sections: list[Section] = []
    for verdict in verdicts:
        prefix = f"{verdict.artifact}: " if several else ""
        sections += _sections(verdict, prefix)
    return Report(
        kind="verify",
        title=f"{', '.join(v.artifact for v in verdicts)} against {verdicts[0].source}",
        verdict=outcome_text(worst),
        tone=_TONES[worst.outcome],
        lines=(
            f"Expected RoPE: {verdicts[0].expected_rope}.",
            *(f"{v.artifact}: {outcome_text(v)}" for v in verdicts if several),
            *(f"{link.name.value}: {link.cause}" for link in worst.links if link.cause),
        ),
        sections=tuple(sections),
        checks=tuple(
            Check(v.artifact, link.name.value, _RESULTS[link.status], link.summary)
            for v in verdicts
            for link in v.links
        ),
        environment=verdicts[0].environment,
        seconds=sum(v.seconds for v in verdicts),
        data={"verdicts": [v.to_json() for v in verdicts]},
    )


def _sections(verdict: Verdict, prefix: str) -> list[Section]:
    rows = tuple(
        (f"{number} {link.name.value}", link.status.value, link.summary)
        for number, link in enumerate(verdict.links, start=1)
    )
    out = [Section(f"{prefix}The five links", (Table(("link", "status", "finding"), rows),))]
    for link in verdict.links:
        blocks = _link(link)
        if blocks:
            out.append(Section(f"{prefix}{link.name.value}", blocks))
    return out


def _link(link: LinkResult) -> tuple[Block, ...]:
    blocks: list[Block] = [*_charts(link)]
    if link.controls:
        rows = tuple(
            (c.name, number_text(c.value), number_text(c.right), "seen" if c.seen else "NOT SEEN")
            for c in link.controls
        )
        header = ("control", "value", "right run", "")
        blocks.append(Table(header, rows, frozenset({1, 2})))
    if link.measures:
        measures = tuple((name, number_text(value)) for name, value in link.measures.items())
        blocks.append(Table(("measure", "value"), measures))
    blocks += [f"Finding: {finding}" for finding in link.findings]
    blocks += [f"Note: {note}" for note in link.notes]
    return tuple(blocks)


def _charts(link: LinkResult) -> list[LineChart]:
    """One chart a window: the artifact and the controls beside it."""
    charts = []
    for window in dict.fromkeys(series.window for series in link.series):
        lines = tuple(
            Line(
                series.name,
                tuple(Point(x, y) for x, y in zip(series.positions, series.values, strict=True)),
                series.is_control,
            )
            for series in link.series
            if series.window == window
        )
        marks = next(series.marks for series in link.series if series.window == window)
        charts.append(
            LineChart(
                f"KL against torch by position, window {window}",
                "position (tokens)",
                "KL, nats a token",
                lines,
                marks,
                log_y=True,
            )
        )
    return charts
