"""Files of others: what onnxruntime-genai's model builder makes of a folder, judged as it is.

The builder (0.18) drops LLaMA's linear factor without a word and keeps Qwen2's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pi_convert import cli
from tests.clients.environments import clean_environment, python_environment
from tests.tiny import Shape, write_tiny

pytestmark = pytest.mark.client

FACTOR = 8.0
BUILD_SECONDS = 300
SHAPE = Shape(hidden=256, intermediate=768, layers=3, heads=8, kv_heads=2, head_dim=32)
SCALED = {"rope_scaling": {"rope_type": "linear", "factor": FACTOR}}


@cache
def _builder() -> Path:
    return python_environment("genai-builder")


def build(folder: Path, architecture: str, rope: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint, and the fp32 folder that the builder makes of it."""
    source = write_tiny(
        folder / "tiny", architecture=architecture, shape=SHAPE, rope=rope, tied=True
    )
    out = folder / "built"
    command = [_builder(), "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out]
    done = subprocess.run(
        [*command, "-p", "fp32", "-e", "cpu", "-c", folder / "cache"],
        env=clean_environment({"HF_HUB_OFFLINE": "1"}),
        capture_output=True, text=True, timeout=BUILD_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return source, out


def judged(
    source: Path, built: Path, capfd: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """``pi-convert verify``: exit code, outcome, and its links by name."""
    capfd.readouterr()
    code = cli.run(["verify", str(built), "--against", str(source), "--json", *words])
    verdict = json.loads(capfd.readouterr().out)
    return code, verdict["outcome"], {link["name"]: link for link in verdict["links"]}


def failed(links: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, link in links.items() if link["status"] == "failed"}


def test_a_dropped_factor_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, outcome, links = judged(*build(tmp_path, "llama", SCALED), capfd)
    assert (code, outcome) == (3, "not proven")
    assert failed(links) == {"rope", "execution"}
    assert links["rope"]["cause"] == "the tables are of factor 1 (dropped), expected 8"
    assert "with factor 8, theta 10000 imposed ONNX Runtime agrees" in links["execution"]["cause"]


def test_a_file_without_scaling_is_proven(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, outcome, links = judged(*build(tmp_path, "llama", {}), capfd, "--scale", "1")
    assert (code, outcome) == (0, "proven"), links


def test_a_factor_that_was_kept_is_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is another one: transformers gives a Qwen2 folder Qwen2's own splitting."""
    source, built = build(tmp_path, "qwen2", SCALED)
    code, outcome, links = judged(source, built, capfd)
    assert (code, outcome) == (3, "not proven")
    assert failed(links) == {"tokenizer"}
    shutil.copy(source / "tokenizer.json", built)
    code, outcome, links = judged(source, built, capfd)
    assert (code, outcome) == (0, "proven"), links
