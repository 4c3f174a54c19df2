"""A verdict as text: a line a link, its controls below, the outcome last."""

from __future__ import annotations

from pi_convert.report.console import table
from pi_convert.verify.verdict import Control, LinkResult, Outcome, Status, Verdict

_EXACT = 1e15  # whole numbers below this are written out
_OUTCOMES = {
    Outcome.PROVEN: "PROVEN",
    Outcome.NOT_PROVEN: "NOT PROVEN",
    Outcome.INCONCLUSIVE: "INCONCLUSIVE",
}


def verdict_text(verdict: Verdict) -> str:
    """The whole verdict for people."""
    parts = [
        f"{verdict.artifact} against {verdict.source}",
        f"expected RoPE: {verdict.expected_rope}",
        "",
        *(_link(number, link) for number, link in enumerate(verdict.links, start=1)),
        "",
        outcome_text(verdict),
    ]
    return "\n".join(parts)


def outcome_text(verdict: Verdict) -> str:
    """The outcome, and the links that it comes from."""
    return (
        f"{_OUTCOMES[verdict.outcome]} ({verdict.preset}) in {verdict.seconds:.0f} s"
        f"{_reason(verdict)}"
    )


def _link(number: int, link: LinkResult) -> str:
    head = table(
        [[f"{number} {link.name.value}".ljust(12), link.status.value.ljust(12), link.summary]]
    )
    lines = [head]
    measures = [[name, number_text(value)] for name, value in link.measures.items()]
    if measures:
        lines.append(table(measures, indent=17))
    if link.controls:
        failed = link.status is Status.FAILED
        rows = [_control(control, failed=failed) for control in link.controls]
        lines.append(table(rows, indent=17))
    lines += [f"{'':17}finding: {finding}" for finding in link.findings]
    lines += [f"{'':17}note: {note}" for note in link.notes]
    if link.cause:
        lines.append(f"{'':17}cause: {link.cause}")
    return "\n".join(lines)


def _control(control: Control, *, failed: bool) -> list[str]:
    if control.seen:
        seen = "seen, as it must be"
    elif failed:
        seen = "says nothing, since the run itself is off"
    else:
        seen = "NOT SEEN: this check proves nothing here"
    value, right = number_text(control.value), number_text(control.right)
    return [f"control: {control.name}", f"{value} (right: {right})", seen]


def number_text(value: float | str) -> str:
    """A measured number in as many digits as a person needs."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) < _EXACT and value.is_integer()):
        return f"{int(value):,}"
    return f"{value:.3g}"


def _reason(verdict: Verdict) -> str:
    if verdict.outcome is Outcome.PROVEN:
        return ""
    named = [f"{link.name.value} {link.status.value}" for link in verdict.links
             if link.status.value in ("failed", "inconclusive", "not run")]  # fmt: skip
    return ": " + ", ".join(named)
