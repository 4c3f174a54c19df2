"""A fine-tuning run's losses as one page, from its log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.files import atomic_file
from pi_convert.report.document import Line, LineChart, Point, Report, Section, Table, Tone
from pi_convert.report.html import html_page

PLOT_NAME = "loss.html"  # beside the log
_DRAWN = 200  # points of a line; more steps are drawn as means over equal spans

Entry = Mapping[str, float | None]  # a line of trainer_log.jsonl


@dataclass(frozen=True, slots=True)
class LossPlot:
    """One sitting of a run: what its page says besides the losses in ``log``."""

    log: Path  # trainer_log.jsonl
    name: str
    steps: int  # of the whole run
    first: int  # step of this sitting
    seconds: float  # of this sitting
    environment: Mapping[str, str]


def write_loss_plot(plot: LossPlot) -> Path:
    """The page beside the log, in place of the last sitting's. Raises ``OutputError``."""
    path = plot.log.with_name(PLOT_NAME)
    with atomic_file(path, force=True) as partial:
        partial.write_text(html_page(loss_page(plot)), "utf-8")
    return path


def loss_page(plot: LossPlot) -> Report:
    """Loss of training and of held-out windows against the step, in nats a token."""
    entries = read_log(plot.log)
    trained = _trained(entries)
    first, last = trained[0], trained[-1]
    done = int(last["step"] or 0)
    lines = [f"{int(last['tokens'] or 0):,} tokens read in {done:,} steps."]
    if done < plot.steps:
        lines.append(f"Stopped; the same command with --resume goes on to step {plot.steps:,}.")
    if plot.first > 1:
        lines.append(f"Resumed at step {plot.first:,}: the time below is of the steps since then.")
    return Report(
        kind="finetune",
        title=f"Fine-tuning {plot.name}",
        verdict=f"Loss {first['loss']:.4f} in step {int(first['step'] or 0):,},"
        f" {last['loss']:.4f} in step {done:,} of {plot.steps:,}",
        tone=Tone.PLAIN,
        lines=tuple(lines),
        sections=(
            Section("Loss against step", (_chart(entries),)),
            *_held_out(entries),
        ),
        checks=(),
        environment=plot.environment,
        seconds=plot.seconds,
    )


def read_log(log: Path) -> list[Entry]:
    """The log's lines; one that was cut short is left out."""
    whole = log.read_text("utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _trained(entries: Sequence[Entry]) -> list[Entry]:
    """Those of steps; the first entry may be of what there was before them."""
    return [entry for entry in entries if entry["step"]]


def _chart(entries: Sequence[Entry]) -> LineChart:
    spans = _spans(_trained(entries))
    names = {
        "perplexity_below": "held out, positions below L",
        "perplexity_past": "held out, positions past L",
    }
    trained = "trained windows"
    if len(spans[0]) > 1:
        trained += f", means of {len(spans[0])} steps"
    lines = [Line(trained, tuple(_mean(span) for span in spans))]
    for key, name in names.items():
        points = [
            Point(entry["step"] or 0, math.log(value))
            for entry in entries
            if (value := entry[key]) is not None
        ]
        if points:
            lines.append(Line(name, tuple(points)))
    return LineChart("Loss of next tokens", "step", "nats a token", tuple(lines))


def _spans(entries: Sequence[Entry]) -> list[Sequence[Entry]]:
    size = math.ceil(len(entries) / _DRAWN)
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _mean(span: Sequence[Entry]) -> Point:
    steps, losses = ([entry[key] or 0.0 for entry in span] for key in ("step", "loss"))
    return Point(sum(steps) / len(span), sum(losses) / len(span))


def _held_out(entries: Sequence[Entry]) -> tuple[Section, ...]:
    rows = [
        (f"{int(entry['step'] or 0):,}", _text(entry["perplexity_below"]),
         _text(entry["perplexity_past"]))
        for entry in entries
        if entry["perplexity_below"] is not None
    ]  # fmt: skip
    if not rows:
        return ()
    table = Table(("step", "below L", "past L"), tuple(rows), frozenset({0, 1, 2}))
    return (Section("Perplexity of held-out windows", (table,)),)


def _text(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.3f}"
