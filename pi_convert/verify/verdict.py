"""What verification found: one result a link, and the outcome they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

SCHEMA_VERSION = 1

Preset = Literal["quick", "full"]


class LinkName(Enum):
    """The five links of the chain, in order."""

    ROPE = "rope"
    WEIGHTS = "weights"
    TOKENIZER = "tokenizer"
    EXECUTION = "execution"
    QUALITY = "quality"


# The links that have to pass: the quick preset reports quality and does not gate it.
REQUIRED: Mapping[Preset, tuple[LinkName, ...]] = {
    "quick": (LinkName.ROPE, LinkName.WEIGHTS, LinkName.TOKENIZER, LinkName.EXECUTION),
    "full": tuple(LinkName),
}


class Status(Enum):
    """How one link ended."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    REPORTED = "reported"  # measured, with no gate to pass
    NOT_RUN = "not run"


class Outcome(Enum):
    """What the links add up to."""

    PROVEN = "proven"
    NOT_PROVEN = "not proven"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """0 for proven, else 3."""
        return 0 if self is Outcome.PROVEN else 3


@dataclass(frozen=True, slots=True)
class Control:
    """A fault put in on purpose: ``seen`` says whether the check tells it from the right run."""

    name: str
    value: float
    right: float  # the same measure on the right run
    seen: bool


@dataclass(frozen=True, slots=True)
class Series:
    """KL by position in one window, in nats a token: what a report draws."""

    name: str
    window: str
    positions: tuple[int, ...]  # the middle of each bin
    values: tuple[float, ...]
    is_control: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # L and L'


@dataclass(frozen=True, slots=True)
class LinkResult:
    """One link: what was measured, the controls beside it, and the cause where it failed.

    ``findings`` are all faults, ``notes`` what differs and is right.
    """

    name: LinkName
    status: Status
    summary: str
    measures: Mapping[str, float | int | str] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    cause: str | None = None
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """All links of one artifact held against one source."""

    artifact: str  # file name
    source: str  # the checkpoint's label
    preset: Preset
    links: tuple[LinkResult, ...]
    environment: Mapping[str, str]
    expected_rope: str = ""
    seconds: float = 0.0
    schema_version: int = SCHEMA_VERSION

    @property
    def outcome(self) -> Outcome:
        """Not proven where a link failed, proven where every required one passed."""
        statuses = {link.name: link.status for link in self.links}
        if Status.FAILED in statuses.values():
            return Outcome.NOT_PROVEN
        required = [statuses.get(name, Status.NOT_RUN) for name in REQUIRED[self.preset]]
        if all(status is Status.PASSED for status in required):
            return Outcome.PROVEN
        return Outcome.INCONCLUSIVE

    def link(self, name: LinkName) -> LinkResult:
        """The result of one link."""
        return next(link for link in self.links if link.name is name)

    def to_json(self) -> dict[str, object]:
        """The verdict as JSON values; ``schema_version`` names this layout."""
        return {
            "schema_version": self.schema_version,
            "artifact": self.artifact,
            "source": self.source,
            "preset": self.preset,
            "expected_rope": self.expected_rope,
            "outcome": self.outcome.value,
            "links": [_link_json(link) for link in self.links],
            "seconds": round(self.seconds, 1),
            "environment": dict(self.environment),
        }


def _link_json(link: LinkResult) -> dict[str, object]:
    return {
        "name": link.name.value,
        "status": link.status.value,
        "summary": link.summary,
        "measures": {name: _json_number(value) for name, value in link.measures.items()},
        "controls": [
            {
                "name": c.name,
                "value": _json_number(c.value),
                "right": _json_number(c.right),
                "seen": c.seen,
            }
            for c in link.controls
        ],
        "cause": link.cause,
        "findings": list(link.findings),
        "notes": list(link.notes),
        "series": [
            {
                "name": s.name,
                "window": s.window,
                "control": s.is_control,
                "positions": list(s.positions),
                "values": [_json_number(value) for value in s.values],
            }
            for s in link.series
        ],
    }


def _json_number(value: float | int | str) -> float | int | str:
    """JSON has no nan and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
