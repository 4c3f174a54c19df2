"""The paper's bounds as text and JSON."""

from __future__ import annotations

from converters.rope.bounds import ScoreBounds
from pi_convert.report.console import pairs, tokens
from pi_convert.report.rope import factor_text

SCHEMA_VERSION = 1


def bound_text(label: str, bounds: ScoreBounds) -> str:
    """The bounds for people, with what the paper's own figure supposes."""
    facts = {
        "head dimensions rotated (d)": str(bounds.rotary_dim),
        "theta (c)": factor_text(bounds.theta),
        "L to L'": f"{tokens(bounds.original_context)} to {tokens(bounds.context)}"
        f" tokens (factor {factor_text(bounds.factor)})",
    }
    lines = [
        label,
        pairs(facts),
        "",
        "Attention scores, in units of max |h_j|",
        pairs(
            {
                "interpolated, off by at most": f"{bounds.interpolated:.4f}"
                "  (Theorem 2.1, constant mended)",
                "extrapolated, at least may reach": f"{bounds.extrapolated:,.1f}"
                f"  (equation 8, least at distance {tokens(bounds.at)})",
                "extrapolated, median": f"{bounds.median_extrapolated:,.1f}",
            }
        ),
        "",
        f"The bound on extrapolation is {bounds.ratio:,.0f} times the bound on interpolation at"
        " its least, over all distances from L to L'.",
    ]
    return "\n".join([*lines, *_paper_lines(bounds)])


def _paper_lines(bounds: ScoreBounds) -> list[str]:
    if bounds.paper is None or bounds.paper_ratio is None:
        return [
            "llama3's frequencies are no powers of theta: the paper's closed form is not given."
        ]
    supposes = "holds here" if bounds.least_b >= 1 else "does not hold here"
    return [
        f"The paper's own constant, d / (32 ln c) = {bounds.paper:.4f}, is too small: its equation"
        " 14 has the inequality the wrong way round.",
        f"Its ratio of {bounds.paper_ratio:,.0f} for this d and c supposes B(s) >= d, which"
        f" {supposes} (least B(s) is {bounds.least_b:.2f} d).",
    ]


def bound_json(label: str, bounds: ScoreBounds) -> dict[str, object]:
    """The same for machines; ``schema_version`` changes when a field does."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": label,
        "rotary_dim": bounds.rotary_dim,
        "theta": bounds.theta,
        "factor": bounds.factor,
        "original_context": bounds.original_context,
        "context": bounds.context,
        "interpolated": bounds.interpolated,
        "extrapolated": bounds.extrapolated,
        "extrapolated_at": bounds.at,
        "extrapolated_median": bounds.median_extrapolated,
        "ratio": bounds.ratio,
        "least_b_over_d": bounds.least_b,
        "paper": {"interpolated": bounds.paper, "ratio": bounds.paper_ratio},
    }
