"""What an audit says: findings with stable ids, each with what was found, expected, and to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """How much a finding matters: only ``WRONG`` fails an audit."""

    RIGHT = "right"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement about a file. ``id`` is stable: scripts may rely on it."""

    id: str
    severity: Severity
    found: str  # the key and its value
    expected: str = ""  # what it should be, and what happens because it is not
    action: str = ""  # FILE stands for the file's path


@dataclass(frozen=True, slots=True)
class Audit:
    """Every finding about one file, in the order of the rules."""

    file: str
    architecture: str  # "" where the file does not say
    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity is severity)

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.of(Severity.WRONG)


def wrong(id_: str, found: str, expected: str, action: str = "") -> Finding:
    """A finding that fails the audit."""
    return Finding(id_, Severity.WRONG, found, expected, action)


def note(id_: str, found: str, expected: str, action: str = "") -> Finding:
    """A finding to know about."""
    return Finding(id_, Severity.NOTE, found, expected, action)
