"""Whole processes, measured by the kernel's own accounting; medians of interleaved runs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    wall_s: float
    cpu_s: float
    peak_mib: float


def run(commands: list[list[str]], environment: dict[str, str] | None = None) -> Run:
    """Runs the commands one after the other: summed time, the largest process's peak memory."""
    return run_and_read(commands, environment)[0]


def run_and_read(
    commands: list[list[str]], environment: dict[str, str] | None = None
) -> tuple[Run, str]:
    """``run``, and all that the commands printed."""
    wall = cpu = peak = 0.0
    printed = ""
    for command in commands:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} failed with {process.returncode}:\n{output[-3000:]}")
        wall += time.perf_counter() - started
        cpu += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss / 1024)
        printed += output
    return Run(wall, cpu, peak), printed


def median(runs: list[Run]) -> Run:
    return Run(
        *(
            statistics.median(values)
            for values in zip(*(asdict(r).values() for r in runs), strict=True)
        )
    )


def environment() -> dict[str, str]:
    packages = ("pi-convert", "numpy", "gguf", "llama-cpp-python", "click", "torch", "transformers")
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{cpu}, {cores} core{'s'[: cores != 1]}",
        **{name: version(name) for name in packages},
    }


def write_results(name: str, document: dict[str, object], text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
