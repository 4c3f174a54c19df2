"""A training step of `pi-convert finetune` against a plain script on transformers' Trainer.

usage: python benchmarks/train_step.py [--device cuda] [--runs N] [--part PART]... [--quick]
Parts that are not run keep their last results; --quick tries a small window and keeps nothing. The
default model at scale 2 in float32 on every core, or in bfloat16 over float32 weights on a GPU at
scale 8; one window a step, gradient checkpointing on both; interleaved, medians. Steps are timed
from outside, by the lines that say that they are done; a process's first step is left out of its
median, and so the start, the rest of it, is told where steps are short. Peaks are of whole
processes, writing the model included; on a GPU, of its memory. Both train the same window: the
losses of the first step are held against each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.export_gguf import PI_CONVERT, PYTHON, Row
from benchmarks.measure import RESULTS, environment, run, write_results

PARTS = {  # window in tokens, steps
    "cpu": {"speed": (2048, 4), "memory": (8192, 2)},
    "cuda": {"speed": (8192, 12), "memory": (65536, 4)},
}
SCALE = {"cpu": 2, "cuda": 8}
QUICK = (256, 3)
# Relative; float32 sums in another order, printed with four digits; the peer's logits are bfloat16
# on a GPU.
LOSSES_AGREE = {"cpu": 1e-3, "cuda": 1e-2}
STEP = re.compile(r"^step (\d+)\b.*?: loss ([\d.]+)")
PEAK = re.compile(r"^peak (\d+) bytes")


@dataclass(frozen=True)
class Trained:
    """One process. Seconds are from its start to the end of each step."""

    step_s: tuple[float, ...]
    first_loss: float
    peak_mib: float

    @property
    def seconds_a_step(self) -> float:
        return statistics.median(b - a for a, b in itertools.pairwise(self.step_s))

    @property
    def start_s(self) -> float:
        """To the start of the first step, which is taken to be as long as the others."""
        return self.step_s[0] - self.seconds_a_step


def watch(command: list[str], steps: int) -> Trained:
    """Runs ``command``, which prints a line for every step it has done."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    done: list[float] = []
    losses: list[float] = []
    said, peak = [], None
    for line in process.stdout:
        if told := PEAK.match(line):
            peak = int(told[1])
        if found := STEP.match(line):
            done.append(time.perf_counter() - started)
            losses.append(float(found[2]))
        said.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(done) != steps:
        sys.exit(f"{command} ended with {process.returncode}:\n{''.join(said)[-3000:]}")
    kib = usage.ru_maxrss if peak is None else peak / 1024
    return Trained(tuple(done), losses[0], kib / 1024)


@dataclass(frozen=True)
class Work:
    """So many steps over one window."""

    device: str
    window: int
    steps: int
    text: Path

    def ours(self, out: Path) -> Trained:
        found = watch(
            [PI_CONVERT, "finetune", "--scale", str(SCALE[self.device]), "--text", str(self.text),
             "--window", str(self.window), "--allow-short-window", "--steps", str(self.steps),
             "--batch", "1", "--eval-every", "0", "--save-every", str(10 * self.steps), "--device",
             self.device, "--out", str(out)], self.steps)  # fmt: skip
        if self.device == "cpu":
            return found
        last = (out / "run" / "trainer_log.jsonl").read_text().splitlines()[-1]
        return replace(found, peak_mib=json.loads(last)["peak_bytes"] / 2**20)

    def theirs(self, model: Path, out: Path) -> Trained:
        script = str(Path(__file__).parent / "peer_trainer.py")
        words = [model, self.text, self.window, self.steps, 1, out, self.device]
        return watch([PYTHON, script, *map(str, words)], self.steps)


def models(folder: Path, scale: int) -> tuple[Path, Path]:
    """The default model interpolated: a folder for the peer, and a GGUF for its tokenizer."""
    run([[PI_CONVERT, "export", "--to", "safetensors", "--to", "gguf", "--scale", str(scale),
          "--out", str(folder)]])  # fmt: skip
    return next(path for path in folder.iterdir() if path.is_dir()), next(folder.glob("*.gguf"))


def one_window(folder: Path, gguf: Path, window: int) -> Path:
    script = str(Path(__file__).parent / "aligned_text.py")
    subprocess.run([PYTHON, script, str(gguf), str(folder), str(window), "1"], check=True)
    return folder / "0.txt"


def measure(folder: Path, device: str, size: tuple[int, int], runs: int) -> Row:
    window, steps = size
    model, gguf = models(folder, SCALE[device])
    work = Work(device, window, steps, one_window(folder, gguf, window))
    own, peer = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            own.append(work.ours(Path(out) / "ours"))
            peer.append(work.theirs(model, Path(out) / "theirs"))
        agree = LOSSES_AGREE[device]
        if not math.isclose(own[-1].first_loss, peer[-1].first_loss, rel_tol=agree):
            sys.exit(f"losses {own[-1].first_loss} and {peer[-1].first_loss}: not the same work")
    rates = [window / middle(found, lambda t: t.seconds_a_step) for found in (own, peer)]
    peaks = [middle(found, lambda t: t.peak_mib) for found in (own, peer)]
    starts = [middle(found, lambda t: t.start_s) for found in (own, peer)]
    return {
        "work": f"one window of {window:,} tokens", "runs": runs, "steps": steps,
        "loss": own[0].first_loss, "peer_loss": peer[0].first_loss,
        "ours_tokens_s": round(rates[0], 1), "peer_tokens_s": round(rates[1], 1),
        "speed_ratio": round(rates[0] / rates[1], 3),
        "ours_peak_mib": round(peaks[0]), "peer_peak_mib": round(peaks[1]),
        "peak_ratio": round(peaks[0] / peaks[1], 3),
        "ours_start_s": round(starts[0], 1), "peer_start_s": round(starts[1], 1),
        "ours_steps_done_s": [[round(s, 2) for s in one.step_s] for one in own],
        "peer_steps_done_s": [[round(s, 2) for s in one.step_s] for one in peer],
    }  # fmt: skip


def middle(found: list[Trained], value: Callable[[Trained], float]) -> float:
    return statistics.median(value(one) for one in found)


def as_text(rows: list[Row], versions: dict[str, str], device: str) -> str:
    flag = "" if device == "cpu" else f" --device {device}"
    lines = ["# A training step, against a plain Trainer script", "",
             f"`python benchmarks/train_step.py{flag}`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    lines += ["", "SmolLM2-135M-Instruct, interpolated. Medians of the rounds; the first step of"
              " each, which starts up, is left out."]  # fmt: skip
    heads = ("a step", "rounds x steps", "tokens/s", "theirs", "ours / theirs", "peak", "theirs",
             "ours / theirs", "start to first step", "theirs")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines += [
        f"| {row['work']} | {row['runs']} x {row['steps']} | {row['ours_tokens_s']}"
        f" | {row['peer_tokens_s']} | {row['speed_ratio']}"
        f" | {row['ours_peak_mib']} MiB | {row['peer_peak_mib']} MiB | {row['peak_ratio']}"
        f" | {_start(row, 'ours_start_s')} | {_start(row, 'peer_start_s')} |"
        for row in rows
    ]
    lines += [
        "",
        "Ours starts from the default model's GGUF, which it writes as a folder; theirs from that"
        " folder.",
    ]
    return "\n".join(lines) + "\n"


def _start(row: Row, key: str) -> str:
    """The first step less another one: with two long steps it is their noise."""
    return f"{row[key]} s" if row["steps"] > 2 else "-"


def last_results(name: str) -> dict[str, Row]:
    """Rows by part, as the last run left them."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=PARTS, default="cpu")
    parser.add_argument("--part", choices=PARTS["cpu"], action="append")
    parser.add_argument("--quick", action="store_true", help="A small window, once, not kept.")
    parser.add_argument("--folder", type=Path, help="Where models are made; removed afterwards.")
    arguments = parser.parse_args()
    device, parts = arguments.device, PARTS[arguments.device]
    name = "train_step" if device == "cpu" else f"train_step_{device}"
    versions = environment() | {"accelerate": version("accelerate")}
    if device == "cuda":
        versions["gpu"] = torch.cuda.get_device_name()
    if arguments.quick:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(as_text([measure(Path(folder), device, QUICK, runs=1)], versions, device))
        return
    found = last_results(name)
    for part in arguments.part or parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found[part] = measure(Path(folder), device, parts[part], runs=arguments.runs)
        rows = [found[kept] for kept in parts if kept in found]
        write_results(name, {"environment": versions, "parts": found},
                      as_text(rows, versions, device))  # fmt: skip


if __name__ == "__main__":
    main()
