"""Runs of the command, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from pi_convert.commands.finetune import command

# The step's arithmetic is the same; gloo's sum of gradients rounds in another order.
PROCESSES_AGREE = 1e-5
# Bit for bit the same only with as many threads; on so small a model one is the fastest.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def words(model: Path, text: Path, out: Path, *more: str, steps: int = 3) -> list[str]:
    flags = {"--scale": 2, "--text": text, "--steps": steps, "--batch": 2, "--out": out}
    return [str(model), *(str(w) for flag in flags.items() for w in flag), *more]


def finetuned(model: Path, text: Path, out: Path, *more: str, steps: int = 3) -> str:
    result = CliRunner().invoke(command, words(model, text, out, *more, steps=steps))
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stderr


def process(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pi_convert", "finetune", *arguments]


def in_two_processes(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "pi_convert", "finetune", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def torchrun(port: int) -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / "run" / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()
