"""Perplexity and KL of a GGUF against llama-perplexity, and the memory of a long window.

usage: python benchmarks/perplexity.py [--runs N] [--part PART]... [--quick]
Parts that are not run keep their last results; --quick tries everything on small windows and keeps
nothing. The same tokens and the same files of libggml, those of llama-cpp-python; threads, ubatch
and flash attention are the best of each, tried on one window before; whole processes, each first in
every other round, the median of the rounds' ratios. The numbers are held against each other, so
that both did the same work. The first run builds llama-perplexity, which takes some minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.export_gguf import PI_CONVERT, PYTHON, Row
from benchmarks.measure import RESULTS, Run, environment, median, run, run_and_read, write_results
from converters.ggml.library import load_libraries
from tests.sdist import build_llama_perplexity

PARTS = ("perplexity", "kl", "memory")
ROOM_MIB = 600  # over weights and cache, for a long window
# Relative. With the same attention 5e-4 is what ubatch and threads can change by rounding; flash
# attention against none changed the perplexity of 510 tokens by 0.7 %.
PPL_AGREES, PPL_AGREES_ACROSS = 5e-4, 2e-2
KL_AGREES = 5e-2  # llama-perplexity keeps the source's logits in 16 bits, torch has them in 32
_SAVES = 0.05  # of the wall
PPL = re.compile(r"PPL = ([\d.]+) \+/-")
KLD = re.compile(r"Mean +KLD: +([\d.]+)")


@dataclass(frozen=True)
class Sizes:
    window: int
    windows: int
    long_window: int


FULL, QUICK = Sizes(4096, 4, 16384), Sizes(512, 2, 1024)


@dataclass(frozen=True)
class Settings:
    threads: int
    ubatch: int = 512
    flash: bool = True

    def of_ours(self) -> list[str]:
        flash = "--flash-attention" if self.flash else "--no-flash-attention"
        return ["--threads", str(self.threads), "--ubatch", str(self.ubatch), flash]

    def of_theirs(self) -> list[str]:
        return ["-t", str(self.threads), "-ub", str(self.ubatch), "-fa",
                "on" if self.flash else "off"]  # fmt: skip

    def __str__(self) -> str:
        flash = "flash attention" if self.flash else "no flash attention"
        return f"{self.threads} threads, ubatch {self.ubatch}, {flash}"


Command = Callable[[Settings], list[str]]


@dataclass(frozen=True)
class Bench:
    """The models, made once; L is 8,192 and L' 16,384."""

    folder: Path
    sizes: Sizes
    runs: int
    source: Path  # a folder
    source_f16: Path
    artifact: Path  # q4_k_m

    def texts(self, window: int, windows: int) -> Path:
        """A folder with ``windows`` files of ``window`` tokens, and joined.txt."""
        out = self.folder / f"text-{window}-{windows}"
        if not out.is_dir():
            out.mkdir()
            script = str(Path(__file__).parent / "aligned_text.py")
            subprocess.run(
                [PYTHON, script, str(self.artifact), str(out), str(window), str(windows)],
                check=True,
            )
        return out


def prepare(folder: Path, sizes: Sizes, runs: int) -> Bench:
    run([[PI_CONVERT, "export", "--to", "safetensors", "--scale", "2", "--out", str(folder)]])
    source = next(path for path in folder.iterdir() if path.is_dir())
    run([[PI_CONVERT, "export", str(source), "--to", "gguf", "--quantize", "f16",
          "--quantize", "q4_k_m", "--out", str(folder)]])  # fmt: skip
    (f16,) = folder.glob("*F16.gguf")
    (artifact,) = folder.glob("*Q4_K_M.gguf")
    return Bench(folder, sizes, runs, source, f16, artifact)


def ours(bench: Bench, window: int, count: int, text: Path) -> Command:
    words = [PI_CONVERT, "perplexity", str(bench.artifact), "--text", str(text), "--protocol",
             "llama.cpp", "--contexts", str(window), "--max-windows", str(count)]  # fmt: skip
    return lambda settings: [*words, *settings.of_ours()]


def theirs(model: Path, window: int, *more: str) -> Command:
    words = ["env", f"LD_LIBRARY_PATH={load_libraries().folder}", str(build_llama_perplexity()),
             "-m", str(model), "-c", str(window), *more]  # fmt: skip
    return lambda settings: [*words, *settings.of_theirs()]


def chunks(text: Path, count: int) -> tuple[str, ...]:
    return ("-f", str(text), "--chunks", str(count))


def best(command: Command, ubatches: tuple[int, ...]) -> Settings:
    """Threads, then ubatch, then flash attention: the fastest with what was found before.

    Another one is taken where it saves ``_SAVES``: less may be the machine's.
    """
    cores = len(os.sched_getaffinity(0))
    found = Settings(cores)
    walls = {found: run([command(found)]).wall_s}
    for options in (
        [{"threads": cores // 2 or 1}, {"threads": 2 * cores}],
        [{"ubatch": size} for size in ubatches],
        [{"flash": False}],
    ):
        for option in options:
            tried = replace(found, **option)
            if tried not in walls:
                walls[tried] = run([command(tried)]).wall_s
        fastest = min(walls, key=walls.__getitem__)
        if walls[fastest] < (1 - _SAVES) * walls[found]:
            found = fastest
    return found


@functools.cache
def both_best(bench: Bench) -> tuple[Settings, Settings]:
    """Ours and theirs, on one window; ours feeds at most 512 tokens at once."""
    window = bench.sizes.window
    text = bench.texts(window, bench.sizes.windows) / "joined.txt"
    quick = bench.sizes is QUICK
    return (
        best(ours(bench, window, 1, text), () if quick else (128, 256)),
        best(theirs(bench.artifact, window, *chunks(text, 1)), () if quick else (256, 1024, 2048)),
    )


def agree_ppl(mine: float, other: float, own: Settings, peer: Settings) -> None:
    same = own.flash is peer.flash
    agree("perplexity", mine, other, PPL_AGREES if same else PPL_AGREES_ACROSS)


def agree(what: str, mine: float, other: float, tolerance: float) -> None:
    if not math.isclose(mine, other, rel_tol=tolerance):
        sys.exit(f"{what}: ours {mine}, llama-perplexity's {other}: not the same work")


def number(pattern: re.Pattern[str], printed: str) -> float:
    found = pattern.search(printed)
    if found is None:
        sys.exit(f"no {pattern.pattern} in:\n{printed[-3000:]}")
    return float(found[1])


def measured(own: list[Run], peer: list[Run]) -> Row:
    a, b = median(own), median(peer)
    rounds = [[round(one.wall_s, 2) for one in pair] for pair in zip(own, peer, strict=True)]
    return {
        "ours_wall_s": round(a.wall_s, 2), "peer_wall_s": round(b.wall_s, 2),
        "ratio": round(statistics.median(mine / other for mine, other in rounds), 3),
        "rounds_s": rounds,
        "ours_peak_mib": round(a.peak_mib), "peer_peak_mib": round(b.peak_mib),
    }  # fmt: skip


def perplexity(bench: Bench) -> list[Row]:
    sizes = bench.sizes
    text = bench.texts(sizes.window, sizes.windows) / "joined.txt"
    own_settings, peer_settings = both_best(bench)
    mine = ours(bench, sizes.window, sizes.windows, text)(own_settings)
    other = theirs(bench.artifact, sizes.window, *chunks(text, sizes.windows))(peer_settings)
    own, peer = [], []
    for number_of_round in range(bench.runs):
        (a, said_a), (b, said_b) = in_turn([mine], [other], number_of_round)
        values = number(PPL, said_a), number(PPL, said_b)
        agree_ppl(*values, own_settings, peer_settings)
        own.append(a)
        peer.append(b)
    work = f"perplexity, {sizes.windows} windows of {sizes.window:,} tokens, q4_k_m"
    return [{"work": work, "runs": bench.runs, "perplexity": values[0],
             "peer_perplexity": values[1],
             "ours_settings": str(own_settings), "peer_settings": str(peer_settings),
             **measured(own, peer)}]  # fmt: skip


def kl(bench: Bench) -> list[Row]:
    """Theirs twice: the source's logits to a file, then the artifact against it."""
    sizes = bench.sizes
    texts = bench.texts(sizes.window, sizes.windows)
    own_settings, peer_settings = both_best(bench)
    logits = bench.folder / "logits"
    keep = ("--kl-divergence-base", str(logits))
    passes = [
        theirs(bench.source_f16, sizes.window, *chunks(texts / "joined.txt", sizes.windows), *keep),
        theirs(bench.artifact, sizes.window, *keep, "--kl-divergence"),
    ]
    sources = {"f16 GGUF": bench.source_f16, "folder in torch": bench.source}
    commands = {
        name: [PI_CONVERT, "compare", str(source), str(bench.artifact), "--json", "--text",
               str(texts / "joined.txt"), "--protocol", "llama.cpp", "--context",
               str(sizes.window), "--max-windows", str(sizes.windows), *own_settings.of_ours()]
        for name, source in sources.items()
    }  # fmt: skip
    twice = [command(peer_settings) for command in passes]
    own: dict[str, list[Run]] = {name: [] for name in sources}
    peers: dict[str, list[Run]] = {name: [] for name in sources}
    values: dict[str, float] = {}
    for number_of_round, name in itertools.product(range(bench.runs), sources):
        before = used_bytes(bench.folder)
        (a, printed), (b, said) = in_turn([commands[name]], twice, number_of_round)
        disk = logits.stat().st_size
        logits.unlink()
        assert used_bytes(bench.folder) == before
        values[name] = mean_kl(printed)
        agree(f"KL from the {name}", values[name], number(KLD, said), KL_AGREES)
        own[name].append(a)
        peers[name].append(b)
    return [
        {"work": f"KL of q4_k_m from its source ({name}), {sizes.windows} windows of"
                 f" {sizes.window:,} tokens", "runs": bench.runs, "kl": values[name],
         "peer_kl": number(KLD, said), "ours_settings": str(own_settings),
         "peer_settings": str(peer_settings), **measured(own[name], peers[name]),
         "ours_disk_mib": 0, "peer_disk_mib": round(disk / 2**20)}
        for name in sources
    ]  # fmt: skip


def in_turn(
    mine: list[list[str]], other: list[list[str]], number_of_round: int
) -> tuple[tuple[Run, str], tuple[Run, str]]:
    """(ours, theirs); each is first in every other round, for the machine's speed drifts."""
    if number_of_round % 2:
        peer = run_and_read(other)
        return run_and_read(mine), peer
    return run_and_read(mine), run_and_read(other)


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def mean_kl(printed: str) -> float:
    document, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    return float(document["kl"]["value"])


def memory(bench: Bench) -> list[Row]:
    """One window, all at their defaults; the cache's size is its float16 keys and values."""
    window = bench.sizes.long_window
    text = bench.texts(window, 2) / "joined.txt"
    shown = subprocess.run(
        [PI_CONVERT, "inspect", str(bench.artifact), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    cache = json.loads(shown.stdout)["kv_cache_bytes"][-1]
    cache_mib = cache["size_bytes"] / cache["context"] * window / 2**20
    model_mib = bench.artifact.stat().st_size / 2**20
    settings = Settings(len(os.sched_getaffinity(0)))
    a, said_a = run_and_read([ours(bench, window, 1, text)(settings)])
    b, said_b = run_and_read([theirs(bench.artifact, window, *chunks(text, 1))(settings)])
    agree_ppl(number(PPL, said_a), number(PPL, said_b), settings, settings)
    return [{"work": f"one window of {window:,} tokens, q4_k_m", "runs": 1,
             "ours_settings": str(settings), "peer_settings": str(settings), **measured([a], [b]),
             "model_mib": round(model_mib), "cache_mib": round(cache_mib),
             "allowed_mib": round(model_mib + cache_mib + ROOM_MIB)}]  # fmt: skip


def ggml_versions() -> dict[str, str]:
    """Of the library that we run and of llama-perplexity's; exits where they differ."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folders = (Path(spec.origin).parent / "lib", build_llama_perplexity().parent)
    found = []
    for folder in folders:
        version = ctypes.CDLL(str(folder / "libggml-base.so")).ggml_version
        version.restype = ctypes.c_char_p
        found.append(version().decode())
    if len(set(found)) > 1:
        sys.exit(f"ggml {found[0]} here, {found[1]} in llama-perplexity")
    return {"ggml, both": found[0]}


def as_text(rows: list[Row], versions: dict[str, str]) -> str:
    lines = ["# Perplexity and KL of a GGUF, against llama-perplexity", "",
             "`python benchmarks/perplexity.py`", ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    lines += ["", "SmolLM2-135M-Instruct at factor 2 on the Python documentation. Walls are medians"
              " of the rounds, ours / theirs the median of the rounds' ratios."]  # fmt: skip
    heads = ("work", "rounds", "ours", "llama-perplexity", "ours / theirs", "our peak",
             "their peak")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines += [
        f"| {row['work']} | {row['runs']} | {row['ours_wall_s']} s ({row['ours_settings']})"
        f" | {row['peer_wall_s']} s ({row['peer_settings']}) | {row['ratio']}"
        f" | {row['ours_peak_mib']} MiB | {row['peer_peak_mib']} MiB |"
        for row in rows
    ]
    lines.append("")
    for row in rows:
        if "perplexity" in row:
            lines.append(f"- {row['work']}: {row['perplexity']}, theirs {row['peer_perplexity']}.")
        if "kl" in row:
            lines.append(
                f"- {row['work']}: {row['kl']:.6f} nats, theirs {row['peer_kl']:.6f}. Disk:"
                f" {row['ours_disk_mib']} MiB, theirs {row['peer_disk_mib']} MiB."
            )
        if "allowed_mib" in row:
            lines.append(
                f"- {row['work']}: model {row['model_mib']} MiB + cache {row['cache_mib']} MiB"
                f" + {ROOM_MIB} MiB = {row['allowed_mib']} MiB allowed, {row['ours_peak_mib']} MiB"
                " taken."
            )
    return "\n".join(lines) + "\n"


def last_results() -> dict[str, list[Row]]:
    """Rows by part, as the last run left them."""
    file = RESULTS / "perplexity.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--quick", action="store_true", help="Small windows, one run, not kept.")
    parser.add_argument("--folder", type=Path, help="Where models are made; removed afterwards.")
    arguments = parser.parse_args()
    sizes, runs = (QUICK, 1) if arguments.quick else (FULL, arguments.runs)
    found = {} if arguments.quick else last_results()
    versions = environment() | ggml_versions()
    parts = {"perplexity": perplexity, "kl": kl, "memory": memory}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = prepare(Path(folder), sizes, runs)
        for name in arguments.part or PARTS:
            found[name] = parts[name](bench)
            rows = [row for part in PARTS for row in found.get(part, [])]
            if arguments.quick:
                print(as_text(rows, versions))
            else:
                document = {"environment": versions, "parts": found}
                write_results("perplexity", document, as_text(rows, versions))


if __name__ == "__main__":
    main()
