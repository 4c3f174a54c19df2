"""Perplexity as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, expm1

from pi_convert.evaluate.models import Model
from pi_convert.evaluate.perplexity import (
    AtContext,
    Growth,
    LlamaCppPerplexity,
    Measured,
    Plan,
    against,
)
from pi_convert.evaluate.statistics import Mean
from pi_convert.evaluate.wording import duration
from pi_convert.report.console import table, tokens

SCHEMA_VERSION = 1
# A change of perplexity of which the whole interval is smaller is called none: the fourth digit.
_NO_CHANGE = 5e-4


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """What was measured on one plan, model by model."""

    plan: Plan
    models: Sequence[tuple[Model, Measured]]
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As JSON values; ``schema_version`` changes when a field does."""
        return _perplexity_json(self)


@dataclass(frozen=True, slots=True)
class LlamaCppReport:
    """llama-perplexity's numbers, model by model and context by context."""

    models: Sequence[tuple[Model, Sequence[LlamaCppPerplexity]]]
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As JSON values; ``schema_version`` changes when a field does."""
        return _llamacpp_json(self)


def plan_text(plan: Plan) -> str:
    """What is scored, in one sentence."""
    share = f"{len(plan.stretches)} of {plan.available}"
    left_out = f"; {plan.too_short} shorter than {plan.contexts[-1]:,} tokens left out"
    return (
        f"{tokens(plan.scored_tokens)} tokens scored, the same at every context: {share} strides of"
        f" {plan.stride}, {_documents_text(plan)}"
        + (" joined" if plan.joined else "")
        + (left_out if plan.too_short else "")
    )


def _documents_text(plan: Plan) -> str:
    count, of = plan.documents, plan.documents_available
    if count == of:
        return f"from {count} document{'s'[: count != 1]}"
    verb = "fall" if len(plan.stretches) > 1 else "falls"
    return f"which {verb} into {count} of {of} documents"


def model_text(model: Model, measured: Measured) -> str:
    """One model's table and how its perplexity grows."""
    rows = [
        [
            f"{tokens(at.context):>9}",
            f"{at.perplexity:>10.3f}",
            interval_text(at),
            place_text(at.context, model),
        ]
        for at in measured.at
    ]
    head = f"{model.name} ({_contexts(model)}), {duration(measured.seconds)}"
    header = ("  context", "perplexity", "95 %", "")
    lines = [head, table(rows, header=header)]
    lines += [f"  {growth_text(growth)}" for growth in measured.growth]
    return "\n".join(lines)


def against_lines(report: PerplexityReport, index: int) -> list[str]:
    """How model ``index`` compares with the first at every context; none for the first itself."""
    (first, base), (_, measured) = report.models[0], report.models[index]
    if index == 0:
        return []
    return [
        f"against {first.name} at {tokens(context)} tokens: {percent_text(change)}"
        for context, change in against(base, measured).items()
    ]


def percent_text(change: Mean) -> str:
    """A paired change of NLL as one of perplexity, with its interval."""
    size, ends = f"{expm1(change.value):+.1%}", change.interval
    if ends is None:
        return f"{size} (one document, so no interval)"
    return f"{size} (95 %, paired: {expm1(ends[0]):+.1%} to {expm1(ends[1]):+.1%})"


def _contexts(model: Model) -> str:
    if model.original_context is None or model.context is None:
        return "L not stated"
    return f"L {tokens(model.original_context)}, L' {tokens(model.context)}"


def place_text(context: int, model: Model) -> str:
    """Where a context lies: past L, past L', or neither."""
    if model.context is not None and context > model.context:
        return "past L'"
    if model.original_context is not None and context > model.original_context:
        return "past L"
    return ""


def interval_text(at: AtContext) -> str:
    """The interval, or why there is none."""
    ends = at.interval
    return "one document: no interval" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def growth_text(growth: Growth) -> str:
    """What a longer window does to perplexity, as far as the interval leaves no doubt."""
    change, ends = growth.change.value, growth.change.interval
    span = f"from {tokens(growth.start)} to {tokens(growth.stop)} tokens"
    size = f"{expm1(change):+.1%}"
    if ends is None:
        return (
            f"{span} perplexity changes by {size}, and one document cannot tell whether that is"
            " more than chance"
        )
    low, high = (expm1(end) for end in ends)
    bounds = f"({size}, 95 %: {low:+.1%} to {high:+.1%})"
    if max(abs(low), abs(high)) < _NO_CHANGE:
        return f"{span} perplexity stays {bounds}"
    if low <= 0 <= high:
        return f"{span} no change that these documents can tell {bounds}"
    return f"{span} perplexity {'falls' if change < 0 else 'rises'} {bounds}"


def _perplexity_json(report: PerplexityReport) -> dict[str, object]:
    plan = report.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": "paper",
        "stride": plan.stride,
        "scored_tokens": plan.scored_tokens,
        "strides": len(plan.stretches),
        "strides_available": plan.available,
        "documents": plan.documents,
        "documents_too_short": plan.too_short,
        "joined": plan.joined,
        "models": [
            _model_json(model, measured) | _against_json(report, measured)
            for model, measured in report.models
        ],
        "environment": dict(report.environment),
    }


def _against_json(report: PerplexityReport, measured: Measured) -> dict[str, object]:
    """``against_first``: paired changes by context; empty for the first model."""
    _, first = report.models[0]
    changes = {} if measured is first else against(first, measured)
    return {
        "against_first": [
            {"context": context, "ratio": exp(change.value), "nll_change": mean_json(change)}
            for context, change in changes.items()
        ]
    }


def _model_json(model: Model, measured: Measured) -> dict[str, object]:
    return {
        **model_identity(model),
        "contexts": [
            {
                "context": at.context,
                "perplexity": at.perplexity,
                "interval": None if at.interval is None else list(at.interval),
                "nll": mean_json(at.nll),
            }
            for at in measured.at
        ],
        "growth": [
            {
                "from": growth.start,
                "to": growth.stop,
                "ratio": exp(growth.change.value),
                "nll_change": mean_json(growth.change),
                "sentence": growth_text(growth),
            }
            for growth in measured.growth
        ],
        "seconds": round(measured.seconds, 1),
    }


def model_identity(model: Model) -> dict[str, object]:
    """Which model, in which runtime."""
    return {
        "model": model.label,
        "runtime": model.runtime,
        "original_context": model.original_context,
        "context": model.context,
    }


def mean_json(mean: Mean) -> dict[str, object]:
    """A mean, its standard error and interval clustered by document."""
    return {
        "value": mean.value,
        "standard_error": mean.standard_error,
        "interval": None if mean.interval is None else list(mean.interval),
        "tokens": mean.tokens,
        "documents": mean.clusters,
    }


def llamacpp_text(model: Model, found: LlamaCppPerplexity) -> str:
    """One line as llama-perplexity's last."""
    return (
        f"{model.name}: PPL = {found.perplexity:.4f} +/- {found.standard_error:.5f}"
        f" ({found.windows} windows of {tokens(found.context)}, {tokens(found.tokens)} tokens"
        " scored)"
    )


def _llamacpp_json(report: LlamaCppReport) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": "llama.cpp",
        "models": [
            {
                **model_identity(model),
                "contexts": [
                    {
                        "context": one.context,
                        "windows": one.windows,
                        "perplexity": one.perplexity,
                        "standard_error_of_independent_tokens": one.standard_error,
                        "tokens": one.tokens,
                    }
                    for one in found
                ],
            }
            for model, found in report.models
        ],
        "environment": dict(report.environment),
    }
