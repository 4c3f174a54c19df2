"""How fast our ONNX files run on the CPU against those of onnxruntime-genai's builder.

usage: python benchmarks/run_onnx.py [--runs N] [--prefill N] [--past N]
One ONNX Runtime runs all. Prefill of one row, and decode of one token after a past; interleaved,
medians of pairwise ratios.
The carried-over Q4_1 file of the default model stands beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnxruntime

from benchmarks import peers
from benchmarks.export_gguf import PI_CONVERT
from benchmarks.export_onnx import ours, smollm2
from benchmarks.measure import environment, run, write_results

DECODED = 24  # tokens a round
DECODE_ROUNDS = 8  # for one prefill: a token takes milliseconds, and the machine's noise is as long
KV_HEADS, HEAD_DIM = 3, 64  # of the default model


class Session:
    """One file; the same settings for all."""

    def __init__(self, path: Path) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        self.past = [v for v in self.session.get_inputs() if v.name.startswith("past_")]
        self.names = {v.name for v in self.session.get_inputs()}

    def feeds(self, new: int, past: int) -> dict[str, Any]:
        random = np.random.default_rng(0)
        feeds: dict[str, Any] = {
            "input_ids": random.integers(0, 49152, (1, new)),
            "attention_mask": np.ones((1, past + new), np.int64),
            "position_ids": np.arange(past, past + new)[None],
        }
        for value in self.past:
            values = random.standard_normal((1, KV_HEADS, past, HEAD_DIM), np.float32)
            feeds[value.name] = values * np.float32(0.1)
        return {name: value for name, value in feeds.items() if name in self.names}

    def seconds(self, feeds: dict[str, Any], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            self.session.run(None, feeds)
        return (time.perf_counter() - started) / repeats


def find(folder: Path) -> Path:
    return next(path for path in folder.rglob("*.onnx"))


def compare(files: dict[str, Path], new: int, past: int, runs: int) -> dict[str, Any]:
    """Median seconds of each file, and the median of each one's ratio to ``theirs``."""
    sessions = {name: Session(path) for name, path in files.items()}
    feeds = {name: session.feeds(new, past) for name, session in sessions.items()}
    repeats = DECODED if new == 1 else 1
    for name, session in sessions.items():
        session.seconds(feeds[name], 1)
    walls: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(runs * (DECODE_ROUNDS if new == 1 else 1)):
        for name, session in sessions.items():
            walls[name].append(session.seconds(feeds[name], repeats))
    theirs = walls["theirs"]
    return {
        name: {
            "median_s": round(statistics.median(found), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(found, theirs, strict=True)), 3),
        }
        for name, found in walls.items()
    }


def as_text(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    lines = ["# Running ONNX files on the CPU, against onnxruntime-genai's builder's", "",
             "`python benchmarks/run_onnx.py`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    lines += ["", "Median seconds a prefill or a decoded token; in brackets the median ratio of"
              " rounds to theirs right before, which the machine's slow and fast minutes do not"
              " move.", "",
              "| precision | work | theirs | ours, same bits | ours, head of 8 bits (the default)"
              " | ours, Q4_1 carried over, head of 8 bits |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        found = row["files"]
        cells = [
            f"{found[name]['median_s']} ({found[name]['ratio']})" if name in found else "-"
            for name in ("theirs", "ours", "default", "carried")
        ]
        lines.append(f"| {row['precision']} | {row['work']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--past", type=int, default=2048)
    arguments = parser.parse_args()
    versions = environment() | {"onnxruntime": onnxruntime.__version__, **peers.GENAI.versions()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = smollm2(folder / "model")
        for precision in ("fp32", "int4"):
            # The builder gives an int4 file a head of 4 bits; ours has 8 unless told otherwise.
            same = ["--head", "int4"] if precision == "int4" else []
            run([[*ours(model, folder / precision, precision)[0], *same]])
            run(peers.genai(model, folder / f"genai-{precision}", precision))
            files = {"theirs": find(folder / f"genai-{precision}"),
                     "ours": find(folder / precision)}  # fmt: skip
            if precision == "int4":
                run([[PI_CONVERT, "export", "--to", "onnx", "--scale", "8", "--precision", "int4",
                      "--out", str(folder / "carried")]])  # fmt: skip
                files["carried"] = find(folder / "carried")
                run(ours(model, folder / "default", precision))
                files["default"] = find(folder / "default")
            for work, new, past in (
                (f"prefill {arguments.prefill}", arguments.prefill, 0),
                (f"decode after {arguments.past}", 1, arguments.past),
            ):
                found = compare(files, new, past, arguments.runs)
                rows.append({"precision": precision, "work": work, "files": found})
                document = {"environment": versions, "rows": rows}
                write_results("run_onnx", document, as_text(rows, versions))


if __name__ == "__main__":
    main()
