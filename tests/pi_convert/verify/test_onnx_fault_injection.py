"""Every fault of tests.pi_convert.verify.onnx_faults is rejected and named."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from converters.files import sha256_file
from pi_convert.verify import Outcome, Status, Verdict
from tests.pi_convert.verify.conftest import BLOCKS, TINY, Export
from tests.pi_convert.verify.onnx_faults import FAULTS, OnnxFault
from tests.pi_convert.verify.onnx_tools import edit_onnx
from tests.pi_convert.verify.test_onnx_chain import export_onnx, run

SCALES = (2.2, 3.0, 4.5, 8.0)
DOCUMENT = Path(__file__).parents[3] / "docs" / "verification.md"
TABLE = re.compile(r"(?<=<!-- onnx faults -->\n).*?(?=<!-- end of onnx faults -->)", re.DOTALL)


@dataclass(frozen=True)
class Rejection:
    """What was put in, and the verdict on it."""

    injected: str
    verdict: Verdict


RIGHT: dict[tuple[str, float, bool, bool], Export] = {}
REJECTIONS: dict[tuple[str, str], Rejection] = {}


def right_export(
    precision: str,
    scale: float,
    factory: pytest.TempPathFactory,
    *,
    tied: bool,
    whole_heads: bool = False,
) -> Export:
    key = precision, scale, tied, whole_heads
    if key not in RIGHT:
        shape = BLOCKS if precision == "int4" else TINY
        if whole_heads:
            shape = dataclasses.replace(shape, kv_heads=shape.heads)
        folder = factory.mktemp("onnx")
        RIGHT[key] = export_onnx(folder, precision, scale=scale, shape=shape, tied=tied)
    return RIGHT[key]


def reject(fault: OnnxFault, precision: str, factory: pytest.TempPathFactory) -> Rejection:
    """The fault with parameters drawn from its name, on a right export; once a process."""
    key = fault.name, precision
    if key not in REJECTIONS:
        draw = random.Random(" ".join(key))
        tied = precision == "int4" if fault.head is None else fault.head == "tied"
        right = right_export(
            precision, draw.choice(SCALES), factory, tied=tied, whole_heads=fault.whole_heads
        )
        done: list[str] = []
        broken = edit_onnx(
            right.path,
            factory.mktemp("broken") / "tiny-ONNX",
            lambda file: done.append(fault.inject(file, draw)),
        )
        REJECTIONS[key] = Rejection(done[0], run(right, broken))
    return REJECTIONS[key]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    "precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16", "int4"]
)
def test_a_fault_is_rejected_and_its_cause_named(
    fault: OnnxFault, precision: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if precision not in fault.precisions:
        pytest.skip("this precision cannot have it")
    verdict = reject(fault, precision, tmp_path_factory).verdict
    assert verdict.outcome is Outcome.NOT_PROVEN, verdict.to_json()
    assert verdict.outcome.exit_code == 3
    failed = {link.name.value: link for link in verdict.links if link.status is Status.FAILED}
    assert fault.link in failed, verdict.to_json()
    named = failed[fault.link].cause or ""
    assert re.search(fault.cause, named), named


@pytest.mark.usefixtures("few_tokens")
def test_an_edit_that_changes_nothing_is_proven(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The negative control of the faults: it is they that are rejected, not the editing."""
    for precision in ("fp32", "fp16", "int4"):
        right = right_export(precision, 3.0, tmp_path_factory, tied=precision == "int4")
        folder = tmp_path_factory.mktemp("same") / "tiny-ONNX"
        same = edit_onnx(right.path, folder, lambda file: None)
        assert sha256_file(same) != sha256_file(right.path)
        verdict = run(right, same)
        assert verdict.outcome is Outcome.PROVEN, verdict.to_json()


@pytest.mark.usefixtures("few_tokens")
def test_the_table_in_the_docs_is_what_was_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """``PI_CONVERT_WRITE_DOCS=1`` writes it."""
    head = "| fault | precision | put in | link | cause named |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for fault in FAULTS:
        for precision in fault.precisions:
            found = reject(fault, precision, tmp_path_factory)
            link = next(x for x in found.verdict.links if x.name.value == fault.link)
            cells = (fault.name, precision, found.injected, fault.link, link.cause or "")
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    text = DOCUMENT.read_text("utf-8")
    if os.environ.get("PI_CONVERT_WRITE_DOCS"):
        DOCUMENT.write_text(TABLE.sub(lambda _: table, text), "utf-8")
    else:
        written = TABLE.search(text)
        assert written is not None
        assert written.group() == table
