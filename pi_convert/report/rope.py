"""RoPE as text and JSON."""

from __future__ import annotations

from converters.rope import RopeParameters
from pi_convert.report.console import tokens


def factor_text(value: float) -> str:
    """A factor or a base in as many digits as tell it from any other: 8, 2.2, 1.0000001.

    The last two of a double's 17 digits are left out, where products such as 8.8 * 1.5 go wrong,
    unless what is left would be a whole number and the value is none.
    """
    text = f"{value:.15g}"
    if float(text).is_integer() and not value.is_integer():
        return repr(value)
    return text


def rope_text(rope: RopeParameters) -> str:
    """One line: kind, effective factor, theta, L and L'."""
    return (
        f"{rope.kind}, factor {factor_text(rope.factor)}, theta {factor_text(rope.theta)},"
        f" L {tokens(rope.original_context)}, L' {tokens(rope.context)}"
    )


def evidence_lines(rope: RopeParameters) -> list[str]:
    """How theta, L and L' were told, a line each; assumptions say so."""
    return [
        f"{item.name} by {item.sentence}{' (assumption)' if item.assumed else ''}"
        for item in rope.evidence
    ]


def rope_json(rope: RopeParameters) -> dict[str, object]:
    """The same for machines."""
    llama3 = rope.llama3
    return {
        "kind": rope.kind,
        "factor": rope.factor,
        "theta": rope.theta,
        "rotary_dim": rope.rotary_dim,
        "original_context": rope.original_context,
        "context": rope.context,
        "llama3": None
        if llama3 is None
        else {
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_freq_factor,
            "high_freq_factor": llama3.high_freq_factor,
            "original_context": llama3.original_context,
        },
        "evidence": [
            {"name": e.name, "told_by": e.sentence, "assumed": e.assumed} for e in rope.evidence
        ],
    }
