"""Passkey retrieval as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pi_convert.evaluate.models import Model
from pi_convert.evaluate.passkey import LEAST_RATE, Passkey, PasskeyPlan
from pi_convert.evaluate.wording import duration
from pi_convert.report.console import table, tokens
from pi_convert.report.perplexity import model_identity

SCHEMA_VERSION = 1
DISTANCE_COLUMNS = ("distance", "found", "95 %", "log p of the digits")


@dataclass(frozen=True, slots=True)
class PasskeyReport:
    """What every model found."""

    max_context: int
    asked: tuple[int, int]  # depths and trials that the command line asked for
    models: Sequence[tuple[Model, Passkey]]
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As JSON values; ``schema_version`` changes when a field does."""
        return {
            "schema_version": SCHEMA_VERSION,
            "max_context": self.max_context,
            "depths_asked": self.asked[0],
            "trials_asked": self.asked[1],
            "least_rate": LEAST_RATE,
            "models": [_model_json(model, found) for model, found in self.models],
            "environment": dict(self.environment),
        }


def plan_text(plan: PasskeyPlan, asked: tuple[int, int], seconds: float) -> str:
    """What will be run and how long it takes."""
    sample = ""
    if (plan.depths, plan.trials) != asked:
        sample = f" (of {asked[0]} x {asked[1]} asked for)"
    counts = len(plan.prompts), plan.depths, plan.trials
    prompts, distances, trials = (
        f"{count} {noun}{'s'[: count != 1]}"
        for count, noun in zip(counts, ("prompt", "distance", "trial"), strict=True)
    )
    return (
        f"about {duration(seconds)}: {prompts} of up to {plan.longest:,} tokens,"
        f" {distances} x {trials}{sample}, {plan.fed:,} tokens to feed"
    )


def distances_text(plan: PasskeyPlan, asked: int) -> str:
    """Behind the cost: why ``plan``, before any budget, has fewer distances than were asked for."""
    if plan.depths == asked:
        return ""
    return (
        f"; only {plan.depths} of {asked} distances exist at this context: the passkey moves by"
        " whole lines of filler"
    )


def passkey_text(model: Model, found: Passkey) -> str:
    """One model's table, a line a distance, and k_max."""
    rows = [
        (f"{far:>9}", hits, ends, f"{log_p:>8}") for far, hits, ends, log_p in distance_rows(found)
    ]
    header = (f"{DISTANCE_COLUMNS[0]:>9}", *DISTANCE_COLUMNS[1:])
    return "\n".join(
        [
            f"{model.name}, prompts of {tokens(found.prompt_tokens)} tokens,"
            f" {duration(found.seconds)}",
            table(rows, header=header),
            f"  {k_max_text(found)}",
        ]
    )


def distance_rows(found: Passkey) -> tuple[tuple[str, str, str, str], ...]:
    """``DISTANCE_COLUMNS`` of every distance, nearest first."""
    return tuple(
        (
            tokens(d.distance),
            f"{d.found}/{d.trials}",
            f"{d.interval[0]:.2f} to {d.interval[1]:.2f}",
            f"{d.log_probability:.2f}",
        )
        for d in found.depths
    )


def k_max_text(found: Passkey) -> str:
    """k_max with what the Wilson intervals allow."""
    low, high = found.k_max_bounds
    right = sum(depth.found for depth in found.depths)
    total = sum(depth.trials for depth in found.depths)
    if found.k_max == 0:
        near = found.depths[0]
        head = (
            f"k_max none: at {tokens(near.distance)} tokens already the passkey is found in"
            f" {near.found} of {near.trials} trials, less than {LEAST_RATE:.0%}"
        )
    else:
        head = (
            f"k_max {tokens(found.k_max)} tokens: at every distance up to it the passkey is found"
            f" in {LEAST_RATE:.0%} of trials or more"
        )
    return (
        f"{head} (by the intervals' ends {tokens(low)} to {tokens(high)}); {right} of {total}"
        " found in all"
    )


def _model_json(model: Model, found: Passkey) -> dict[str, object]:
    return {
        **model_identity(model),
        "k_max": found.k_max,
        "k_max_bounds": list(found.k_max_bounds),
        "prompt_tokens": found.prompt_tokens,
        "depths": [
            {
                "distance": d.distance,
                "found": d.found,
                "trials": d.trials,
                "interval": list(d.interval),
                "log_probability": d.log_probability,
            }
            for d in found.depths
        ],
        "answers": [
            {
                "depth": a.depth,
                "trial": a.trial,
                "distance": a.distance,
                "found": a.found,
                "log_probability": a.log_probability,
            }
            for a in sorted(found.answers, key=lambda a: (a.depth, a.trial))
        ],
        "seconds": round(found.seconds, 1),
    }
