"""A report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from html import escape

from pi_convert.report.document import Block, HeatMap, LineChart, Report, Section, Table
from pi_convert.report.svg import NARROW, SERIES, WIDE, heat_map, line_chart

# Series of charts, on white and on black: each at least 4.5:1 against its background.
_LIGHT = ("#2456c8", "#b4460f", "#0f7a4a", "#8a2be2", "#8a6100", "#c2185b", "#00708a", "#555c66")
_DARK = ("#86aaff", "#ff9d66", "#5ed69a", "#c99bff", "#e6c15c", "#ff86b3", "#5fd0e6", "#aab2bd")


def html_page(report: Report) -> str:
    """The page; light or dark as the reader's system is, from 320 pixels of width on."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(report.title)}</title>",
        f"<style>{_style()}</style></head><body><main>",
        f"<p class=kind>pi-convert {escape(report.kind)}</p><h1>{escape(report.title)}</h1>",
        f'<section class="verdict {report.tone.value}"><p class=headline>'
        f"{escape(report.verdict)}</p>",
        *(f"<p>{escape(line)}</p>" for line in report.lines),
        "</section>",
        *(_section(section) for section in report.sections),
        _environment(report),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section><h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Table():
            return _table(block)
        case LineChart():
            return _figure(block.title, [line_chart(block, s) for s in (WIDE, NARROW)], block)
        case HeatMap():
            title = f"{block.title}; a dot {block.crossed_where}"
            return _figure(title, [heat_map(block, s) for s in (WIDE, NARROW)], None)


def _figure(title: str, drawings: list[str], chart: LineChart | None) -> str:
    """Both drawings; the page shows the one that fits."""
    wide, narrow = drawings
    legend = "" if chart is None else _legend(chart)
    label = "" if chart is None else f"<p class=axis>{escape(chart.y_label)}</p>"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}{label}"
        f"<div class=wide>{wide}</div><div class=narrow>{narrow}</div></figure>"
    )


def _legend(chart: LineChart) -> str:
    items = []
    for index, line in enumerate(chart.lines):
        dash = " control" if line.is_control else ""
        swatch = (
            '<svg class=swatch viewBox="0 0 28 10" aria-hidden="true">'
            f'<line class="line s{index % SERIES}{dash}" x1="0" x2="28" y1="5" y2="5"/></svg>'
        )
        items.append(f"<li>{swatch}{escape(line.name)}</li>")
    return f"<ul class=legend>{''.join(items)}</ul>"


def _table(table: Table) -> str:
    def cells(row: tuple[str, ...], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in table.numeric else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells(table.header, 'th')}</tr></thead>" if table.header else ""
    return f"<div class=scroll tabindex=0><table>{head}<tbody>{rows}</tbody></table></div>"


def _environment(report: Report) -> str:
    rows = tuple((name, value) for name, value in report.environment.items())
    took = f"<p>Took {report.seconds:,.0f} s.</p>"
    table = _table(Table((), rows))
    return f"<section><h2>Environment</h2>{took}{table}</section>"


def _style() -> str:
    light = ";".join(f"--s{i}:{colour}" for i, colour in enumerate(_LIGHT))
    dark = ";".join(f"--s{i}:{colour}" for i, colour in enumerate(_DARK))
    series = "".join(
        f".line.s{i}{{stroke:var(--s{i})}}.dot.s{i}{{fill:var(--s{i})}}" for i in range(len(_LIGHT))
    )
    return _CSS.replace("LIGHT", light).replace("DARK", dark) + series


_CSS = """
:root{--bg:#fff;--fg:#1a1d21;--soft:#5a626c;--rule:#d9dde2;--card:#f5f6f8;--good:#0b6b3a;
--bad:#b3261e;--unsure:#8a5a00;--heat:#2456c8;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e7eaee;--soft:#a3acb7;--rule:#343a42;
--card:#1d2127;--good:#5ed69a;--bad:#ff8a80;--unsure:#f0c060;--heat:#86aaff;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.4rem;line-height:1.3;margin:.1rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .6rem;overflow-wrap:anywhere}
p{margin:.4rem 0;overflow-wrap:anywhere}
.kind,figcaption,.axis{color:var(--soft)}
.kind{font-size:.85rem;margin:0}
.verdict{border-left:.4rem solid var(--soft);background:var(--card);padding:.7rem 1rem;
border-radius:.3rem}
.headline{font-size:1.2rem;font-weight:650;line-height:1.35}
.good{border-color:var(--good)}.good .headline{color:var(--good)}
.bad{border-color:var(--bad)}.bad .headline{color:var(--bad)}
.unsure{border-color:var(--unsure)}.unsure .headline{color:var(--unsure)}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid var(--rule);
vertical-align:top}
th{color:var(--soft);font-weight:600}
.n{text-align:right;white-space:nowrap}
figure{margin:1rem 0}
figcaption{font-weight:600;color:var(--fg);overflow-wrap:anywhere}
.axis{font-size:.8rem;margin:.2rem 0 0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.3rem 0;padding:0;
font-size:.85rem}
.legend li{overflow-wrap:anywhere}
.swatch{width:28px;height:10px;margin-right:.4rem;vertical-align:middle}
.wide svg,.narrow svg{display:block;width:100%;height:auto}
.narrow{display:none}
@media (max-width:40rem){.wide{display:none}.narrow{display:block}}
svg .tick{font-size:11px;fill:var(--soft)}
svg .label{font-size:12px;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:2 3}
.line{fill:none;stroke-width:2}
.control{stroke-dasharray:6 4}
.empty{fill:var(--card);stroke:var(--rule);stroke-width:.5}
.heat{fill:var(--heat)}
.found{fill:var(--bg);stroke:var(--fg);stroke-width:1}
@media print{main{max-width:none}.scroll{overflow:visible}}
"""
