"""A report as Markdown: charts become tables of their values."""

from __future__ import annotations

from collections.abc import Sequence

from pi_convert.report.document import Block, HeatMap, LineChart, Report, Table
from pi_convert.report.svg import number

_MOST_POINTS = 40
_CROSSED = "*"


def markdown(report: Report) -> str:
    """The report; verdict first."""
    parts = [f"# {report.title}", f"**{report.verdict}**", *report.lines]
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks]
    rows = [[name, value] for name, value in report.environment.items()]
    parts += ["## Environment", _table(("", ""), rows, frozenset())]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case str():
            return _plain(block)
        case Table():
            return _table(block.header, block.rows, block.numeric)
        case LineChart() if block.has_table:
            return _plain(block.title)
        case LineChart():
            return f"{_plain(block.title)}\n\n{_points(block)}"
        case HeatMap():
            title = _plain(f"{block.title}; {_CROSSED} {block.crossed_where}")
            rows = [[r, *cells] for r, cells in zip(block.rows, _cells(block), strict=True)]
            header = (f"{block.y_label} / {block.x_label}", *block.columns)
            return f"{title}\n\n{_table(header, rows, frozenset())}"


def _cells(chart: HeatMap) -> list[list[str]]:
    return [
        [cell + _CROSSED * crossed for cell, crossed in zip(cells, marks, strict=True)]
        for cells, marks in zip(chart.cells, chart.crossed, strict=True)
    ]


def _points(chart: LineChart) -> str:
    places = sorted({point.x for line in chart.lines for point in line.points})
    step = -(-len(places) // _MOST_POINTS)
    by_line = [{point.x: point.y for point in line.points} for line in chart.lines]
    rows = [
        [number(x), *(number(found[x]) if x in found else "-" for found in by_line)]
        for x in places[::step]
    ]
    header = (chart.x_label, *(line.name for line in chart.lines))
    return _table(header, rows, frozenset(range(len(header))))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: frozenset[int]) -> str:
    width = len(rows[0]) if rows else len(header)
    head = header or ("",) * width
    rule = ["---:" if i in numeric else "---" for i in range(width)]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
