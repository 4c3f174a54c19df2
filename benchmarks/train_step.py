"""A training step of `pi-convert finetune` against a plain script on transformers' Trainer.

usage: python benchmarks/train_step.py [--runs N] [--part PART]... [--quick]
Parts that are not run keep their last results; --quick tries a small window and keeps nothing. The
default model at scale 2 in float32 on every core, one window a step, gradient checkpointing on
both; interleaved, medians. Steps are timed from outside, by the lines that say that they are done;
a process's first step is left out of its median. Peaks are of whole processes, writing the model
included. Both train the same window: the losses of the first step are held against each other.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.export_gguf import PI_CONVERT, PYTHON, Row
from benchmarks.measure import RESULTS, environment, run, write_results

PARTS = {"speed": (2048, 4), "memory": (8192, 2)}  # window in tokens, steps
QUICK = (256, 3)
LOSSES_AGREE = 1e-3  # relative; float32 sums in another order, printed with four digits
STEP = re.compile(r"^step (\d+)\b.*?: loss ([\d.]+)")


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
    said = []
    for line in process.stdout:
        if found := STEP.match(line):
            done.append(time.perf_counter() - started)
            losses.append(float(found[2]))
        said.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(done) != steps:
        sys.exit(f"{command} ended with {process.returncode}:\n{''.join(said)[-3000:]}")
    return Trained(tuple(done), losses[0], usage.ru_maxrss / 1024)


def ours(text: Path, window: int, steps: int, out: Path) -> list[str]:
    return [PI_CONVERT, "finetune", "--scale", "2", "--text", str(text), "--window", str(window),
            "--allow-short-window", "--steps", str(steps), "--batch", "1", "--eval-every", "0",
            "--save-every", str(10 * steps), "--out", str(out)]  # fmt: skip


def theirs(model: Path, text: Path, window: int, steps: int, out: Path) -> list[str]:
    script = str(Path(__file__).parent / "peer_trainer.py")
    return [PYTHON, script, str(model), str(text), str(window), str(steps), "1", str(out)]


def models(folder: Path) -> tuple[Path, Path]:
    """The default model interpolated: a folder for the peer, and a GGUF for its tokenizer."""
    run([[PI_CONVERT, "export", "--to", "safetensors", "--to", "gguf", "--scale", "2", "--out",
          str(folder)]])  # fmt: skip
    return next(path for path in folder.iterdir() if path.is_dir()), next(folder.glob("*.gguf"))


def one_window(folder: Path, gguf: Path, window: int) -> Path:
    script = str(Path(__file__).parent / "aligned_text.py")
    subprocess.run([PYTHON, script, str(gguf), str(folder), str(window), "1"], check=True)
    return folder / "0.txt"


def measure(folder: Path, window: int, steps: int, runs: int) -> Row:
    model, gguf = models(folder)
    text = one_window(folder, gguf, window)
    own, peer = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            own.append(watch(ours(text, window, steps, Path(out) / "ours"), steps))
            peer.append(watch(theirs(model, text, window, steps, Path(out) / "theirs"), steps))
        if not math.isclose(own[-1].first_loss, peer[-1].first_loss, rel_tol=LOSSES_AGREE):
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


def as_text(rows: list[Row], versions: dict[str, str]) -> str:
    lines = ["# A training step, against a plain Trainer script", "",
             "`python benchmarks/train_step.py`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    heads = ("a step", "tokens/s", "theirs", "ours / theirs", "peak", "theirs", "ours / theirs",
             "start to first step", "theirs")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines += [
        f"| {row['work']} | {row['ours_tokens_s']} | {row['peer_tokens_s']} | {row['speed_ratio']}"
        f" | {row['ours_peak_mib']} MiB | {row['peer_peak_mib']} MiB | {row['peak_ratio']}"
        f" | {row['ours_start_s']} s | {row['peer_start_s']} s |"
        for row in rows
    ]
    lines += [
        "",
        "Ours starts from the default model's GGUF, which it writes as a folder; theirs from that"
        " folder.",
    ]
    return "\n".join(lines) + "\n"


def last_results() -> dict[str, Row]:
    """Rows by part, as the last run left them."""
    file = RESULTS / "train_step.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--quick", action="store_true", help="A small window, once, not kept.")
    parser.add_argument("--folder", type=Path, help="Where models are made; removed afterwards.")
    arguments = parser.parse_args()
    versions = environment() | {"accelerate": version("accelerate")}
    if arguments.quick:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(as_text([measure(Path(folder), *QUICK, runs=1)], versions))
        return
    found = last_results()
    for part in arguments.part or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found[part] = measure(Path(folder), *PARTS[part], runs=arguments.runs)
        rows = [found[name] for name in PARTS if name in found]
        write_results("train_step", {"environment": versions, "parts": found},
                      as_text(rows, versions))  # fmt: skip


if __name__ == "__main__":
    main()
