"""The claims of Position Interpolation (arXiv 2306.15595), on a small LLaMA and real text.

usage: python benchmarks/paper.py [--quick]
Pretrains a LLaMA of 3.7 M parameters on windows of 128 tokens, extends it by every way that the
paper compares, measures each with `pi-convert perplexity` and `pi-convert passkey`, and writes
benchmarks/results/paper.md, .json and two plots. Every training run is `pi-convert finetune`'s own.
Stages are kept under .cache/paper; a stopped run goes on where it was. --quick trains a few steps
of each and keeps nothing: it shows that the way is whole, not that the claims hold.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import paper_report
from benchmarks.export_gguf import PI_CONVERT
from benchmarks.measure import RESULTS, environment
from benchmarks.paper_model import (
    PASSKEY_SHARE,
    TAUGHT_SHARE,
    L,
    with_context,
    write_base,
    write_passkeys,
    write_taught,
)
from benchmarks.paper_pairs import At, paired_changes
from benchmarks.speeches import split
from converters.sources import open_checkpoint
from pi_convert.finetune.progress import Schedule, StepReport
from pi_convert.finetune.recipe import Choices, choose_recipe
from pi_convert.finetune.run import FinetuneRequest, finetune
from pi_convert.finetune.train import Passes

CACHE = Path(__file__).parent.parent / ".cache" / "paper"
SPEECH_TOKENS = 3_050_000  # of the speeches to train on, by the tokenizer made here
PASS_TOKENS = 512  # at once; more is no faster on two cores
_TOLD_EVERY = 25  # steps
_MEASURED = "perplexity.json", "passkey-*.json", "probe.json"  # of other weights than the copy's

Found = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to a longer context: what it starts from, and how it is trained on."""

    name: str
    scale: float = 1  # of Position Interpolation
    context: int = L  # window that it is trained on; L of a model that is not interpolated
    kept: tuple[int, ...] = (0, 50, 200)  # steps whose weights are measured
    rate: float = 2e-4
    is_taught: bool = False  # to find passkeys: starts from the base that was taught it

    @property
    def steps(self) -> int:
        return self.kept[-1]


LONG = (0, 50, 200, 400, 600, 800, 1000)
ARMS = (
    Arm("PI x2", scale=2, context=2 * L),
    Arm("PI x4", scale=4, context=4 * L),
    Arm("PI x8", scale=8, context=8 * L, kept=LONG),
    Arm("direct", context=8 * L),
    Arm("trained on", kept=LONG),
    Arm("PI x3", scale=3, context=3 * L, kept=(200, 1000)),  # these are probed only
    Arm("PI x4.5", scale=4.5, context=576, kept=(200, 1000)),  # off the grid of factors
    Arm("PI x6", scale=6, context=6 * L, kept=(200, 1000)),
)
PROBED = ("PI x3", "PI x4.5", "PI x6")
TAUGHT_LONG = 0, 200, 1000
TAUGHT = (
    Arm("taught PI x2", scale=2, context=2 * L, kept=(0, 200), is_taught=True),
    Arm("taught PI x4", scale=4, context=4 * L, kept=TAUGHT_LONG, is_taught=True),
    Arm("taught PI x8", scale=8, context=8 * L, kept=TAUGHT_LONG, is_taught=True),
    Arm("taught direct", context=8 * L, kept=TAUGHT_LONG, is_taught=True),
)


@dataclass(frozen=True)
class Plan:
    """How much is done; two plans never share a folder."""

    pretraining_steps: int = 700
    pretraining_tokens: int = 8192  # a step
    pretraining_rate: float = 2e-3
    step_tokens: int = 2048  # of every run after it
    teaching_steps: int = 400
    teaching_rate: float = 2e-3
    teaching_tokens: int = 8192  # a step
    taught_tokens: int = 4096  # a step of every run after it
    stride: int = 64
    windows: int = 70  # 10 of each speech
    trials: int = 30  # at every distance; of 10 the paper's rule is seldom certain
    arms: tuple[Arm, ...] = ARMS
    taught: tuple[Arm, ...] = TAUGHT

    @property
    def contexts(self) -> tuple[int, ...]:
        return L, 2 * L, 4 * L, 8 * L

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


QUICK = Plan(
    pretraining_steps=3, windows=4, trials=1,
    teaching_steps=2,
    arms=tuple(replace(arm, kept=tuple(range(len(arm.kept)))) if len(arm.kept) > 1
               else replace(arm, kept=(1,)) for arm in ARMS),
    taught=tuple(replace(arm, kept=tuple(range(len(arm.kept)))) for arm in TAUGHT),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    folder: Path
    plan: Plan

    @property
    def base(self) -> Path:
        return self.folder / "pretrained"

    def model(self, arm: Arm, step: int) -> Path:
        return self.folder / arm.name / f"step-{step}"

    @property
    def taught(self) -> Path:
        """The base after it was taught to find passkeys on windows of L."""
        return self.folder / "taught"

    def texts(self, arm: Arm) -> tuple[Path, ...]:
        """Speeches, and passkeys of every length up to the window."""
        name, share, write = (
            ("taught", TAUGHT_SHARE, write_taught)
            if arm.is_taught
            else ("passkeys", PASSKEY_SHARE, write_passkeys)
        )
        passkeys = self.folder / f"{name}-{arm.context}.jsonl"
        if not passkeys.is_file():
            tokens = round(SPEECH_TOKENS * share / (1 - share))
            partial = passkeys.with_suffix(".partial")
            write(self.folder / "random", arm.context, tokens, partial)
            partial.rename(passkeys)
        return split(CACHE / "speeches").train, passkeys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="A few steps of everything.")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(run(Bench(Path(folder), QUICK))["text"])
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    made = run(Bench(CACHE, Plan()))
    RESULTS.mkdir(exist_ok=True)
    for name, drawn in made["plots"].items():
        (RESULTS / name).write_text(drawn)
    (RESULTS / "paper.json").write_text(json.dumps(made["document"], indent=1) + "\n")
    (RESULTS / "paper.md").write_text(made["text"])
    print(made["text"])


def run(bench: Bench) -> dict[str, Any]:
    plan = bench.plan
    pretrain(bench)
    teach(bench)
    for arm in plan.arms + plan.taught:
        train(bench, arm)
    document = {
        "environment": environment(),
        "tokens_a_step": {
            "pretraining": plan.pretraining_tokens,
            "after": plan.step_tokens,
            "teaching": plan.teaching_tokens,
            "taught": plan.taught_tokens,
        },
        "pretraining_steps": plan.pretraining_steps,
        "teaching": {
            "steps": plan.teaching_steps,
            "rate": plan.teaching_rate,
            "rate_after": plan.taught[0].rate,
        },
        "windows": {arm.name: arm.context for arm in plan.arms},
        "rates": {"pretraining": plan.pretraining_rate} | {a.name: a.rate for a in plan.arms},
        "perplexity": perplexities(bench),
        "paired": pairs(bench),
        "seconds": seconds(bench),
        "passkey": passkeys(bench),
        "probe": probes(bench),
    }
    text, plots = paper_report.render(document)
    return {"document": document, "text": text, "plots": plots}


def pretrain(bench: Bench) -> None:
    """The base, from random weights: the same trainer, no interpolation."""
    plan, random = bench.plan, bench.folder / "random"
    if not random.is_dir():
        partial = random.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_base(split(CACHE / "speeches").train, partial)
        partial.rename(random)
    if not (bench.base / "config.json").is_file():
        arm = Arm("pretraining", kept=(plan.pretraining_steps,), rate=plan.pretraining_rate)
        trained(bench, arm, random, plan.pretraining_tokens, bench.base)


def teach(bench: Bench) -> None:
    """The base, on windows of L that are mostly passkeys."""
    plan = bench.plan
    if not (bench.taught / "config.json").is_file():
        arm = Arm("teaching", kept=(plan.teaching_steps,), rate=plan.teaching_rate, is_taught=True)
        trained(bench, arm, bench.base, plan.teaching_tokens, bench.taught)


def train(bench: Bench, arm: Arm) -> None:
    """One arm, with the weights of every kept step put aside as a model of their own."""
    if all((bench.model(arm, step) / "config.json").is_file() for step in arm.kept):
        return
    plan, source = bench.plan, bench.taught if arm.is_taught else bench.base
    if arm.scale == 1 and arm.context > L:
        name = f"{'taught-' if arm.is_taught else ''}context-{arm.context}"
        source = with_context(source, arm.context, bench.folder / name)
    step_tokens = plan.taught_tokens if arm.is_taught else plan.step_tokens
    out = bench.folder / arm.name / "run"
    out.parent.mkdir(exist_ok=True)
    trained(bench, arm, source, step_tokens, out)
    keep(out, bench.model(arm, arm.steps))
    shutil.rmtree(out)


def trained(bench: Bench, arm: Arm, source: Path, step_tokens: int, out: Path) -> None:
    """The run in ``out``, gone on with where it was stopped."""
    checkpoint = open_checkpoint(str(source))
    recipe = choose_recipe(
        "paper",
        arm.scale,
        checkpoint.interpolate(arm.scale).rope,
        checkpoint.parameters,
        Choices(
            steps=arm.steps,
            window=arm.context,
            global_batch=step_tokens // arm.context,
            learning_rate=arm.rate,
            allow_short_window=True,
        ),
    )
    request = FinetuneRequest(
        source=checkpoint,
        recipe=recipe,
        texts=bench.texts(arm),
        out=out,
        schedule=Schedule(save_every=math.gcd(50, *arm.kept), eval_every=0),
        passes=Passes(windows=max(1, PASS_TOKENS // arm.context), recompute=False),
        resume=(out / "run").is_dir(),
    )
    wanted = {step: bench.model(arm, step) for step in arm.kept if step < arm.steps}

    def report(done: StepReport) -> None:
        put_aside(out / "run", done.step, wanted)
        if done.step % _TOLD_EVERY == 0 or done.step == done.steps:
            left = f"{done.seconds_left / 60:.0f} min left"
            say(f"{arm.name}: step {done.step} of {done.steps}, loss {done.loss:.3f}, {left}")

    started = time.monotonic()
    finetune(request, report)
    took = round(time.monotonic() - started)
    (bench.folder / f"{arm.name}.seconds").write_text(f"{took}\n")
    say(f"{arm.name}: {took} s")


def put_aside(run_folder: Path, step: int, wanted: dict[int, Path]) -> None:
    """Before ``step``'s own checkpoint is written, those before it are whole."""
    base = run_folder / "base"
    for kept, model in wanted.items():
        weights = base if kept == 0 else run_folder / "checkpoints" / f"checkpoint-{kept}"
        if kept < step and weights.is_dir() and not model.is_dir():
            keep(base, model, weights / "model.safetensors")


def keep(folder: Path, model: Path, weights: Path | None = None) -> None:
    """A copy of the model in ``folder``, with other weights of the same names if they are given."""
    partial = model.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("run", *_MEASURED))
    if weights is not None:
        shutil.copy(weights, partial / "model.safetensors")
    partial.rename(model)


def perplexities(bench: Bench) -> list[Found]:
    """Of every model at every window, the same tokens scored; also past what a model was made for.

    The base is what directly fine-tuned models start from: their step 0.
    """
    plan = bench.plan
    words = ["perplexity", "--contexts", ",".join(map(str, plan.contexts)), "--stride",
             str(plan.stride), "--max-windows", str(plan.windows), "--extrapolate"]  # fmt: skip
    words += [w for text in split(CACHE / "speeches").test for w in ("--text", str(text))]
    return [
        {"arm": arm, "step": step, **measured(bench, "perplexity", model, words)}
        for arm, step, model in kept_models(bench)
    ]


def pairs(bench: Bench) -> dict[str, Found]:
    """What the claims lay against each other, each at a window of its own."""
    plan, file = bench.plan, bench.folder / "pairs.json"

    def at(name: str, step: int, context: int) -> At:
        return bench.model(plan.arm(name), step), context

    def step(name: str, last: bool = False) -> int:
        kept = plan.arm(name).kept
        return kept[-1] if last or 200 not in kept else 200

    base, far, short, last = at("direct", 0, L), 8 * L, step("PI x8"), step("PI x8", last=True)
    wanted = {
        f"recovered {name}": (base, at(name, step(name), plan.arm(name).context))
        for name in ("PI x2", "PI x4", "PI x8")
    }
    for name, number in (("short", short), ("last", last)):
        wanted[f"kept {name}"] = base, at("PI x8", number, L)
        wanted[f"kept beside {name}"] = at("trained on", number, L), at("PI x8", number, L)
    for context in plan.contexts[1:]:
        wanted[f"grows to {context}"] = (at("PI x8", last, context // 2),
                                         at("PI x8", last, context))  # fmt: skip
    wanted["direct"] = at("PI x8", short, far), at("direct", step("direct"), far)
    if not file.is_file():
        texts = split(CACHE / "speeches").test
        made = paired_changes(wanted, texts, plan.contexts, stride=plan.stride, most=plan.windows)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(made, indent=1))
        partial.rename(file)
    found: dict[str, Found] = json.loads(file.read_text())
    return found


def seconds(bench: Bench) -> dict[str, int]:
    """What each training took on this machine, since it was gone on with."""
    return {file.stem: int(file.read_text()) for file in sorted(bench.folder.glob("*.seconds"))}


def passkeys(bench: Bench) -> list[Found]:
    """As the paper's table 4: of prompts as long as the window that a model was made for.

    The taught base is asked at its own L, and past it as step 0 of direct fine-tuning.
    """
    asked = [("taught", 0, L, bench.taught)]
    asked += [
        (arm.name, step, arm.context, bench.model(arm, step))
        for arm in bench.plan.taught
        for step in arm.kept
    ]
    found = []
    for name, step, context, model in asked:
        words = ["passkey", "--max-context", str(context), "--trials", str(bench.plan.trials),
                 "--extrapolate"]  # fmt: skip
        made = measured(bench, f"passkey-{context}-{bench.plan.trials}", model, words)
        made = {key: value for key, value in made.items() if key != "answers"}
        found.append({"arm": name, "step": step, "window": context, **made})
    return found


def probes(bench: Bench) -> list[Found]:
    """What the weights say once the config is the base's, which knows of no factor."""
    words = ["probe"]
    words += [w for text in split(CACHE / "speeches").test for w in ("--text", str(text))]
    base = measured(bench, "probe", bench.base, words)
    found = [{"arm": "base", "step": 0, "scale": 1, **base}]
    asked = [
        (arm, step)
        for arm in bench.plan.arms
        for step in (arm.kept if arm.name in PROBED else arm.kept[-1:])
    ]
    for arm, step in asked:
        model = bench.model(arm, step)
        stripped = bench.folder / "stripped" / f"{arm.name}-{step}"
        if not stripped.is_dir():
            stripped.parent.mkdir(exist_ok=True)
            keep(bench.base, stripped, model / "model.safetensors")
        made = measured(bench, "probe", stripped, words)
        found.append({"arm": arm.name, "step": step, "scale": arm.scale, **made})
    return found


def kept_models(bench: Bench) -> list[tuple[str, int, Path]]:
    """(arm, step, folder)."""
    return [
        (arm.name, step, bench.model(arm, step))
        for arm in bench.plan.arms
        for step in arm.kept
        if arm.name not in PROBED
    ]


def measured(bench: Bench, what: str, model: Path, words: Sequence[str]) -> Found:
    """The JSON of a command on one model, kept beside the model."""
    file = model / f"{what}.json"
    if not file.is_file():
        name = model.relative_to(bench.folder)
        say(f"{what} of {name}")
        done = subprocess.run(
            [PI_CONVERT, words[0], str(model), *words[1:], "--json"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        partial = file.with_suffix(".partial")
        partial.write_text(done.stdout)
        partial.rename(file)
    document: Found = json.loads(file.read_text())
    if "models" not in document:
        return document
    (only,) = document["models"]
    return {"scored_tokens": document.get("scored_tokens"), **only}


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
