"""Passkey retrieval as a report."""

from __future__ import annotations

from math import log

from pi_convert.evaluate.models import Model
from pi_convert.evaluate.passkey import DIGITS, Answer, Passkey
from pi_convert.report.console import tokens
from pi_convert.report.document import (
    Block,
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
from pi_convert.report.passkey import DISTANCE_COLUMNS, PasskeyReport, distance_rows, k_max_text
from pi_convert.report.perplexity_page import context_marks

_CHANCE = -DIGITS * log(10)


def passkey_page(report: PasskeyReport) -> Report:
    """k_max, the share found by distance, and how probable the right digits were."""
    sentences = tuple(f"{model.name}: {k_max_text(found)}." for model, found in report.models)
    return Report(
        kind="passkey",
        title="Passkey retrieval of " + ", ".join(model.label for model, _ in report.models),
        verdict=sentences[0],
        tone=Tone.PLAIN,
        lines=sentences[1:],
        sections=(
            Section(
                "Share of trials in which the passkey was found",
                (_shares(report), *_tables(report)),
            ),
            Section(
                "Log-probability of the right digits",
                tuple(_heat_map(model, found) for model, found in report.models),
            ),
        ),
        checks=tuple(
            Check(model.name, "k_max", Result.PASSED, k_max_text(found))
            for model, found in report.models
        ),
        environment=report.environment,
        seconds=sum(found.seconds for _, found in report.models),
        data=report.to_json(),
    )


def _shares(report: PasskeyReport) -> LineChart:
    lines = tuple(
        Line(
            model.name,
            tuple(Point(d.distance, d.rate, *d.interval) for d in found.depths),
        )
        for model, found in report.models
    )
    ends = (report.max_context // 4, report.max_context)
    return LineChart(
        "By distance from the end of the prompt, Wilson's 95 % intervals",
        "distance (tokens)",
        "share of trials",
        lines,
        context_marks([model for model, _ in report.models], ends),
        y_range=(-0.02, 1.04),
        has_table=True,
    )


def _tables(report: PasskeyReport) -> tuple[Block, ...]:
    """Each model's name and its table."""
    numeric = frozenset({0, 1, 3})
    return tuple(
        block
        for model, found in report.models
        for block in (model.name, Table(DISTANCE_COLUMNS, distance_rows(found), numeric))
    )


def _heat_map(model: Model, found: Passkey) -> HeatMap:
    trials = sorted({answer.trial for answer in found.answers})
    cells = {(answer.trial, answer.depth): answer for answer in found.answers}
    depths = range(len(found.depths))
    rows = [[cells.get((trial, depth)) for depth in depths] for trial in trials]
    return HeatMap(
        f"{model.name}: each cell one passkey, its log p in nats",
        "distance (tokens)",
        "trial",
        tuple(tokens(depth.distance) for depth in found.depths),
        tuple(str(trial + 1) for trial in trials),
        tuple(tuple(_shade(a) for a in row) for row in rows),
        tuple(tuple(_value(a) for a in row) for row in rows),
        tuple(tuple(_sentence(a) for a in row) for row in rows),
        tuple(tuple(a is not None and a.found for a in row) for row in rows),
        "where greedy decoding finds it",
        ("as by chance", "certain"),
    )


def _shade(answer: Answer | None) -> float | None:
    """0 where the digits are no likelier than any five, 1 where they are certain, by log p."""
    if answer is None:
        return None
    return min(1.0, max(0.0, 1 - answer.log_probability / _CHANCE))


def _value(answer: Answer | None) -> str:
    return "-" if answer is None else f"{answer.log_probability:.2f}"


def _sentence(answer: Answer | None) -> str:
    if answer is None:
        return "not run"
    verb = "found" if answer.found else "not found"
    return f"{tokens(answer.distance)} tokens back: {verb}, log p {answer.log_probability:.2f}"
