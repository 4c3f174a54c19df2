"""Perplexity as a report."""

from __future__ import annotations

from pi_convert.evaluate.models import Model
from pi_convert.evaluate.perplexity import Measured
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
from pi_convert.report.perplexity import (
    LlamaCppReport,
    PerplexityReport,
    against_lines,
    growth_text,
    interval_text,
    llamacpp_text,
    place_text,
    plan_text,
)


def page_of(report: PerplexityReport | LlamaCppReport) -> Report:
    """The report of either protocol."""
    if isinstance(report, PerplexityReport):
        return perplexity_page(report)
    return llamacpp_page(report)


def perplexity_page(report: PerplexityReport) -> Report:
    """How perplexity grows with the window, verdict first."""
    models = report.models
    sentences = tuple(_sentence(model, measured) for model, measured in models)
    return Report(
        kind="perplexity",
        title="Perplexity of " + ", ".join(model.label for model, _ in models),
        verdict=sentences[0],
        tone=Tone.PLAIN,
        lines=(*sentences[1:], plan_text(report.plan) + "."),
        sections=(
            Section("Perplexity against context", (_chart(report),)),
            *(
                Section(
                    model.name,
                    (_table(model, measured), *_growth(measured), *_against(report, index)),
                )
                for index, (model, measured) in enumerate(models)
            ),
        ),
        checks=tuple(
            Check(model.name, f"context {at.context}", Result.PASSED,
                  f"perplexity {at.perplexity:.4f} ({interval_text(at)})")
            for model, measured in models
            for at in measured.at
        ),
        environment=report.environment,
        seconds=sum(measured.seconds for _, measured in models),
        data=report.to_json(),
    )  # fmt: skip


def llamacpp_page(report: LlamaCppReport) -> Report:
    """llama-perplexity's numbers."""
    lines = tuple(llamacpp_text(model, one) for model, found in report.models for one in found)
    return Report(
        kind="perplexity",
        title="Perplexity by llama-perplexity's protocol",
        verdict=lines[0],
        tone=Tone.PLAIN,
        lines=lines[1:],
        sections=(),
        checks=tuple(
            Check(model.name, f"context {one.context}", Result.PASSED, llamacpp_text(model, one))
            for model, found in report.models
            for one in found
        ),
        environment=report.environment,
        seconds=0.0,
        data=report.to_json(),
    )


def _sentence(model: Model, measured: Measured) -> str:
    if not measured.growth:
        at = measured.at[0]
        return f"{model.name}: perplexity {at.perplexity:.3f} at {tokens(at.context)} tokens."
    return f"{model.name}: {growth_text(measured.growth[-1])}."


def _chart(report: PerplexityReport) -> LineChart:
    lines = []
    for model, measured in report.models:
        points = []
        for at in measured.at:
            low, high = at.interval or (None, None)
            points.append(Point(at.context, at.perplexity, low, high))
        lines.append(Line(model.name, tuple(points)))
    values = [point.y for line in lines for point in line.points]
    return LineChart(
        "Perplexity with windows of several sizes, 95 % intervals by document",
        "context (tokens)",
        "perplexity",
        tuple(lines),
        context_marks([model for model, _ in report.models], report.plan.contexts),
        log_x=True,
        log_y=max(values) > 4 * min(values),
    )


def context_marks(models: list[Model], contexts: tuple[int, ...]) -> tuple[tuple[float, str], ...]:
    """L and L' where they lie near what was measured; those of several models once each."""
    marks: dict[int, str] = {}
    for model in models:
        for value, label in ((model.original_context, "L"), (model.context, "L'")):
            if value is not None and contexts[0] / 2 <= value <= 2 * contexts[-1]:
                marks.setdefault(value, label)
    return tuple(sorted(marks.items()))


def _table(model: Model, measured: Measured) -> Table:
    rows = [
        (tokens(at.context), f"{at.perplexity:.3f}", interval_text(at),
         place_text(at.context, model))
        for at in measured.at
    ]  # fmt: skip
    return Table(("context", "perplexity", "95 %", ""), tuple(rows), frozenset({0, 1}))


def _growth(measured: Measured) -> tuple[str, ...]:
    """Paired on the same tokens."""
    return tuple(f"{growth_text(growth).capitalize()}." for growth in measured.growth)


def _against(report: PerplexityReport, index: int) -> tuple[str, ...]:
    return tuple(f"{line[0].upper()}{line[1:]}." for line in against_lines(report, index))
