"""K-quant kernels against ggml_quantize_chunk, a core, the same values, interleaved.

usage: python benchmarks/quantize.py [--runs N] [--cpu N]
Writes benchmarks/results/quantize.{md,json,svg}. Bytes are compared on every run.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks.measure import RESULTS, environment, write_results
from converters.encodings import ENCODINGS
from converters.ggml import load_ggml
from converters.ggml.kernels import INSTRUCTION_SETS, KERNEL_TYPES, Kernels

ROWS, ROW = 1024, 4096
Row = dict[str, Any]


def weights() -> np.ndarray[Any, Any]:
    """Like trained weights: heavy tails, rows of different spread."""
    random = np.random.default_rng(0)
    spread = np.exp(random.normal(-4, 0.5, (ROWS, 1)))
    return (random.standard_t(5.0, (ROWS, ROW)) * spread).astype(np.float32)


def built() -> list[Kernels]:
    folder = Path(__file__).parent.parent / "converters" / "ggml"
    found = []
    for name in INSTRUCTION_SETS:
        library = ctypes.CDLL(str(folder / f"_kquants_{name}.so"))
        if library.pi_supported():
            found.append(Kernels(folder / f"_kquants_{name}.so", library, load_ggml()))
    return found


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(name: str, sets: list[Kernels], runs: int) -> Row:
    """Elements a second; each ratio is of neighbouring runs, and its median is given."""
    encoding, values, ggml = ENCODINGS[name], weights(), load_ggml()
    if name.startswith("iq4"):
        values = values[: ROWS // 4]
    right = ggml.quantize(encoding, values)
    own: dict[str, list[float]] = {kernels.instruction_set: [] for kernels in sets}
    peer, handed = [], {}
    for _ in range(runs):
        peer.append(seconds(lambda: ggml.quantize(encoding, values)))
        for kernels in sets:
            made = kernels.quantize(encoding, values)
            assert np.array_equal(made.raw, right), (name, kernels.instruction_set)
            handed[kernels.instruction_set] = made.handed
            own[kernels.instruction_set].append(
                seconds(lambda k=kernels: k.quantize(encoding, values))  # type: ignore[misc]
            )
    row: Row = {"type": name, "elements": values.size, "runs": runs,
                "ggml_m_s": round(values.size / statistics.median(peer) / 1e6, 1)}  # fmt: skip
    for key, walls in own.items():
        ratios = [p / w for p, w in zip(peer, walls, strict=True)]
        row[f"{key}_m_s"] = round(values.size / statistics.median(walls) / 1e6, 1)
        row[f"{key}_ratio"] = round(statistics.median(ratios), 1)
        row[f"{key}_handed_blocks"] = handed[key]
    return row


def as_text(rows: list[Row], versions: dict[str, str], sets: list[str]) -> str:
    lines = ["# K-quants: the kernels against ggml_quantize_chunk", "",
             "`python benchmarks/quantize.py`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    lines += [
        "",
        "Million elements a second on one pinned core, medians; the bytes are the same.",
        "",
    ]
    heads = ["type", "ggml", *(f"{s} | {s} / ggml" for s in sets), "blocks handed to ggml"]
    lines += [f"| {' | '.join(heads)} |", "| --- " * (3 + 2 * len(sets)) + "|"]
    for row in rows:
        ours = " | ".join(f"{row[f'{s}_m_s']} | {row[f'{s}_ratio']}" for s in sets)
        lines.append(
            f"| {row['type']} | {row['ggml_m_s']} | {ours} | {row[f'{sets[0]}_handed_blocks']} |"
        )
    lines += ["", "![elements a second by type](quantize.svg)"]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], sets: list[str]) -> str:
    """Bars by type; a group for each, ggml first."""
    series = ["ggml", *reversed(sets)]
    colours = {"ggml": "#8a8f98", "avx2": "#3987e5", "avx512": "#184f95"}
    bar, gap, height, left, top = 18, 26, 260, 60, 40
    group = bar * len(series) + gap
    width = left + group * len(rows) + 20
    most = max(row[f"{s}_m_s"] for row in rows for s in series)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + top + 50}"'
        ' font-family="sans-serif" font-size="12" fill="#666">',
        '<text x="10" y="20" font-size="14">million elements a second on one core</text>',
    ]
    for step in range(5):
        value, y = most * step / 4, top + height * (1 - step / 4)
        parts.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y:.0f}" y2="{y:.0f}" stroke="#8884"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.0f}</text>')
    for index, row in enumerate(rows):
        x = left + gap / 2 + index * group
        for place, name in enumerate(series):
            tall = height * row[f"{name}_m_s"] / most
            parts.append(
                f'<rect x="{x + place * bar:.0f}" y="{top + height - tall:.1f}" width="{bar - 3}"'
                f' height="{tall:.1f}" fill="{colours[name]}"/>'
            )
        middle = x + bar * len(series) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{top + height + 18}" text-anchor="middle">'
            f"{row['type']}</text>"
        )
    for place, name in enumerate(series):
        x = left + 90 * place
        parts.append(
            f'<rect x="{x}" y="{top + height + 30}" width="12" height="12" fill="{colours[name]}"/>'
        )
        parts.append(f'<text x="{x + 17}" y="{top + height + 40}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.cpu})
    sets = built()
    names = [kernels.instruction_set for kernels in sets]
    rows = [measure(name, sets, arguments.runs) for name in KERNEL_TYPES]
    versions = environment()
    write_results(
        "quantize", {"environment": versions, "rows": rows}, as_text(rows, versions, names)
    )
    (RESULTS / "quantize.svg").write_text(plot(rows, names))


if __name__ == "__main__":
    main()
