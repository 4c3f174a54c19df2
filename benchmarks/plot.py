"""Charts of the reports as files of their own, readable on light and dark pages."""

from __future__ import annotations

from html import escape

from pi_convert.report.document import LineChart
from pi_convert.report.svg import Size, line_chart

_SIZE = Size(760, 340)
_COLOURS = ("#3987e5", "#d9622b", "#2f9e63", "#a05bd6", "#c2871b", "#d44a7a", "#1fa3a3", "#8a8f98")
_ROW = 20  # pixels of a line of the legend
_STYLE = (
    "text{font-family:sans-serif;fill:#7a828c}.tick{font-size:11px}.label{font-size:12px}"
    ".grid{stroke:#8884}.mark{stroke:#7a828c;stroke-dasharray:2 3}.line{fill:none;stroke-width:2}"
    ".control{stroke-dasharray:6 4}"
) + "".join(
    f".line.s{i}{{stroke:{colour}}}.dot.s{i}{{fill:{colour}}}" for i, colour in enumerate(_COLOURS)
)


def standalone(chart: LineChart) -> str:
    """The chart with its title above, its legend below and its colours inside."""
    drawn = line_chart(chart, _SIZE)
    inner = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -28 {_SIZE.width}'
        f' {_SIZE.height + 40 + _ROW * len(chart.lines)}" role="img">',
        f"<title>{escape(chart.title)}</title><style>{_STYLE}</style>",
        f'<text x="10" y="-10" font-size="14">{escape(chart.y_label)}</text>',
        inner,
    ]
    for index, line in enumerate(chart.lines):
        y = _SIZE.height + 14 + _ROW * index
        dashed = " control" if line.is_control else ""
        parts.append(f'<line class="line s{index}{dashed}" x1="20" x2="48" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="label" x="58" y="{y + 4}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
