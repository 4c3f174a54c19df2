"""Two models compared, as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, expm1

from pi_convert.evaluate.compare import Paired
from pi_convert.evaluate.models import Model
from pi_convert.evaluate.statistics import Mean
from pi_convert.evaluate.wording import duration
from pi_convert.report.console import pairs, table, tokens
from pi_convert.report.perplexity import mean_json, model_identity

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class CompareReport:
    """Model A against model B."""

    a: Model
    b: Model
    paired: Paired
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As JSON values; ``schema_version`` changes when a field does."""
        found = self.paired
        return {
            "schema_version": SCHEMA_VERSION,
            "a": model_identity(self.a),
            "b": model_identity(self.b),
            "positions": found.positions,
            "documents": found.kl.clusters,
            "kl": {
                **mean_json(found.kl),
                "median": found.kl_median,
                "quantile_99": found.kl_99,
                "largest": found.kl_largest,
            },
            "top1_agreement": found.top1,
            "perplexity": dict(zip("ab", found.perplexities, strict=True)),
            "nll_change": mean_json(found.nll_change),
            "perplexity_ratio": exp(found.nll_change.value),
            "by_position": [
                {
                    "start": span.start,
                    "stop": span.stop,
                    "kl": mean_json(span.kl),
                    "top1_agreement": span.top1,
                }
                for span in found.spans
            ],
            "seconds": round(found.seconds, 1),
            "environment": dict(self.environment),
        }


def compare_text(report: CompareReport) -> str:
    """The comparison for people."""
    found = report.paired
    a, b = found.perplexities
    facts = {
        "KL(A || B)": nats_text(found.kl),
        "KL by rank": f"median {found.kl_median:.3g}, 99 % below {found.kl_99:.3g},"
        f" largest {found.kl_largest:.3g}",
        "same first token": f"{found.top1:.2%}",
        "perplexity": f"A {a:.3f}, B {b:.3f}",
        "A's change of it": ratio_text(found.nll_change),
    }
    rows = [
        [f"{tokens(s.start)} to {tokens(s.stop - 1)}", f"{s.kl.value:>9.3g}", f"{s.top1:.2%}",
         f"{tokens(s.kl.tokens):>9}"]
        for s in found.spans
    ]  # fmt: skip
    return "\n".join(
        [
            f"A: {report.a.name}",
            f"B: {report.b.name}",
            f"{tokens(found.positions)} positions of {found.kl.clusters} document"
            f"{'s'[: found.kl.clusters != 1]}, {duration(found.seconds)}",
            pairs(facts),
            table(rows, header=("position", f"{'KL':>9}", "same first", f"{'tokens':>9}")),
        ]
    )


def nats_text(mean: Mean) -> str:
    """A mean KL with its interval."""
    if mean.interval is None:
        return f"{mean.value:.3g} nats (one document: no interval)"
    low, high = mean.interval
    return f"{mean.value:.3g} nats (95 %: {low:.3g} to {high:.3g})"


def ratio_text(mean: Mean) -> str:
    """A change of NLL as a change of perplexity, with its interval."""
    change = f"{expm1(mean.value):+z.2%}"
    if mean.interval is None:
        return f"{change} (one document: no interval)"
    low, high = mean.interval
    return f"{change} (95 %: {expm1(low):+z.2%} to {expm1(high):+z.2%})"
