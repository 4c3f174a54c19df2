"""Audits and repairs as text and JSON."""

from __future__ import annotations

import shutil
import textwrap
from math import isfinite
from typing import TYPE_CHECKING

from converters.rope import Evidence
from pi_convert.audit.findings import Audit, Finding, Severity
from pi_convert.audit.header import plain, short
from pi_convert.report.console import size, table, tokens
from pi_convert.report.rope import factor_text

if TYPE_CHECKING:
    from converters.targets.gguf.rewrite import RewrittenGguf
    from pi_convert.audit.repair import Repair

SCHEMA_VERSION = 1
_ORDER = (Severity.WRONG, Severity.NOTE, Severity.RIGHT)
_MIN_WIDTH, _MAX_WIDTH = 60, 120
_LABEL_WIDTH = 10


def audit_text(audit: Audit, *, width: int | None = None) -> str:
    """What is wrong first, then notes, then what is right; at most ``width`` columns."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    columns = max(_MIN_WIDTH, min(columns, _MAX_WIDTH))
    counts = ", ".join(f"{len(audit.of(s))} {s.value}" for s in _ORDER)
    lines = [f"{audit.file}: {audit.architecture or 'no architecture'}; {counts}"]
    for severity in _ORDER:
        for finding in audit.of(severity):
            lines.extend(_finding_lines(finding, audit.file, columns))
    verdict = "right" if audit.is_right else "wrong: what is listed above first needs repair"
    return "\n".join([*lines, "", f"The file is {verdict}."])


def _finding_lines(finding: Finding, file: str, columns: int) -> list[str]:
    if finding.severity is Severity.RIGHT:
        return _wrapped(f"right  {finding.id}: ", finding.found, columns)
    label = finding.severity.value.upper() if finding.severity is Severity.WRONG else "note "
    lines = ["", f"{label}  {finding.id}"]
    for name, text in (
        ("found", finding.found),
        ("expected", finding.expected),
        ("do", finding.action.replace("FILE", file)),
    ):
        if text:
            lines.extend(_wrapped(f"       {name:<{_LABEL_WIDTH}}", text, columns))
    return lines


def _wrapped(label: str, text: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=label,
        subsequent_indent=" " * (7 + _LABEL_WIDTH),
        break_long_words=False,
        break_on_hyphens=False,
    )


def audit_json(audit: Audit) -> dict[str, object]:
    """The same for machines; ``schema_version`` changes when a field does."""
    return {
        "schema_version": SCHEMA_VERSION,
        "file": audit.file,
        "architecture": audit.architecture or None,
        "right": audit.is_right,
        "counts": {severity.value: len(audit.of(severity)) for severity in _ORDER},
        "findings": [
            {
                "id": finding.id,
                "severity": finding.severity.value,
                "found": finding.found,
                "expected": finding.expected or None,
                "action": finding.action.replace("FILE", audit.file) or None,
            }
            for finding in audit.findings
        ],
    }


def repair_text(repair: Repair, written: RewrittenGguf) -> str:
    """The keys before and after, L and L' with their evidence, and what was compared."""
    rows = [[change.key, _shown(change.before), _shown(change.after)] for change in written.changes]
    changed = table(rows, header=("key", "before", "after")) if rows else "  no key had to change"
    lines = [
        f"{written.path}: factor {factor_text(repair.factor)},"
        f" L {tokens(repair.original_context)}, L' {tokens(repair.context)}",
        *(f"  {_told(evidence)}" for evidence in repair.evidence),
        "",
        changed,
        "",
        *(f"note: {note}" for note in repair.notes),
        f"{len(written.tensor_hashes)} tensors copied, every hash as before;"
        f" {size(written.size_bytes)}.",
    ]
    return "\n".join(lines)


def repair_json(repair: Repair, written: RewrittenGguf) -> dict[str, object]:
    """The same for machines, with every tensor's hash."""
    return {
        "schema_version": SCHEMA_VERSION,
        "file": str(written.path),
        "size_bytes": written.size_bytes,
        "factor": repair.factor,
        "original_context": repair.original_context,
        "context": repair.context,
        "evidence": [
            {"name": e.name, "told_by": e.sentence, "assumed": e.assumed} for e in repair.evidence
        ],
        "changes": [
            {"key": c.key, "before": _plain_json(c.before), "after": c.after}
            for c in written.changes
        ],
        "notes": list(repair.notes),
        "tensor_sha256": dict(written.tensor_hashes),
    }


def _told(evidence: Evidence) -> str:
    return f"{evidence.name}: {evidence.sentence}{' (assumption)' if evidence.assumed else ''}"


def _shown(value: object) -> str:
    if isinstance(value, float) and isfinite(value):
        return factor_text(short(value))
    return "-" if value is None else plain(value)


def _plain_json(value: object) -> object:
    """A key's value as JSON has it; what JSON has not (NaN, arrays) as text."""
    is_plain = value is None or isinstance(value, bool | int | str)
    return value if is_plain or (isinstance(value, float) and isfinite(value)) else plain(value)
