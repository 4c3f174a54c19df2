"""RoPE as text and JSON."""

from __future__ import annotations

from converters.rope import RopeParameters
from pi_convert.report.console import tokens


def rope_text(rope: RopeParameters) -> str:
    """One line: kind, effective factor, theta, L and L'."""
    return (
        f"{rope.kind}, factor {rope.factor:g}, theta {rope.theta:g},"
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
