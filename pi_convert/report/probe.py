"""A probe as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pi_convert.evaluate.probe import Probe
from pi_convert.evaluate.statistics import Mean
from pi_convert.evaluate.wording import duration
from pi_convert.report.console import table, tokens
from pi_convert.report.perplexity import mean_json
from pi_convert.report.rope import factor_text

SCHEMA_VERSION = 3


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the weights say, beside what the config does."""

    label: str
    words: str  # MODEL and its options, as other commands take them
    stated: float  # the config's factor
    probe: Probe
    environment: Mapping[str, str]

    @property
    def agrees(self) -> bool:
        """Whether the config's factor is one that the weights fit."""
        fits = self.probe.factor or 1.0, *(fit.factor for fit in self.probe.also)
        return self.stated in fits

    def to_json(self) -> dict[str, object]:
        """As JSON values; ``schema_version`` changes when a field does."""
        found = self.probe
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.label,
            "factor": found.factor,
            "reason": found.reason,
            "stated_factor": self.stated,
            "best": found.best,
            "gain_over_factor_1": mean_json(found.gain),
            "behind_best": None if found.behind is None else mean_json(found.behind),
            "also_fit": [
                {"factor": fit.factor, "behind_best": mean_json(fit.behind)} for fit in found.also
            ],
            "next_best": found.rival,
            "lead_over_next_best": mean_json(found.lead),
            "told_apart": found.told_apart,
            "original_context": found.original_context,
            "window": found.window,
            "windows": found.windows,
            "tried": [
                {"factor": t.factor, "nll_below": mean_json(t.below), "nll_past": t.past}
                for t in found.tried
            ],
            "seconds": round(found.seconds, 1),
            "environment": dict(self.environment),
        }


def probe_text(report: ProbeReport) -> str:
    """The table of factors and what it comes to."""
    found = report.probe
    rows = [
        [
            f"{factor_text(t.factor):>6}",
            f"{t.below.value:>8.4f}",
            f"{'-' if t.past is None else format(t.past, '.4f'):>8}",
            "best" if t.factor == found.best else "",
        ]
        for t in found.tried
    ]
    header = ("factor", "below L", f"{'past L':>8}", "")
    return "\n".join(
        [
            f"{report.label}: NLL in nats a token; L is taken to be"
            f" {tokens(found.original_context)}; {found.windows} windows of"
            f" {tokens(found.window)} tokens below it, {duration(found.seconds)}",
            table(rows, header=header),
            *_conclusion(report),
        ]
    )


def _conclusion(report: ProbeReport) -> list[str]:
    found = report.probe
    chosen = f"{report.words} --scale {found.factor:g}" if found.factor else ""
    if found.factor is None:
        lines = [f"No factor stands out: {found.reason}."]
    elif found.behind is None:
        lines = [
            f"Factor {factor_text(found.factor)} stands out:"
            f" {_nats(found.gain)} below factor 1{_next(found)}."
        ]
    else:
        lines = [
            f"Factor {factor_text(found.factor)} stands out. The weights are best with"
            f" {factor_text(found.best)}, {_nats(found.gain)} below factor 1, and"
            f" {factor_text(found.factor)} is {_nats(found.behind)} behind it: what was tuned"
            " briefly shows as less than its factor, and that is the usual one."
        ]
    if found.also:
        behind = " and ".join(
            f"{factor_text(fit.factor)}, {_nats(fit.behind)} behind," for fit in found.also
        )
        those = "it" if len(found.also) == 1 else "them"
        lines.append(f"Almost as good: {behind.rstrip(',')}. The weights do not rule {those} out.")
    if report.stated != 1.0 and not found.told:
        lines.append(f"Of the config's factor, {factor_text(report.stated)}, that says nothing.")
    elif report.stated != 1.0:
        verb = "DOES NOT AGREE"
        if report.agrees:
            same = report.stated == (found.factor or 1.0)
            verb = "says the same" if same else "states one of them"
        lines.append(f"The config, with factor {factor_text(report.stated)}, {verb}.")
    elif found.factor is not None:
        lines.append(
            "The config states none: look where it came from, confirm the factor at the length that"
            f" it was tuned for with `pi-convert perplexity {chosen}`, and export with"
            f" `pi-convert export {chosen} --to gguf`."
        )
    return lines


def _next(found: Probe) -> str:
    if not found.told_apart:
        return f", and not told apart from {factor_text(found.rival)}"
    return f", {_nats(found.lead)} below the next best, {factor_text(found.rival)}"


def _nats(mean: Mean) -> str:
    ends = mean.interval
    return f"{mean.value:.3f} nats" + (
        "" if ends is None else f" (95 %: {ends[0]:.3f} to {ends[1]:.3f})"
    )
