"""Export to ONNX against other exporters, each in its own environment.

usage: python benchmarks/export_onnx.py [--runs N] [--part PART]...
Parts that are not run keep their last results. Same run, interleaved; wall time and the largest
process's peak memory, medians. Slow peers run once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peers
from benchmarks.export_gguf import PI_CONVERT, seeded
from benchmarks.measure import RESULTS, environment, median, run, write_results
from benchmarks.models import GROWTH, TINYLLAMA

PARTS = ("genai-fp32", "genai-int4", "torch", "optimum", "mobius", "1.1b", "growth")
Row = dict[str, object]
Commands = list[list[str]]


def ours(model: Path, out: Path, precision: str) -> Commands:
    return [[PI_CONVERT, "export", str(model), "--to", "onnx", "--scale", "8",
             "--precision", precision, "--out", str(out), "--force"]]  # fmt: skip


def smollm2(folder: Path) -> Path:
    """The default model as a bf16 folder."""
    run([[PI_CONVERT, "export", "--to", "safetensors", "--scale", "1", "--dtype", "bf16",
          "--out", str(folder)]])  # fmt: skip
    return next(path for path in folder.iterdir() if path.is_dir())


def compare(
    name: str, precision: str, theirs: Callable[[Path, Path], Commands], runs: int, folder: Path
) -> list[Row]:
    model = smollm2(folder)
    own, peer = [], []
    for _ in range(runs):
        own.append(run(ours(model, folder / "ours", precision)))
        peer.append(run(theirs(model, folder / "theirs")))
        shutil.rmtree(folder / "theirs")
    a, b = median(own), median(peer)
    return [{
        "work": f"SmolLM2-135M, bf16 folder, {precision}", "peer": name, "runs": runs,
        "ours_wall_s": round(a.wall_s, 2), "peer_wall_s": round(b.wall_s, 2),
        "wall_ratio": round(a.wall_s / b.wall_s, 3),
        "ours_peak_mib": round(a.peak_mib), "peer_peak_mib": round(b.peak_mib),
        "peak_ratio": round(a.peak_mib / b.peak_mib, 3),
    }]  # fmt: skip


def alone(folder: Path, shapes: tuple[str, ...]) -> list[Row]:
    rows: list[Row] = []
    for shape in GROWTH:
        if shape.name not in shapes:
            continue
        model = seeded(folder, shape)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2
        measured = run(ours(model, folder / "ours", "int4"))
        rows.append({"work": f"{shape.name} seeded, bf16, sharded, int4",
                     "parameters_m": round(size / 1e6), "ours_wall_s": round(measured.wall_s, 2),
                     "ours_peak_mib": round(measured.peak_mib)})  # fmt: skip
        shutil.rmtree(model)
        shutil.rmtree(folder / "ours")
    return rows


def measure(part: str, folder: Path, runs: int) -> list[Row]:
    genai = {p: (lambda model, out, p=p: peers.genai(model, out, p)) for p in ("fp32", "int4")}
    match part:
        case "genai-fp32" | "genai-int4":
            precision = part.removeprefix("genai-")
            return compare("onnxruntime-genai builder", precision, genai[precision], runs, folder)
        case "torch":
            name = "torch.onnx.export(dynamo=True)"
            return compare(name, "fp32", peers.torch_dynamo, 1, folder)
        case "optimum":
            return compare("optimum-onnx", "fp32", peers.optimum, 1, folder)
        case "mobius":
            return compare("mobius-onnx", "fp32", peers.mobius, runs, folder)
        case "1.1b":
            return alone(folder, (TINYLLAMA.name,))
    return alone(folder, tuple(shape.name for shape in GROWTH))


def as_text(rows: list[Row], versions: dict[str, str]) -> str:
    lines = ["# Export to ONNX, against other exporters", "",
             "`python benchmarks/export_onnx.py`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    heads = [
        "work",
        "peer",
        "ours",
        "theirs",
        "ours / theirs",
        "our peak",
        "their peak",
        "peak ratio",
    ]
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines += [
        f"| {r['work']} | {r['peer']} | {r['ours_wall_s']} s | {r['peer_wall_s']} s"
        f" | {r['wall_ratio']} | {r['ours_peak_mib']} MiB | {r['peer_peak_mib']} MiB"
        f" | {r['peak_ratio']} |"
        for r in rows
        if "peer" in r
    ]
    lines += ["", "| work | parameters | wall | peak |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {r['work']} | {r['parameters_m']} M | {r['ours_wall_s']} s | {r['ours_peak_mib']} MiB |"
        for r in {r["work"]: r for r in rows if "parameters_m" in r}.values()
    ]
    return "\n".join(lines) + "\n"


def last_results() -> dict[str, list[Row]]:
    """Rows by part, as the last run left them."""
    file = RESULTS / "export_onnx.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    arguments = parser.parse_args()
    measured = last_results()
    versions = environment() | {
        f"{peer.name}'s environment": ", ".join(f"{k} {v}" for k, v in peer.versions().items())
        for peer in (peers.GENAI, peers.OPTIMUM, peers.MOBIUS)
    }
    for part in arguments.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            measured[part] = measure(part, Path(folder), arguments.runs)
        rows = [row for name in PARTS for row in measured.get(name, [])]
        document = {"environment": versions, "parts": measured}
        write_results("export_onnx", document, as_text(rows, versions))


if __name__ == "__main__":
    main()
