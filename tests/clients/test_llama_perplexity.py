"""llama-perplexity itself, built from the llama.cpp that llama-cpp-python vendors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pi_convert import cli
from pi_convert.evaluate.texts import default_documents
from tests.sdist import build_llama_perplexity

pytestmark = pytest.mark.client

ESTIMATE = re.compile(r"PPL = ([\d.]+) \+/- ([\d.]+)")


@pytest.mark.parametrize("context", [512, 1024])
def test_its_number_on_the_same_tokens(
    context: int, default_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(document.text for document in default_documents()[:20]))
    tool = build_llama_perplexity()
    done = subprocess.run(
        [tool, "-m", default_gguf, "-f", text, "-c", str(context), "--chunks", "2"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    theirs = ESTIMATE.search(done.stdout + done.stderr)
    assert theirs is not None, done.stderr[-2000:]
    words = ["--protocol", "llama.cpp", "--contexts", str(context), "--max-windows", "2"]
    assert cli.run(["perplexity", str(default_gguf), "--text", str(text), *words]) == 0
    ours = ESTIMATE.search(capfd.readouterr().out)
    assert ours is not None
    assert [float(n) for n in ours.groups()] == pytest.approx(
        [float(n) for n in theirs.groups()], abs=2e-4
    )
