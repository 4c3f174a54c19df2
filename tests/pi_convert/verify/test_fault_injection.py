"""Every fault of tests.pi_convert.verify.faults is rejected and named; right exports pass."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pi_convert.evaluate.texts import Document
from pi_convert.runtimes.llamacpp import LlamaCppOptions
from pi_convert.verify import Outcome, Status, Verdict, VerifyRequest, verify
from tests.pi_convert.verify.conftest import Exporter
from tests.pi_convert.verify.faults import FAULTS, Fault
from tests.pi_convert.verify.gguf_tools import edit

SCALES = (2.2, 3.0, 4.5, 8.0)
DOCUMENT = Path(__file__).parents[3] / "docs" / "verification.md"
TABLE = re.compile(r"(?<=<!-- faults -->\n).*?(?=<!-- end of faults -->)", re.DOTALL)


@dataclass(frozen=True)
class Rejection:
    """What was put in, and the verdict on it."""

    injected: str
    verdict: Verdict


REJECTIONS: dict[tuple[str, str, str], Rejection] = {}


def reject(
    fault: Fault, export: Exporter, ftype: str, architecture: str, folder: Path
) -> Rejection:
    """The fault with parameters drawn from its name, on a right export; once a process."""
    key = fault.name, ftype, architecture
    if key not in REJECTIONS:
        draw = random.Random(" ".join(key))
        tied, scale = fault.head == "tied", draw.choice(SCALES)
        right = export(ftype, architecture=architecture, scale=scale, tied=tied)
        done: list[str] = []
        broken = edit(
            right.path,
            folder / right.path.name,
            lambda file: done.append(fault.inject(file, draw)),
        )
        request = VerifyRequest(broken, right.source, scale, texts=TEXT, llamacpp=ONE_THREAD)
        REJECTIONS[key] = Rejection(done[0], verify(request))
    return REJECTIONS[key]


ONE_THREAD = LlamaCppOptions(threads=1)  # two libraries' threads wait for each other, spinning
TEXT = tuple(
    Document(f"text {i}", f"{i}. RoPE turns pairs by position; 12 and 345.\n\n    x = 7\n" * 6)
    for i in range(12)
)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    ("ftype", "architecture"),
    [
        ("f16", "llama"),
        ("q4_k_m", "llama"),
        pytest.param("f16", "qwen2", marks=pytest.mark.slow),
        pytest.param("q4_k_m", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_rejected_and_its_cause_named(
    fault: Fault, ftype: str, architecture: str, export: Exporter, tmp_path: Path
) -> None:
    if architecture not in fault.architectures or ftype not in fault.ftypes:
        pytest.skip("this architecture or type cannot have it")
    verdict = reject(fault, export, ftype, architecture, tmp_path).verdict
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert verdict.outcome.exit_code == 3
    failed = {link.name.value: link for link in verdict.links if link.status is Status.FAILED}
    assert fault.link in failed, verdict.to_json()
    named = failed[fault.link].cause or ""
    assert re.search(fault.cause, named), named


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    ("ftype", "architecture", "scale"),
    [
        ("f16", "llama", 1.1),
        ("f16", "qwen2", 2.2),
        ("f32", "llama", 3.0),
        ("bf16", "llama", 2.2),
        ("q4_k_m", "llama", 1.1),
        ("q8_0", "qwen2", 3.0),
        ("q4_k_m", "llama", 1.0),
    ],
)
def test_a_right_export_is_proven(
    ftype: str, architecture: str, scale: float, export: Exporter
) -> None:
    right = export(ftype, architecture=architecture, scale=scale)
    verdict = verify(
        VerifyRequest(right.path, right.source, scale, texts=TEXT, llamacpp=ONE_THREAD)
    )
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    assert verdict.outcome.exit_code == 0
    assert all(control.seen for link in verdict.links for control in link.controls)


@pytest.mark.usefixtures("few_tokens")
def test_the_table_in_the_docs_is_what_was_found(export: Exporter, tmp_path: Path) -> None:
    """``PI_CONVERT_WRITE_DOCS=1`` writes it."""
    lines = ["| fault | type | put in | link | cause named |", "| --- | --- | --- | --- | --- |"]
    for fault in FAULTS:
        for ftype in fault.ftypes:
            found = reject(fault, export, ftype, "llama", tmp_path)
            link = next(x for x in found.verdict.links if x.name.value == fault.link)
            cells = (fault.name, ftype, found.injected, fault.link, link.cause or "")
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    text = DOCUMENT.read_text("utf-8")
    if os.environ.get("PI_CONVERT_WRITE_DOCS"):
        DOCUMENT.write_text(TABLE.sub(lambda _: table, text), "utf-8")
    else:
        written = TABLE.search(text)
        assert written is not None
        assert written.group() == table
