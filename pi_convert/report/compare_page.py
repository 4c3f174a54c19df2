"""Two models compared, as a report."""

from __future__ import annotations

from math import expm1

from pi_convert.report.compare import CompareReport, nats_text, ratio_text
from pi_convert.report.console import tokens
from pi_convert.report.document import (
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
from pi_convert.report.perplexity_page import context_marks


def compare_page(report: CompareReport) -> Report:
    """KL, agreement and the paired change of NLL, and KL by position."""
    found, a, b = report.paired, report.a, report.b
    perplexities = found.perplexities
    summary = (
        f"KL {found.kl.value:.3g} nats a token, the same first token in {found.top1:.2%},"
        f" perplexity {expm1(found.nll_change.value):+z.2%}"
    )
    rows = (
        ("KL(A || B), nats a token", nats_text(found.kl)),
        ("KL, median / 99 % below / largest",
         f"{found.kl_median:.3g} / {found.kl_99:.3g} / {found.kl_largest:.3g}"),
        ("same first token", f"{found.top1:.2%}"),
        ("perplexity of A / of B", f"{perplexities[0]:.3f} / {perplexities[1]:.3f}"),
        ("change of perplexity, A against B, paired", ratio_text(found.nll_change)),
        ("positions / documents", f"{tokens(found.positions)} / {found.kl.clusters}"),
    )  # fmt: skip
    spans = tuple(
        (f"{tokens(s.start)} to {tokens(s.stop - 1)}", nats_text(s.kl), f"{s.top1:.2%}",
         tokens(s.kl.tokens))
        for s in found.spans
    )  # fmt: skip
    return Report(
        kind="compare",
        title=f"{a.label} against {b.label}",
        verdict=summary,
        tone=Tone.PLAIN,
        lines=(f"A: {a.name}", f"B: {b.name}"),
        sections=(
            Section("In all", (Table(("measure", "value"), rows),)),
            Section(
                "By position",
                (
                    _chart(report),
                    Table(("position", "KL, nats", "same first", "tokens"), spans, frozenset({3})),
                ),
            ),
        ),
        checks=(Check(a.name, f"against {b.name}", Result.PASSED, summary),),
        environment=report.environment,
        seconds=found.seconds,
        data=report.to_json(),
    )


def _chart(report: CompareReport) -> LineChart:
    points = []
    for span in report.paired.spans:
        low, high = span.kl.interval or (None, None)
        points.append(Point((span.start + span.stop) / 2, span.kl.value, low, high))
    ends = (int(points[0].x), int(points[-1].x))
    return LineChart(
        "KL(A || B) by position, mean of each span, 95 % intervals by document",
        "position (tokens)",
        "KL, nats a token",
        (Line("A against B", tuple(points)),),
        context_marks([report.a, report.b], ends),
        log_x=True,
        log_y=True,
        has_table=True,
    )
