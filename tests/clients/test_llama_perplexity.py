"""llama-perplexity itself, built from the llama.cpp that llama-cpp-python vendors."""

from __future__ import annotations

import json
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


# llama-perplexity keeps the source's logits in 16 bits.
KL_AGREES = 5e-2
KLD = re.compile(r"Mean +KLD: +([\d.]+)")


def test_its_kl_divergence_on_the_same_tokens(
    default_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, logits, tool = tmp_path / "text.txt", tmp_path / "logits", build_llama_perplexity()
    text.write_text("\n".join(document.text for document in default_documents()[:20]))
    words = ["export", "--to", "gguf", "--scale", "2", "--quantize", "q4_0", "--quantize", "f16"]
    assert cli.run([*words, "--allow-requantize", "--out", str(tmp_path)]) == 0
    (source,), (artifact,) = tmp_path.glob("*F16.gguf"), tmp_path.glob("*Q4_0.gguf")
    base = ["-c", "512", "--chunks", "2", "--kl-divergence-base", logits]
    subprocess.run([tool, "-m", source, "-f", text, *base], check=True, capture_output=True)
    done = subprocess.run(
        [tool, "-m", artifact, *base, "--kl-divergence"], check=True, capture_output=True, text=True
    )
    theirs = KLD.search(done.stdout + done.stderr)
    assert theirs is not None, done.stderr[-2000:]
    capfd.readouterr()
    asked = ["--protocol", "llama.cpp", "--context", "512", "--max-windows", "2", "--text", text]
    assert cli.run([*map(str, ["compare", source, artifact, *asked]), "--json"]) == 0
    ours = json.loads(capfd.readouterr().out)
    assert ours["positions"] == 2 * 255
    assert ours["kl"]["value"] == pytest.approx(float(theirs[1]), rel=KL_AGREES)
    assert ours["kl"]["value"] > 1e-3
