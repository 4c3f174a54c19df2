"""What reports of measurements say: real values in Markdown, and no direction without evidence."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from pi_convert.evaluate.compare import Paired, Span
from pi_convert.evaluate.models import Model, Sizes
from pi_convert.evaluate.passkey import Answer, AtDepth, Passkey
from pi_convert.evaluate.perplexity import AtContext, Growth, Measured, plan_windows
from pi_convert.evaluate.statistics import Mean
from pi_convert.evaluate.texts import read_documents
from pi_convert.evaluate.windows import TokenStream
from pi_convert.report.compare import CompareReport
from pi_convert.report.compare_page import compare_page
from pi_convert.report.html import html_page
from pi_convert.report.markdown import markdown
from pi_convert.report.passkey import PasskeyReport, passkey_text
from pi_convert.report.passkey_page import passkey_page
from pi_convert.report.perplexity import PerplexityReport, growth_text, plan_text
from pi_convert.report.perplexity_page import perplexity_page
from pi_convert.report.provenance import texts_record

MODEL = Model(
    label="m.gguf", runtime="llama.cpp", original_context=128, context=1024, held_context=None,
    encode=lambda _: [], bos=(), sizes=Sizes(1, 1, 1, 1), load=lambda _: pytest.fail("not loaded"),
)  # fmt: skip


def runs_of(*lengths: int) -> list[TokenStream]:
    return [
        TokenStream(np.arange(length, dtype=np.int32), np.full(length, number, np.int32))
        for number, length in enumerate(lengths)
    ]


def mean(value: float, error: float | None) -> Mean:
    return Mean(value, error, 100, 1 if error is None else 5)


def table_under(text: str, start: str) -> list[list[str]]:
    """The rows of the first Markdown table behind ``start``, its header first."""
    lines = text[text.index(start) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.fixture
def passkeys() -> PasskeyReport:
    answers = (
        Answer(0, 0, 100, True, -0.26),
        Answer(0, 1, 100, False, -1.5),
        Answer(1, 0, 1200, False, -12.25),
    )
    depths = (AtDepth(100, 1, 2, -0.88), AtDepth(1200, 0, 1, -12.25))
    found = Passkey(answers, depths, 1300, 2.0)
    return PasskeyReport(1300, (2, 2), [(MODEL, found)], {})


def test_a_passkey_page_in_markdown_has_log_probabilities(passkeys: PasskeyReport) -> None:
    text = markdown(passkey_page(passkeys))
    section = "## Log-probability of the right digits"
    assert table_under(text, section) == [
        ["trial / distance (tokens)", "100", "1,200"],
        ["1", "-0.26\\*", "-12.25"],
        ["2", "-1.50", "-"],
    ]
    assert "its log p in nats; \\* where greedy decoding finds it" in text
    page = html_page(passkey_page(passkeys))
    assert "its log p in nats; a dot where greedy decoding finds it" in page
    # The colours: 0 is a chance of one in 10^5, 11.51 nats.
    assert re.findall(r'class="heat" fill-opacity="([\d.]+)" x="34', page)[0] == "0.977"


def test_a_passkey_page_has_the_terminals_table(passkeys: PasskeyReport) -> None:
    page = passkey_page(passkeys)
    header, *rows = table_under(markdown(page), "## Share of trials")
    assert header == ["distance", "found", "95 %", "log p of the digits"]
    # Wilson: 1 of 2 is 0.09 to 0.91, 0 of 1 is 0 to 0.79.
    assert rows == [
        ["100", "1/2", "0.09 to 0.91", "-0.88"],
        ["1,200", "0/1", "0.00 to 0.79", "-12.25"],
    ]
    terminal = [
        re.split(r" {2,}", line.strip()) for line in passkey_text(*passkeys.models[0]).splitlines()
    ]
    assert all(row in terminal for row in (header, *rows))
    assert "<td class=n>1,200</td><td class=n>0/1</td><td>0.00 to 0.79</td>" in html_page(page)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [  # 5 documents: 2.776 errors each way; exp(-0.05 - 0.02776) - 1 is -7.5 %
        (-0.05, 0.01, "perplexity falls (-4.9%, 95 %: -7.5% to -2.2%)"),
        (0.05, 0.01, "perplexity rises (+5.1%, 95 %: +2.2% to +8.1%)"),
        (-0.008, 0.01, "no change that these documents can tell (-0.8%, 95 %: -3.5% to +2.0%)"),
        (0.0001, 0.01, "no change that these documents can tell (+0.0%, 95 %: -2.7% to +2.8%)"),
        (0.0001, 0.0001, "perplexity stays (+0.0%, 95 %: -0.0% to +0.0%)"),
        (-0.008, None, "perplexity changes by -0.8%, and one document cannot tell whether that is"
         " more than chance"),
        (0.0001, None, "perplexity changes by +0.0%, and one document cannot tell whether that is"
         " more than chance"),
    ],
)  # fmt: skip
def test_growth_has_a_direction_only_where_an_interval_gives_one(
    change: float, error: float | None, says: str
) -> None:
    growth = Growth(32, 64, mean(change, error))
    assert growth_text(growth) == f"from 32 to 64 tokens {says}"


def test_a_headline_of_one_document_claims_nothing() -> None:
    plan = plan_windows(runs_of(100), [32, 64], stride=8, most=0)
    at = tuple(AtContext(c, mean(v, None)) for c, v in ((32, 2.0), (64, 1.9)))
    measured = Measured(at, (Growth(32, 64, mean(-0.1, None)),), {}, np.zeros(1, np.int32), 1.0)
    text = markdown(perplexity_page(PerplexityReport(plan, [(MODEL, measured)], {})))
    assert "perplexity changes by -9.5%, and one document cannot tell" in text.splitlines()[2]
    assert "falls" not in text


def test_sampled_strides_say_of_how_many_documents_they_are() -> None:
    runs = runs_of(1000, 1000, 1000, 30)
    few = plan_text(plan_windows(runs, [64], stride=8, most=2))
    assert "2 of 354 strides of 8, which fall into 2 of 3 documents; 1 shorter than 64" in few
    one = plan_text(plan_windows(runs, [64], stride=8, most=1))
    assert "1 of 354 strides of 8, which falls into 1 of 3 documents; 1 shorter" in one
    every = plan_text(plan_windows(runs, [64], stride=8, most=0))
    assert "354 of 354 strides of 8, from 3 documents; 1 shorter" in every
    joined = plan_text(plan_windows(runs, [64], stride=8, most=2, joined=True))
    assert joined.endswith("which fall into 2 of 4 documents joined")


def test_a_comparison_in_markdown_is_by_span() -> None:
    small = mean(0.01, 0.001)
    spans = (Span(0, 64, small, 0.9), Span(64, 127, mean(0.02, 0.001), 0.8))
    paired = Paired(small, 0.01, 0.1, 0.2, 0.9, small, small, small, spans, 127, 1.0)
    text = markdown(compare_page(CompareReport(MODEL, MODEL, paired, {})))
    header, *rows = table_under(text, "## By position")
    assert header[0] == "position"
    assert [row[0] for row in rows] == ["0 to 63", "64 to 126"]
    assert "| 32 |" not in text  # the middle of the first span
    assert "95.5" not in text


def test_texts_are_named_by_what_sha256sum_says(tmp_path: Path) -> None:
    contents = {"a.txt": b"\xef\xbb\xbfone\r\ntwo\r\n", "b.txt": "größer".encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert texts_record(read_documents([tmp_path])) == {
        f"text {i}": f"{name}, SHA-256 {hashlib.sha256(content).hexdigest()}"
        for i, (name, content) in enumerate(contents.items(), start=1)
    }
    assert texts_record(()) == {"text": "Python documentation"}
