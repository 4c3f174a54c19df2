"""Report pages in headless Chromium: narrow and wide, light and dark."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pi_convert import cli
from pi_convert.report.html import html_page
from tests.clients.browser import visit
from tests.clients.environments import Chromium, chromium
from tests.pi_convert.report.pages import REPORT
from tests.tiny import write_tiny

pytestmark = pytest.mark.client

PAGE_SECONDS = 120
# What a reader would see, told by the page itself once it is laid out.
PROBE = """<script>
const seen = query => [...document.querySelectorAll(query)].filter(e => e.getClientRects().length);
const shown = seen('.wide svg, .narrow svg');
const colour = e => getComputedStyle(e).color;
const scale = s => s.getBoundingClientRect().width / s.viewBox.baseVal.width;
const ink = seen('svg .line');
parent.fetch('/out/answer.json', {method: 'POST', body: JSON.stringify({
  width: innerWidth, content: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor, text: colour(document.body),
  charts: shown.length, scales: shown.map(scale),
  spill: shown.flatMap(s => [...s.querySelectorAll('text')].filter(t => {
    const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
  }).map(t => t.textContent)),
  strokes: [...new Set(ink.map(e => getComputedStyle(e).stroke))],
  headline: document.querySelector('.headline').getBoundingClientRect().top,
  verdict: document.querySelector('.headline').textContent,
  first: document.querySelector('.verdict, svg, table').className,
  marks: [...new Set(seen('line.mark + text').map(e => e.textContent))],
  artifacts: seen('polyline.line').filter(e => !e.matches('.control')).length,
  controls: seen('.legend li').filter(e => e.querySelector('.control')).map(e => e.textContent),
  cells: seen('rect.heat, rect.empty').filter(e => e.querySelector('title')).length,
})});
</script>"""


@pytest.fixture(scope="module")
def browser() -> Chromium:
    return chromium()


def look(browser: Chromium, page: str, folder: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the page says of itself at a width, in light or dark.

    In a frame: headless Chromium's own window is never narrower than 500 pixels.
    """
    page = page.replace("</body>", f"{PROBE}</body>")
    frame = folder / "frame.html"
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe style="border:0;width:{width}px;'
        f'height:900px" srcdoc="{html.escape(page)}"></iframe></body>',
        "utf-8",
    )
    visit(
        browser, "out/frame.html", {"out": folder}, PAGE_SECONDS, "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,900",
    )  # fmt: skip
    seen: dict[str, Any] = json.loads((folder / "answer.json").read_text("utf-8"))
    return seen


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of rgb(r, g, b)."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_fits_and_can_be_read(
    browser: Chromium, width: int, dark: bool, tmp_path: Path
) -> None:
    seen = look(browser, html_page(REPORT), tmp_path, width, dark=dark)
    assert seen["width"] == width
    assert seen["content"] <= width  # nothing to scroll sideways
    assert seen["charts"] == 2  # of each drawn twice, the one that fits
    assert all(0.9 <= scale <= 1.3 for scale in seen["scales"])  # text keeps its size
    assert seen["spill"] == []
    assert seen["headline"] < 300
    assert (luminance(seen["background"]) < 0.1) == dark
    assert contrast(seen["text"], seen["background"]) >= 7
    assert len(seen["strokes"]) == 2
    assert all(contrast(stroke, seen["background"]) >= 4.5 for stroke in seen["strokes"])


def made(what: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """(the page that a command writes of a tiny model, its report.json)."""
    out, text = folder / "report", folder / "text.txt"
    model = str(write_tiny(folder / "Tiny-Model"))
    text.write_text("RoPE turns each pair of a query by its position; 12 is a number.\n" * 80)
    words = ["--threads", "1", "--report", str(out)]
    more, few = ["--text", str(text)], ["--trials", "2"]
    other = str(write_tiny(folder / "Other-Model", seed=1))
    file = str(folder / "gguf" / "Tiny-Model-PI8-F32.gguf")
    commands = {
        "verify": ["verify", file, "--against", model, "--scale", "8", *words],
        "perplexity": ["perplexity", model, "--scale", "2", "--contexts", "64,256", *more, *words],
        "compare": ["compare", model, other, "--context", "128", *more, *words],
        "passkey": ["passkey", model, "--scale", "8", "--max-context", "900", *few, *words],
        "finetune": ["finetune", model, "--scale", "2", "--steps", "3", "--batch", "1", *more,
                     "--eval-every", "1", "--out", str(folder / "tuned")],
    }  # fmt: skip
    if what == "verify":
        exported = ["export", model, "--to", "gguf", "--scale", "8", "--quantize", "f32"]
        assert cli.run([*exported, "--out", str(folder / "gguf")]) == 0
    assert cli.run(commands[what]) == 0
    if what == "finetune":
        return (folder / "tuned" / "run" / "loss.html").read_text("utf-8"), {}
    report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return (out / "report.html").read_text("utf-8"), report


# L is 128; --scale makes L' 1,024 and 256 of it.
MARKS = {
    "verify": ["L", "L'"],
    "perplexity": ["L", "L'"],
    "compare": ["L"],
    "passkey": ["L", "L'"],
    "finetune": [],
}


CONTROLS = ["factor dropped", "factor halved", "factor doubled", "theta / 10"]


@pytest.mark.parametrize("what", MARKS)
def test_the_pages_of_commands_fit(browser: Chromium, what: str, tmp_path: Path) -> None:
    page, report = made(what, tmp_path)
    for width, dark in itertools.product((390, 1280), (False, True)):
        seen = look(browser, page, tmp_path, width, dark=dark)
        assert seen["content"] <= width
        assert seen["charts"] >= 1
        assert seen["spill"] == []
        assert seen["headline"] < 300
        assert seen["first"].startswith("verdict")
        assert (luminance(seen["background"]) < 0.1) == dark
        assert contrast(seen["text"], seen["background"]) >= 7
        assert seen["marks"] == MARKS[what]
        if what == "verify":  # KL by position: the artifact and its wrong twins
            assert seen["verdict"].startswith("PROVEN")
            assert seen["artifacts"] == seen["charts"] >= 2  # one a window
            assert {f"control: {name}" for name in CONTROLS} <= set(seen["controls"])
        if what == "passkey":
            (only,) = report["data"]["models"]
            assert seen["cells"] == sum(depth["trials"] for depth in only["depths"]) > 2
