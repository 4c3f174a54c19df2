"""One real model through the whole mission: tuned past its window, exported, proven, measured.

usage: python benchmarks/real_model.py [--device cuda] [--quick]
The default model at scale 2 on State of the Union speeches, on a CPU at windows of 10,240 tokens;
`--device cuda` takes it from 8,192 to 65,536 by the same way. Perplexities are of speeches that it
was not tuned on, of the base, the interpolated model without a step, and the tuned one: as GGUF
q8_0 in llama.cpp, on cuda as folders in torch. Stages are kept under .cache/real-model, and the
tuning goes on where it was stopped. --quick takes one step on a short window and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import llama_cpp
import torch

from benchmarks.export_gguf import PI_CONVERT
from benchmarks.measure import RESULTS, environment
from benchmarks.speeches import split
from converters.sources import open_checkpoint
from pi_convert.defaults import default_model_path
from pi_convert.finetune.recipe import Recipe, position_buckets

CACHE = Path(__file__).parent.parent / ".cache" / "real-model"


@dataclass(frozen=True)
class Plan:
    device: str
    scale: int
    window: int
    steps: int
    batch: int
    rate: float
    contexts: tuple[int, ...]  # the last ones past L = 8,192
    stride: int
    windows: int
    joined: bool = False  # no speech is as long as the longest context

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"


CPU = Plan("cpu", 2, 10_240, 30, 1, 3e-4, (4096, 8192, 10_240), 1024, 4)
CUDA = Plan("cuda", 8, 65_536, 40, 4, 2e-4, (4096, 8192, 16_384, 32_768, 65_536), 1024, 14, True)
QUICK = Plan("cpu", 2, 256, 1, 1, 1e-4, (128, 256), 32, 2)
GGUF = ["--to", "gguf", "--quantize", "q8_0", "--allow-requantize"]


@dataclass(frozen=True)
class Bench:
    folder: Path
    plan: Plan

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    def gguf(self, name: str) -> Path:
        return next((self.folder / name).glob("*Q8_0.gguf"))

    def exported(self, name: str) -> Path:
        """The one folder that an export wrote."""
        return next(path for path in (self.folder / name).iterdir() if path.is_dir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="One step, nothing kept.")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(as_text(run(Bench(Path(folder), QUICK))))
        return
    plan = CUDA if arguments.device == "cuda" else CPU
    name = "real_model" if plan is CPU else "real_model_cuda"
    folder = CACHE if plan is CPU else CACHE.with_name("real-model-cuda")
    document = run(Bench(folder, plan))
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(as_text(document))
    print(as_text(document))


def run(bench: Bench) -> dict[str, Any]:
    plan, model = bench.plan, str(default_model_path())
    bench.folder.mkdir(parents=True, exist_ok=True)
    tune(bench, model)
    form = ["--to", "safetensors"] if plan.on_cuda else GGUF
    once(bench.folder / "base", ["export", model, *form, "--scale", "1"])
    once(bench.folder / "untuned", ["export", model, *form, "--scale", str(plan.scale)])
    once(bench.folder / "tuned-gguf", ["export", str(bench.tuned), *GGUF])
    once(bench.folder / "tuned-onnx", ["export", str(bench.tuned), "--to", "onnx", "--precision",
                                       "int8"])  # fmt: skip
    onnx = bench.exported("tuned-onnx")
    offloads = plan.on_cuda and llama_cpp.llama_supports_gpu_offload()
    checked = ["--against", str(bench.tuned), "--json", "--device"]
    record = json.loads((bench.tuned / "pi_convert_finetune.json").read_text())
    log = (bench.tuned / "run" / "trainer_log.jsonl").read_text().splitlines()
    return {
        "environment": environment()
        | ({"gpu": torch.cuda.get_device_name()} if plan.on_cuda else {}),
        "plan": {field: getattr(plan, field) for field in Plan.__dataclass_fields__},
        "record": record,
        "tokens_by_position": position_buckets(
            Recipe(**record["recipe"]), open_checkpoint(str(bench.tuned)).rope
        ),
        "losses": [json.loads(line)["loss"] for line in log],
        "seconds_of_tuning": tuning_seconds(log),
        "verify_gguf": kept(bench, "verify-gguf",
                            ["verify", str(bench.gguf("tuned-gguf")), *checked,
                             "cuda" if offloads else "cpu"]),
        "verify_onnx": kept(bench, "verify-onnx", ["verify", str(onnx), *checked, plan.device]),
        "perplexity": kept(bench, "perplexity", perplexity(bench)),
        "probe_base": kept(bench, "probe-base", probe(bench, model)),
        "probe_tuned": kept(bench, "probe-tuned", probe(bench, str(bench.tuned))),
    }  # fmt: skip


def tune(bench: Bench, model: str) -> None:
    plan = bench.plan
    if (bench.tuned / "config.json").is_file():
        return
    words = ["finetune", model, "--scale", str(plan.scale), "--text",
             str(split(CACHE.parent / "speeches").train), "--window", str(plan.window), "--steps",
             str(plan.steps), "--batch", str(plan.batch), "--learning-rate", str(plan.rate),
             "--save-every", "2", "--eval-every", "0", "--device", plan.device,
             "--out", str(bench.tuned)]  # fmt: skip
    if plan is QUICK:
        words.append("--allow-short-window")
    if (bench.tuned / "run").is_dir():
        words.append("--resume")
    pi_convert(words)


def tuning_seconds(log: Sequence[str]) -> float:
    """By the last line's rate, which is over the whole run (or since it was gone on with)."""
    last = json.loads(log[-1])
    return float(last["tokens"] / last["tokens_per_second"])


def held_out() -> list[str]:
    texts = split(CACHE.parent / "speeches").test
    return [word for text in texts for word in ("--text", str(text))]


def probe(bench: Bench, model: str) -> list[str]:
    return ["probe", model, *held_out(), "--device", bench.plan.device, "--json"]


def perplexity(bench: Bench) -> list[str]:
    plan, texts = bench.plan, held_out()
    if plan.on_cuda:
        models = [str(bench.exported("untuned")), str(bench.tuned), str(bench.exported("base"))]
    else:
        models = [str(bench.gguf(name)) for name in ("untuned", "tuned-gguf", "base")]
    if plan.joined:
        texts.append("--join")
    return ["perplexity", *models, *texts, "--contexts", ",".join(map(str, plan.contexts)),
            "--stride", str(plan.stride), "--max-windows", str(plan.windows), "--extrapolate",
            "--device", plan.device, "--json"]  # fmt: skip


def once(out: Path, words: list[str]) -> None:
    if not out.is_dir():
        partial = out.with_suffix(".partial")
        pi_convert([*words, "--out", str(partial), "--force"])
        partial.rename(out)


def kept(bench: Bench, name: str, words: list[str]) -> dict[str, Any]:
    file = bench.folder / f"{name}.json"
    if not file.is_file():
        started = time.monotonic()
        printed = pi_convert(words)
        document = {"wall_s": round(time.monotonic() - started, 1), **json.loads(printed)}
        file.write_text(json.dumps(document))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def pi_convert(words: list[str]) -> str:
    print(f"{time.strftime('%H:%M:%S')} pi-convert {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([PI_CONVERT, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"pi-convert {words[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def as_text(document: dict[str, Any]) -> str:
    plan, record = document["plan"], document["record"]
    tokens = plan["steps"] * plan["batch"] * plan["window"]
    lines = ["# One real model through the whole mission", "",
             "`python benchmarks/real_model.py"
             + (" --device cuda`" if plan["device"] == "cuda" else "`"), ""]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in document["environment"].items()]
    lines += [
        "",
        f"SmolLM2-135M-Instruct (L 8,192) at scale {plan['scale']}, L' {record['context']:,}:"
        f" {plan['steps']} steps of {plan['batch']} window{'s'[: plan['batch'] != 1]} of"
        f" {plan['window']:,} tokens, {tokens:,} tokens in all, in"
        f" {document['seconds_of_tuning'] / 60:.0f} min on {plan['device']}; peak rate"
        f" {plan['rate']:g}, which the warm-up of 20 steps"
        f" {'reaches' if plan['steps'] > 20 else 'never reaches'}. Loss of the first step"
        f" {document['losses'][0]:.3f}, of the last {document['losses'][-1]:.3f}.",
        "",
        "| trained at positions | tokens |",
        "| --- | --- |",
        *(
            f"| {start:,} to {stop - 1:,} | {tokens:,} |"
            for start, stop, tokens in document["tokens_by_position"]
        ),
        "",
        "## Perplexity",
        "",
        *_perplexities(document["perplexity"], plan["device"] == "cuda"),
        "",
        "## Probe",
        "",
        "`pi-convert probe`, which does not look at what a config states.",
        "",
        *(
            f"- {what}: {_probed(document[name])}"
            for what, name in (("base", "probe_base"), ("tuned", "probe_tuned"))
        ),
        "",
        "## Proof",
        "",
        *(
            f"- {what}: **{_verdict(document[name])}**, in {document[name]['wall_s']:.0f} s,"
            f" {_where(document[name])}"
            for what, name in (("GGUF q8_0", "verify_gguf"), ("ONNX int8", "verify_onnx"))
        ),
    ]
    return "\n".join(lines) + "\n"


def _probed(found: dict[str, Any]) -> str:
    nll = {one["factor"]: one["nll_below"]["value"] for one in found["tried"]}
    best = sorted(nll, key=nll.__getitem__)[:3]
    values = ", ".join(f"{nll[factor]:.3f} with {factor:g}" for factor in sorted({1.0, *best}))
    fits = [found["factor"], *(fit["factor"] for fit in found["also_fit"])]
    told = " or ".join(f"{fit:g}" for fit in fits) if found["factor"] else "no factor"
    return f"{told} stands out; nats a token below L: {values}"


def _verdict(found: dict[str, Any]) -> str:
    return str(found["outcome"])


def _where(found: dict[str, Any]) -> str:
    ran = {key: value for key, value in found["environment"].items() if key.endswith(" device")}
    return ", ".join(f"{key.removesuffix(' device')} on {value}" for key, value in ran.items())


def _perplexities(found: dict[str, Any], on_cuda: bool) -> list[str]:
    untuned, tuned, base = found["models"]
    contexts = [at["context"] for at in tuned["contexts"]]
    rows = [["model", *(f"{c:,}" for c in contexts)], ["---"] * (1 + len(contexts))]
    for name, model in (("base", base), ("interpolated, untuned", untuned), ("tuned", tuned)):
        rows.append([name, *(
            f"{at['perplexity']:.2f}{_interval(at)}"
            + (" (past L')" if at["context"] > model["context"] else "")
            for at in model["contexts"]
        )])  # fmt: skip
    for name, model in (("base", base), ("tuned", tuned)):
        rows.append([f"{name} against untuned, paired", *map(_change, model["against_first"])])
    return [
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"{'Folders in torch' if on_cuda else 'GGUF q8_0 in llama.cpp'};"
        f" {found['scored_tokens']:,} tokens of {found['documents']} speeches"
        " that are not trained on, the same at every window, intervals by speech.",
    ]


def _interval(at: dict[str, Any]) -> str:
    ends = at["interval"]
    return "" if ends is None else f" ({ends[0]:.1f} to {ends[1]:.1f})"


def _change(one: dict[str, Any]) -> str:
    low, high = (math.expm1(end) for end in one["nll_change"]["interval"])
    return f"{one['ratio'] - 1:+.1%} ({low:+.1%} to {high:+.1%})"


if __name__ == "__main__":
    main()
