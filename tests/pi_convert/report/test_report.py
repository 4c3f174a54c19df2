"""Reports: one page that needs nothing else, and the same in forms for machines."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from converters.errors import OutputError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert import cli
from pi_convert.report.document import Line, LineChart, Point
from pi_convert.report.folder import FILES, require_writable, write_report
from pi_convert.report.html import html_page
from pi_convert.report.junit import junit_xml
from pi_convert.report.markdown import markdown
from pi_convert.report.svg import NARROW, WIDE, line_chart, number, tick_labels
from tests.pi_convert.report.pages import REPORT
from tests.tiny import write_tiny

WORDS = "RoPE turns each pair of a query by its position; 12 and 345 are numbers.\n"


class Page(HTMLParser):
    """Fails on tags that do not close in order, and gathers tags and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else() -> None:
    text = html_page(REPORT)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not attributes & {"src", "href", "onclick", "onload"}
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 * 2 + 2  # each chart twice, two swatches


def test_the_verdict_comes_first_and_text_stays_text() -> None:
    page = Page(html_page(REPORT))
    assert page.text.index("It falls | as") < page.text.index("Charts")
    for said in ("Perplexity of <model>", "<one> & other", "A paragraph.", "a|b", "3.11", "<d>",
                 "A map; a dot where it was found"):  # fmt: skip
        assert said in page.text
    classes = [attrs.get("class") or "" for _, attrs in page.tags]
    assert "verdict good" in classes


def test_a_chart_puts_points_where_they_belong() -> None:
    chart = LineChart("c", "x", "y", (Line("l", (Point(1, 1), Point(10, 2), Point(100, 3))),),
                      ((10.0, "L"),), log_x=True)  # fmt: skip
    for size in (WIDE, NARROW):
        drawing = ElementTree.fromstring(line_chart(chart, size))
        dots = [(float(d.attrib["cx"]), float(d.attrib["cy"])) for d in drawing.iter("circle")]
        (x0, y0), (x1, y1), (x2, y2) = dots
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # decades
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
        assert y2 < y1 < y0
        assert 0 < min(x0, y2) < max(x2, y0) < size.width
        (mark,) = [line for line in drawing.iter("line") if line.attrib["class"] == "mark"]
        assert float(mark.attrib["x1"]) == pytest.approx(x1, abs=0.1)


@pytest.mark.parametrize(
    "line",
    [
        Line("one point", (Point(5, 5),)),
        Line("equal", (Point(1, 2, 2, 2), Point(2, 2, 2, 2))),
        Line("zeros on a log axis", (Point(1, 0.0), Point(2, 1e-9, -1e-9, 2e-9))),
        Line("not finite", (Point(1, float("nan")), Point(2, float("inf")), Point(3, 1.0))),
        Line("nothing", ()),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_values_are_drawn_or_left_out(line: Line, log: bool) -> None:
    drawing = line_chart(LineChart("c", "x", "y", (line,), log_y=log), WIDE)
    assert "nan" not in drawing
    assert "inf" not in drawing
    if drawing:
        ElementTree.fromstring(drawing)


def test_numbers_on_axes() -> None:
    assert [number(v) for v in (0, 1024, 12.0, 0.25, 5 * 10.0**-6, 1.25e-5)] == [
        "0", "1,024", "12", "0.25", "5e-06", "1.25e-05",
    ]  # fmt: skip


def test_ticks_have_the_digits_that_tell_them_apart() -> None:
    assert tick_labels([6.246, 6.248, 6.25]) == ["6.246", "6.248", "6.25"]
    assert tick_labels([0.1, 0.30000000000000004, 0.5]) == ["0.1", "0.3", "0.5"]
    narrow = Line("loss", (Point(1, 6.2461), Point(2, 6.2474), Point(3, 6.2489)))
    drawing = line_chart(LineChart("c", "x", "y", (narrow,)), WIDE)
    ticks = re.findall(r'text-anchor="end">([\d.]+)<', drawing)
    assert len(ticks) > 2
    assert len(set(ticks)) == len(ticks)


def test_markdown_says_the_same() -> None:
    text = markdown(REPORT)
    assert text.startswith("# Perplexity of <model>\n\n**It falls")
    assert "| 512 | 12 | 40 |" in text
    assert "| a\\|b | 1 |" in text
    assert "A map; \\* where it was found" in text
    assert "| 1 | -8.63 | -0.50\\* |" in text  # values, not the colours' shades
    assert "| 2 | - | -11.51 |" in text
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert line.count("|") - line.count("\\|") >= 3


def test_junit_counts_what_failed_and_what_was_left_out() -> None:
    suite = ElementTree.fromstring(junit_xml(REPORT).encode())[0]
    assert {k: suite.attrib[k] for k in ("tests", "failures", "skipped")} == {
        "tests": "3", "failures": "1", "skipped": "1",
    }  # fmt: skip
    failures = [case.find("failure") for case in suite.iter("testcase")]
    (failure,) = [f for f in failures if f is not None]
    assert failure.attrib["message"] == "off by\ufffd 2"


def test_a_report_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_report(REPORT, folder, force=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    found = json.loads((folder / "report.json").read_text())
    assert (found["schema_version"], found["kind"], found["data"]["perplexity"]) == (
        1, "perplexity", 9.5,
    )  # fmt: skip
    with pytest.raises(OutputError, match="exists"):
        require_writable(folder, force=False)
    (folder / "mine.txt").write_text("kept")
    write_report(REPORT, folder, force=True)
    assert (folder / "mine.txt").read_text() == "kept"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("report") / "Tiny-Model")  # L 128


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    checkpoint = open_checkpoint(str(model)).interpolate(4)
    return write_gguf(checkpoint, plan_gguf(checkpoint, ["f16"]), model.parent / "out")[0].path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b"):
        (folder / name).write_text("".join(f"{name}{i}. {WORDS}" for i in range(15)))
    return [f"--text={folder / name}" for name in ("a", "b")]


@pytest.mark.parametrize(
    ("command", "words", "shows", "settings"),
    [
        (
            "perplexity",
            ["--contexts", "64,256", "--stride", "32"],
            "from 64 to 256 tokens",
            {"contexts": "64,256", "stride": "32", "max_windows": "16", "protocol": "paper"},
        ),
        (
            "perplexity",
            ["--contexts", "64", "--protocol", "llama.cpp"],
            "PPL = ",
            {"contexts": "64", "max_windows": "0", "protocol": "llama.cpp"},
        ),
        (
            "compare",
            ["MODEL", "--scale", "4", "--context", "256"],
            "the same first token in",
            {"context": "256", "documents": "8", "protocol": "documents", "scale": "4.0"},
        ),
        (
            "passkey",
            ["--max-context", "300", "--depths", "3", "--trials", "2"],
            "k_max none",
            {"max_context": "300", "depths": "3", "trials": "2", "seed": "0"},
        ),
    ],
)
def test_every_measuring_command_writes_one(
    *,
    command: str,
    words: list[str],
    shows: str,
    settings: dict[str, str],
    model: Path,
    artifact: Path,
    text: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [str(model) if word == "MODEL" else word for word in words]
    words += ["--threads", "1", "--report", str(tmp_path / "r")]
    words += text if command != "passkey" else []
    assert cli.run([command, str(artifact), *words, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert json.loads((tmp_path / "r" / "report.json").read_text())["data"] == printed
    page = Page((tmp_path / "r" / "report.html").read_text())
    assert shows in page.text
    assert artifact.name in page.text
    assert "llama-cpp-python" in page.text
    expected = settings | {"ubatch": "512", "kv_cache_type": "f16", "extrapolate": "False"}
    if command != "passkey":
        for number, word in enumerate(text, start=1):
            path = Path(word.removeprefix("--text="))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            expected[f"text {number}"] = f"{path.name}, SHA-256 {digest}"
    assert expected.items() <= printed["environment"].items()
    assert all(value in page.text for value in expected.values())
    # A second run does no work before it is refused.
    assert cli.run([command, "missing.gguf", *words]) == 1
    assert "report.json exists" in capfd.readouterr().err
    # Nor does one whose report has no place.
    file = tmp_path / "r" / "report.md"
    for place in (file, file / "below"):
        assert cli.run([command, "missing.gguf", *words, "--report", str(place)]) == 1
        said = capfd.readouterr().err
        assert f"{file} is no folder" in said
        assert "Give another --report." in said


def test_verify_writes_one_with_its_controls_by_position(
    model: Path,
    artifact: Path,
    text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pi_convert.verify.tokenizer.MINIMUM_TOKENS", 2000)
    monkeypatch.setattr("pi_convert.verify.tokenizer.UNICODE_TOKENS", 1000)
    words = ["--scale", "4", "--threads", "1", *text, "--report"]
    whole = ["verify", str(artifact), "--against", str(model), *words, str(tmp_path / "right")]
    assert cli.run(whole) == 0
    page = Page((tmp_path / "right" / "report.html").read_text())
    assert "PROVEN (quick)" in page.text
    assert "KL against torch by position, window across L" in page.text
    (verdict,) = json.loads((tmp_path / "right" / "report.json").read_text())["data"]["verdicts"]
    execution = next(link for link in verdict["links"] if link["name"] == "execution")
    series = {(s["window"], s["name"]): s for s in execution["series"]}
    right = series["across L", "artifact"]
    dropped = series["across L", "control: factor dropped"]
    assert right["positions"] == dropped["positions"]
    assert min(right["positions"]) >= 128  # L: what is scored lies past it
    assert min(dropped["values"]) > 100 * max(right["values"])
    # The bins are of nearly one size: their mean is the link's own figure.
    assert sum(right["values"]) / len(right["values"]) == pytest.approx(
        execution["measures"]["mean KL, across L"], rel=0.05
    )
    wrong = [*words[:1], "8", *words[2:], str(tmp_path / "wrong")]
    assert cli.run(["verify", str(artifact), "--against", str(model), *wrong]) == 3
    suite = ElementTree.parse(tmp_path / "wrong" / "junit.xml").getroot()[0]
    assert suite.attrib["tests"] == "5"
    failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert "rope" in failed
    assert "NOT PROVEN" in Page((tmp_path / "wrong" / "report.html").read_text()).text
