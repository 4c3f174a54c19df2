"""A report as a value: a verdict, sections of tables and charts, and what pipelines check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

SCHEMA_VERSION = 1


class Tone(Enum):
    """What a headline is worth."""

    GOOD = "good"
    BAD = "bad"
    UNSURE = "unsure"
    PLAIN = "plain"  # measured, nothing to pass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; columns named in ``numeric`` (by index) are set to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value with its interval, where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one thing; a control is drawn dashed."""

    name: str
    points: tuple[Point, ...]
    is_control: bool = False


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over positions or contexts, with marks such as L on the x axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    marks: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None  # None: as the points need
    has_table: bool = False  # a table beside it has the values, so that text needs no other


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Values by row and column as colours, None where nothing was run.

    ``cells`` are the values in words, for a table; ``texts`` what a cell says of itself. Cells that
    are ``crossed`` get a mark, and ``crossed_where`` says what for.
    """

    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    shades: tuple[tuple[float | None, ...], ...]  # by row, each 0 to 1
    cells: tuple[tuple[str, ...], ...]  # by row
    texts: tuple[tuple[str, ...], ...]  # by row
    crossed: tuple[tuple[bool, ...], ...]
    crossed_where: str  # behind "a dot"
    scale: tuple[str, str]  # what 0 and 1 are


Block = str | Table | LineChart | HeatMap


@dataclass(frozen=True, slots=True)
class Section:
    """A part under a heading; text blocks are paragraphs."""

    title: str
    blocks: tuple[Block, ...]


class Result(Enum):
    """How a check ended, as JUnit counts."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One line for a pipeline."""

    group: str
    name: str
    result: Result
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything of one run. ``kind`` is the command, ``data`` its own JSON."""

    kind: str
    title: str
    verdict: str
    tone: Tone
    lines: tuple[str, ...]  # below the verdict
    sections: tuple[Section, ...]
    checks: tuple[Check, ...]
    environment: Mapping[str, str]
    seconds: float
    data: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; ``schema_version`` names this layout."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "title": self.title,
            "verdict": self.verdict,
            "tone": self.tone.value,
            "checks": [
                {"group": c.group, "name": c.name, "result": c.result.value, "message": c.message}
                for c in self.checks
            ],
            "data": dict(self.data),
        }
