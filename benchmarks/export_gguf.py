"""Export to GGUF against llama.cpp's converter followed by llama_model_quantize.

usage: python benchmarks/export_gguf.py [--runs N] [--part PART]...
Parts that are not run keep their last results.
Same libggml, same run, interleaved; wall time and the largest process's peak memory, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import RESULTS, environment, median, run, write_results
from benchmarks.models import GROWTH, LLAMA7B, TINYLLAMA, ModelShape
from tests.sdist import unpack_llama_cpp

PYTHON = sys.executable
PI_CONVERT = str(Path(PYTHON).parent / "pi-convert")
PARTS = ("smollm2", "tinyllama", "three-types", "7b", "growth", "help")


Row = dict[str, object]


def ours(model: Path, out: Path, types: list[str]) -> list[list[str]]:
    quantize = [word for name in types for word in ("--quantize", name)]
    return [[PI_CONVERT, "export", str(model), "--to", "gguf", "--scale", "8", *quantize,
             "--out", str(out), "--force"]]  # fmt: skip


def theirs(model: Path, out: Path, ftype: str, threads: int) -> list[list[str]]:
    """convert_hf_to_gguf.py, then llama_model_quantize where the type is not the converter's."""
    converter = str(unpack_llama_cpp() / "convert_hf_to_gguf.py")
    if ftype in ("f16", "q8_0"):
        return [
            [PYTHON, converter, str(model), "--outtype", ftype, "--outfile", str(out / "x.gguf")]
        ]
    middle = str(out / "middle.gguf")
    quantizer = str(Path(__file__).parent / "llamacpp_quantize.py")
    return [
        [PYTHON, converter, str(model), "--outtype", "f16", "--outfile", middle],
        [PYTHON, quantizer, middle, str(out / "x.gguf"), ftype, str(threads)],
    ]


def seeded(folder: Path, shape: ModelShape) -> Path:
    """Made by another process: a child's peak memory starts at its parent's."""
    script = str(Path(__file__).parent / "models.py")
    subprocess.run([PYTHON, script, shape.name, str(folder / shape.name)], check=True)
    return folder / shape.name


def best_threads(model: Path, out: Path) -> int:
    """Their quantizer's best thread count, of every core and twice as many, tried once each."""
    commands = theirs(model, out, "q4_k_m", 1)
    run(commands[:1])
    walls = {}
    cores = len(os.sched_getaffinity(0))
    for threads in (cores, 2 * cores):
        walls[threads] = run([[*commands[1][:-1], str(threads)]]).wall_s
    return min(walls, key=walls.__getitem__)


def compare(model: Path, types: list[str], runs: int) -> Row:
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder)
        threads = best_threads(model, out)
        own, peer = [], []
        for _ in range(runs):
            own.append(run(ours(model, out, types)))
            peer.append(run([c for name in types for c in theirs(model, out, name, threads)]))
    a, b = median(own), median(peer)
    share = subprocess.run(
        [PYTHON, str(Path(__file__).parent / "quantizer_share.py"), str(model), *types],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds = json.loads(share.stdout)
    return {
        "types": types, "runs": runs, "peer_threads": threads,
        "ours_wall_s": round(a.wall_s, 2), "peer_wall_s": round(b.wall_s, 2),
        "ratio": round(a.wall_s / b.wall_s, 3),
        "ours_cpu_s": round(a.cpu_s, 2), "peer_cpu_s": round(b.cpu_s, 2),
        "ours_peak_mib": round(a.peak_mib), "peer_peak_mib": round(b.peak_mib),
        "quantizer_cpu_s": round(seconds["quantizer_s"], 2),
        "quantizer_share": round(seconds["quantizer_s"] / seconds["process_s"], 2),
    }  # fmt: skip


def smollm2(folder: Path, runs: int) -> list[Row]:
    run([[PI_CONVERT, "export", "--to", "safetensors", "--scale", "1", "--dtype", "bf16",
          "--out", str(folder)]])  # fmt: skip
    model = next(path for path in folder.iterdir() if path.is_dir())
    return [{"work": "SmolLM2-135M bf16 folder", **compare(model, ["q4_k_m"], runs)}]


def tinyllama(folder: Path, runs: int, types: tuple[str, ...] = ("q4_k_m",)) -> list[Row]:
    model = seeded(folder, TINYLLAMA)
    row = {"work": "1.1B TinyLlama-shaped, bf16, sharded", **compare(model, list(types), runs)}
    shutil.rmtree(model)
    return [row]


def three_types(folder: Path, runs: int) -> list[Row]:
    return tinyllama(folder, runs, ("f16", "q8_0", "q4_k_m"))


def llama7b(folder: Path, _: int) -> list[Row]:
    """Once: it takes 45 GB of disk and some ten minutes. The disk's own rate stands beside it."""
    model = seeded(folder, LLAMA7B)
    row = {"work": "7B LLaMA-shaped, bf16, sharded", **compare(model, ["q4_k_m"], 1)}
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    row |= {"source_mib": round(size / 2**20), **disk_rates(folder)}
    shutil.rmtree(model)
    return [row]


def disk_rates(folder: Path, size_mib: int = 2048) -> Row:
    """MiB a second written with fsync, and read back as the benchmark reads: through the cache."""
    block = os.urandom(1 << 20)
    path = folder / "rate"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size_mib):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(8 << 20):
            pass
    read = time.perf_counter()
    path.unlink()
    return {"disk_write_mib_s": round(size_mib / (written - started)),
            "cached_read_mib_s": round(size_mib / (read - written))}  # fmt: skip


def growth(folder: Path, _: int) -> list[Row]:
    rows: list[Row] = []
    for shape in GROWTH:
        model = seeded(folder, shape)
        size = sum(f.stat().st_size for f in model.glob("*.safetensors")) / 2
        with tempfile.TemporaryDirectory(dir=folder) as out:
            measured = run(ours(model, Path(out), ["q4_k_m"]))
        rows.append({"work": f"growth {shape.name}", "parameters_m": round(size / 1e6),
                     "ours_wall_s": round(measured.wall_s, 2),
                     "s_per_billion": round(measured.wall_s / size * 1e9, 1),
                     "ours_peak_mib": round(measured.peak_mib)})  # fmt: skip
        shutil.rmtree(model)
    return rows


def help_(folder: Path, runs: int) -> list[Row]:
    own = median([run([[PI_CONVERT, "--help"]]) for _ in range(max(runs, 5))])
    click = median([run([[PYTHON, "-c", "import click"]]) for _ in range(max(runs, 5))])
    return [{"work": "pi-convert --help", "ours_wall_s": round(own.wall_s, 3),
             "import_click_wall_s": round(click.wall_s, 3)}]  # fmt: skip


def as_text(rows: list[Row], versions: dict[str, str], command: str) -> str:
    lines = [
        "# Export to GGUF, against llama.cpp's converter and quantizer",
        "",
        f"`{command}`",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    heads = (
        "work",
        "types",
        "ours",
        "peer",
        "ours / peer",
        "our peak",
        "peer's peak",
        "quantizing, CPU",
    )
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        if "ratio" in row:
            types = ", ".join(row["types"])  # type: ignore[arg-type]
            lines.append(
                f"| {row['work']} | {types} | {row['ours_wall_s']} s | {row['peer_wall_s']} s"
                f" ({row['peer_threads']} threads) | {row['ratio']} | {row['ours_peak_mib']} MiB"
                f" | {row['peer_peak_mib']} MiB | {share_text(row)} |"
            )
    lines += [
        "",
        *(
            f"{row['work']}: {row['source_mib']} MiB read; the disk writes"
            f" {row['disk_write_mib_s']} MiB/s with fsync; from the cache it gives"
            f" {row['cached_read_mib_s']} MiB/s."
            for row in rows
            if "source_mib" in row
        ),
    ]
    growth_rows = [row for row in rows if "s_per_billion" in row]
    if growth_rows:
        lines += ["", "| parameters | wall | s a billion | peak |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {r['parameters_m']} M | {r['ours_wall_s']} s | {r['s_per_billion']}"
            f" | {r['ours_peak_mib']} MiB |"
            for r in growth_rows
        ]
        lines += ["", fit_text(growth_rows)]
    for row in rows:
        if "import_click_wall_s" in row:
            lines += ["", f"`pi-convert --help`: {row['ours_wall_s']} s;"
                      f" `python -c 'import click'`: {row['import_click_wall_s']} s"]  # fmt: skip
    return "\n".join(lines) + "\n"


def fit_text(rows: list[Row]) -> str:
    """A line through wall time over parameters, by least squares."""
    parameters = [float(row["parameters_m"]) / 1e3 for row in rows]  # type: ignore[arg-type]
    walls = [float(row["ours_wall_s"]) for row in rows]  # type: ignore[arg-type]
    slope, start = statistics.linear_regression(parameters, walls)
    off = max(
        abs(wall - start - slope * size) / wall
        for size, wall in zip(parameters, walls, strict=True)
    )
    peaks = [float(row["ours_peak_mib"]) for row in rows]  # type: ignore[arg-type]
    return (
        f"Fit: {start:.2f} s + {slope:.1f} s a billion parameters, the farthest point {off:.0%} off"
        f" it; peak memory {min(peaks):.0f} to {max(peaks):.0f} MiB."
    )


def share_text(row: Row) -> str:
    """The quantizer's seconds and its share of all that the export computed."""
    if "quantizer_share" not in row:
        return "not measured"
    return f"{row['quantizer_cpu_s']} s, {row['quantizer_share']:.0%} of ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--folder", type=Path, help="Where models are made; removed afterwards.")
    arguments = parser.parse_args()
    measured = last_results()
    parts = {"smollm2": smollm2, "tinyllama": tinyllama, "three-types": three_types,
             "7b": llama7b, "growth": growth, "help": help_}  # fmt: skip
    versions = environment()
    for name in arguments.part or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measured[name] = parts[name](Path(folder), arguments.runs)
        rows = [row for part in PARTS for row in measured.get(part, [])]
        command = "python benchmarks/export_gguf.py"
        document = {"environment": versions, "parts": measured}
        write_results("export_gguf", document, as_text(rows, versions, command))


def last_results() -> dict[str, list[Row]]:
    """Rows by part, as the last run left them."""
    file = RESULTS / "export_gguf.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


if __name__ == "__main__":
    main()
