"""Charts as inline SVG, without scripts; colours are the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pi_convert.report.document import HeatMap, Line, LineChart, Point

SERIES = 8  # classes s0 to s7
_TICKS = 5
_DIGITS, _MOST_DIGITS = 3, 12  # of a tick's number
_FEW_POINTS = 12
_ASIDE = 5.0  # pixels
_CHARACTER = 6.6  # width of a digit at 11 px


@dataclass(frozen=True, slots=True)
class Size:
    """A drawing's size in pixels; charts are drawn for each, since text must not shrink."""

    width: int
    height: int


WIDE, NARROW = Size(760, 340), Size(340, 300)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to pixels."""

    low: float
    high: float
    start: float  # pixels
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self._at(self.low)) / (self._at(self.high) - self._at(self.low))
        return self.start + share * (self.stop - self.start)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(chart: LineChart, size: Size) -> str:
    """The chart; points carry their values as titles."""
    points = [p for line in chart.lines for p in line.points if _drawable(p, chart)]
    if not points:
        return ""
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    ys = [y for y in ys if y > 0 or not chart.log_y]
    y_low, y_high = chart.y_range or _padded(ys, log=chart.log_y)
    marks = [x for x, _ in chart.marks]
    x_low, x_high = _padded([p.x for p in points] + marks, log=chart.log_x, share=0.04)
    y_ticks = _ticks(y_low, y_high, log=chart.log_y)
    y_labels = tick_labels(y_ticks)
    left = 14 + _CHARACTER * max(len(label) for label in y_labels)
    x = _Axis(x_low, x_high, left, size.width - 14, chart.log_x)
    y = _Axis(y_low, y_high, size.height - 44, 24, chart.log_y)
    x_ticks = _x_ticks(chart, points, x, size)
    parts = [_open(size, chart.title)]
    parts += [
        _grid(y(t), left, size.width - 14, label)
        for t, label in zip(y_ticks, y_labels, strict=True)
    ]
    parts += [
        f'<text class="tick" x="{x(t):.1f}" y="{size.height - 26}" text-anchor="middle">'
        f"{number(t)}</text>"
        for t in x_ticks
    ]
    parts += [_mark(x(at), label, size) for at, label in chart.marks]
    for index, line in enumerate(chart.lines):
        parts.append(_line(line, index % SERIES, _beside(x, index, chart), y, chart))
    parts.append(
        f'<text class="label" x="{(left + size.width) / 2:.0f}" y="{size.height - 6}"'
        f' text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


def _beside(x: _Axis, index: int, chart: LineChart) -> Callable[[float], float]:
    """The axis a few pixels aside where few points have neighbours that would hide them."""
    lines = len(chart.lines)
    few = all(len(line.points) <= _FEW_POINTS for line in chart.lines)
    aside = _ASIDE * (index - (lines - 1) / 2) if few else 0.0
    return lambda value: x(value) + aside


def _drawable(point: Point, chart: LineChart) -> bool:
    finite = math.isfinite(point.x) and math.isfinite(point.y)
    return finite and (point.x > 0 or not chart.log_x) and (point.y > 0 or not chart.log_y)


def _open(size: Size, title: str) -> str:
    return f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{escape(title)}">'


def _grid(at: float, left: float, right: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{left:.1f}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _mark(at: float, label: str, size: Size) -> str:
    return (
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{size.height - 44}"/>'
        f'<text class="tick" x="{at:.1f}" y="14" text-anchor="middle">{escape(label)}</text>'
    )


def _line(
    line: Line, series: int, x: Callable[[float], float], y: Callable[[float], float], c: LineChart
) -> str:
    shown = [p for p in line.points if _drawable(p, c)]
    dashed = " control" if line.is_control else ""
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in shown)
    parts = [f'<polyline class="line s{series}{dashed}" points="{path}"/>']
    for p in shown:
        whole = f"{line.name}: {number(p.y)} at {number(p.x)}"
        if p.low is not None and p.high is not None and (p.low > 0 or not c.log_y):
            whole += f" ({number(p.low)} to {number(p.high)})"
            parts.append(
                f'<line class="line s{series}" x1="{x(p.x):.1f}" x2="{x(p.x):.1f}"'
                f' y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
            )
        parts.append(
            f'<circle class="dot s{series}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.2">'
            f"<title>{escape(whole)}</title></circle>"
        )
    return "".join(parts)


def _padded(values: Sequence[float], *, log: bool, share: float = 0.08) -> tuple[float, float]:
    """The range of ``values`` and a little more on both sides."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** share, 1.15)
        return low / room, high * room
    margin = (high - low) * share or max(abs(high), 1.0) * share
    return low - margin, high + margin


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        if len(decades) >= 2:
            return [10.0**e for e in decades][:: math.ceil(len(decades) / _TICKS)]
    step = _nice((high - low) / _TICKS)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1) if i * step > 0 or not log]


def _nice(step: float) -> float:
    size: float = 10.0 ** math.floor(math.log10(step))
    return next(m * size for m in (1, 2, 5, 10) if m * size >= step)


def _x_ticks(chart: LineChart, points: Sequence[Point], x: _Axis, size: Size) -> list[float]:
    """The measured places where few, else round numbers; those that would touch are left out."""
    places = sorted({p.x for p in points})
    ticks = places if len(places) <= 2 * _TICKS else _ticks(x.low, x.high, log=chart.log_x)
    kept: list[float] = []
    for tick in ticks:
        room = _CHARACTER * (len(number(tick)) + 2)
        if not kept or x(tick) - x(kept[-1]) >= room:
            kept.append(tick)
    return [t for t in kept if x(t) <= size.width - 14]


def heat_map(chart: HeatMap, size: Size) -> str:
    """Cells from empty to full colour; a crossed one has a dot."""
    left, top, legend = 34, 8, 34
    columns, rows = len(chart.columns), len(chart.rows)
    wide = (size.width - left - 8) / columns
    high = min(22.0, max(8.0, (size.height - 90) / rows))
    whole = Size(size.width, int(top + high * rows + 44 + legend))
    parts = [_open(whole, chart.title)]
    for r, row in enumerate(chart.shades):
        y = top + r * high
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + high / 2 + 4:.1f}" text-anchor="end">'
            f"{escape(chart.rows[r])}</text>"
        )
        for c, shade in enumerate(row):
            x = left + c * wide
            cell = (
                f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, wide - 1):.1f}" height="{high - 1:.1f}"'
            )
            title = f"<title>{escape(chart.texts[r][c])}</title>"
            parts.append(f'<rect class="empty" {cell}/>')
            if shade is not None:
                parts.append(f'<rect class="heat" fill-opacity="{shade:.3f}" {cell}>{title}</rect>')
            if chart.crossed[r][c]:
                parts.append(
                    f'<circle class="found" cx="{x + wide / 2 - 0.5:.1f}"'
                    f' cy="{y + high / 2 - 0.5:.1f}" r="{min(wide, high) / 5:.1f}"/>'
                )
    bottom = top + rows * high
    parts += _column_ticks(chart, left, wide, bottom + 14)
    middle = (left + size.width) / 2
    parts.append(
        f'<text class="label" x="{middle:.0f}" y="{bottom + 32:.0f}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
    )
    parts += _scale(chart, left, bottom + 46)
    return "".join([*parts, "</svg>"])


def _column_ticks(chart: HeatMap, left: float, wide: float, y: float) -> list[str]:
    parts: list[str] = []
    free = -math.inf
    for c, label in enumerate(chart.columns):
        x = left + (c + 0.5) * wide
        half = _CHARACTER * (len(label) + 1) / 2
        if x - half < free:
            continue
        free = x + half
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{label}</text>'
        )
    return parts


def _scale(chart: HeatMap, left: float, y: float) -> list[str]:
    low, high = chart.scale
    start = left + _CHARACTER * (len(low) + 1)
    parts = [f'<text class="tick" x="{left}" y="{y + 10:.1f}">{escape(low)}</text>']
    for i in range(8):
        box = f'x="{start + 14 * i:.1f}" y="{y:.1f}" width="13" height="12"'
        parts.append(f'<rect class="empty" {box}/>')
        parts.append(f'<rect class="heat" fill-opacity="{i / 7:.3f}" {box}/>')
    end = start + 14 * 8 + 6
    parts.append(f'<text class="tick" x="{end:.1f}" y="{y + 10:.1f}">{escape(high)}</text>')
    return parts


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as numbers, in as many digits as tell them apart."""
    for digits in range(_DIGITS, _MOST_DIGITS):
        labels = [number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            return labels
    return [number(tick, _MOST_DIGITS) for tick in ticks]


def number(value: float, digits: int = _DIGITS) -> str:
    """A value for an axis: thousands separated, small ones in three digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 or (float(value).is_integer() and abs(value) >= 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
