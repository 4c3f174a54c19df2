"""``pi-convert finetune``."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pi_convert.commands.options import (
    PATH,
    FiniteRange,
    model_argument,
    original_context_option,
    revision_option,
    scale_option,
)
from pi_convert.report.console import size, tell_line

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from pi_convert.finetune.progress import CorpusSize, Estimate, Rough, Schedule, StepReport
    from pi_convert.finetune.run import Finetuned, FinetuneRequest

PRESETS = ("paper", "lora", "quick")
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


@click.command()
@model_argument
@scale_option(
    required=False,
    help="Factor s that the context is extended by. Not needed for a model that has one.",
)
@click.option(
    "--text",
    "texts",
    type=PATH,
    multiple=True,
    required=True,
    help="Text, Markdown, JSONL, Parquet or a `datasets` folder, or a folder of them; may be"
    " repeated. JSONL and Parquet hold the text under `text`.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Default: the preset's; 1000, quick 200.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help="Trained length in tokens. Default: L', the extended context.",
)
@click.option(
    "--allow-short-window",
    is_flag=True,
    help="Let --window train no position past L; it is recorded.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="quick",
    help="paper: every weight, 64 windows a step. lora: adapters on attention, norms and"
    " embeddings, 64 windows. quick (default): every weight, 4 windows.",
)
@click.option(
    "--batch",
    "global_batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows a step, over all processes. Default: the preset's.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Windows that a process takes at once: faster where they are short. Default: 1.",
)
@click.option(
    "--no-gradient-checkpointing",
    is_flag=True,
    help="Keep what backward needs instead of computing it again: a quarter less time, many times"
    " the memory.",
)
@click.option(
    "--learning-rate",
    type=FiniteRange(min=0, min_open=True),
    metavar="R",
    help="The peak. Default: 2e-5; 1e-5 from 30B parameters.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),  # numpy takes no more
    default=0,
    metavar="N",
    help="Default: 0.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=50,
    metavar="N",
    help="Steps between checkpoints to resume from. Default: 50.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=0),
    default=50,
    metavar="N",
    help="Steps between perplexities of held-out windows, below and past L; 0: none. Default: 50.",
)
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    help="cuda trains in bfloat16 over float32 weights. Default: cpu.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core.")
@click.option("--out", type=PATH, help="New folder to write to. Default: NAME-finetuned-PI<S>.")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out from its last checkpoint."
)
@original_context_option
@revision_option
def command(
    model: str | None,
    scale: float | None,
    original_context: int | None,
    revision: str | None,
    **flags: Any,
) -> int:
    """Fine-tune a model after Position Interpolation.

    MODEL's RoPE is interpolated by S before it is built, then it is trained on windows of the text
    (arXiv 2306.15595, section 3). What is written is a folder whose config every reader takes for
    the same RoPE, with the recipe recorded; `export` and `verify` take it as it is, without
    --scale. The same command runs under `torchrun` and `accelerate launch`.

    \b
    Examples:
      pi-convert finetune --scale 2 --text ./books --window 12288 --steps 30
      pi-convert finetune ./llama --scale 8 --text ./pile --preset paper --device cuda
      pi-convert finetune ./llama --scale 8 --text ./pile --preset paper --device cuda --resume
    """
    from converters.sources import open_checkpoint
    from converters.sources.huggingface import RUN
    from pi_convert.commands._scale import chosen_scale, note_second_factor
    from pi_convert.defaults import resolve_model
    from pi_convert.finetune.processes import OtherProcessError, said_once
    from pi_convert.report.console import emit

    is_main = os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch
    source = None
    try:
        with said_once():
            resolved = resolve_model(model)
            if is_main:
                emit(resolved.announcement)
            source = open_checkpoint(
                resolved.reference, revision=revision, original_context=original_context
            )
            chosen = chosen_scale(scale, source)
            if is_main:
                note_second_factor(scale, source)
            done = run_finetune(source, chosen, **flags)
    except OtherProcessError:
        return EXIT_FAILURE
    except KeyboardInterrupt:  # the first one lets a step end; before the first step there is none
        if source is None:
            raise
        out = flags["out"] or default_folder(source, 1.0 if scale is None else scale)
        if not (out / RUN).is_dir():
            raise
        click.echo(f"interrupted; {out} goes on with the same command and --resume", err=True)
        return EXIT_INTERRUPTED
    if not done.outcome.finished:
        click.echo(
            f"stopped after step {done.outcome.step}; saved."
            " Go on with the same command and --resume.",
            err=True,
        )
        return EXIT_INTERRUPTED
    if is_main:
        emit(_written(done))
    return 0


def run_finetune(source: Checkpoint, scale: float, **flags: Any) -> Finetuned:
    """The run that the flags of ``command`` ask for, told on stderr."""
    from pi_convert.finetune.documents import passed_over, text_files
    from pi_convert.finetune.recipe import Choices, choose_recipe
    from pi_convert.finetune.run import FinetuneRequest, finetune, require_libraries, require_own
    from pi_convert.report.console import progress

    target = source.interpolate(scale)
    names = ("steps", "window", "global_batch", "learning_rate", "seed", "allow_short_window")
    recipe = choose_recipe(
        flags["preset"],
        scale,
        target.rope,
        source.parameters,
        Choices(**{name: flags[name] for name in names}),
    )
    out = flags["out"] or default_folder(source, scale)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # what is cheap to tell comes first
        require_own(out, recipe, resume=flags["resume"])
        text_files(flags["texts"], out)
    require_libraries(flags["device"])
    if flags["threads"] is not None:
        from pi_convert.runtimes.pytorch import limit_threads

        limit_threads(flags["threads"])
    from pi_convert.finetune.progress import Schedule, Told
    from pi_convert.finetune.train import Passes

    request = FinetuneRequest(
        source=source,
        recipe=recipe,
        texts=flags["texts"],
        out=out,
        schedule=Schedule(flags["save_every"], flags["eval_every"]),
        passes=Passes(flags["micro_batch"], recompute=not flags["no_gradient_checkpointing"]),
        device=flags["device"],
        resume=flags["resume"],
    )
    _require_memory(request)
    teller, started = _Teller(), time.monotonic()
    try:
        with progress() as tell:
            told = Told(
                corpus=lambda size: _corpus(size, recipe.window, passed_over(flags["texts"], out)),
                rough=_rough,
                before=_before,
                estimate=_Estimated(request.schedule),
                stopping=_stopping,
                held_out=lambda done, windows: tell("measuring held-out windows", done, windows),
                resumed=lambda step: _resumed(step, recipe.steps),
            )
            return finetune(request, teller, tell, told)
    finally:  # a run that ends in an error or at a second Ctrl-C has its losses too
        if teller.first is not None:
            _draw(request, teller.first, time.monotonic() - started)


def _draw(request: FinetuneRequest, first: int, seconds: float) -> None:
    """The page of losses; where it cannot be written, how the run ended matters more."""
    from converters.errors import ConvertError
    from converters.sources.huggingface import RUN
    from pi_convert.finetune.progress import LOG_NAME
    from pi_convert.report.finetune import LossPlot, write_loss_plot
    from pi_convert.report.provenance import environment

    recipe = request.recipe
    settings = {
        "device": request.device,
        "preset": recipe.preset,
        "scale": f"{recipe.scale:g}",
        "window": recipe.window,
        "windows a step": recipe.global_batch,
        "peak learning rate": f"{recipe.learning_rate:g}",
        "seed": recipe.seed,
    }
    plot = LossPlot(
        log=request.out / RUN / LOG_NAME,
        name=request.target.artifact_name,
        steps=recipe.steps,
        first=first,
        seconds=seconds,
        environment=environment(["torch"], settings),
    )
    try:
        click.echo(f"losses: {write_loss_plot(plot)}", err=True)
    except ConvertError as error:
        click.echo(f"losses were not drawn: {error.message}", err=True)


def as_tuned(source: Checkpoint) -> Checkpoint:
    """The checkpoint under the name that it and its exports have once it is tuned."""
    from converters.sources.card import tuned_name

    card = replace(source.card, name=tuned_name(source.card.name))
    return replace(source, card=card)


def default_folder(source: Checkpoint, scale: float) -> Path:
    """Of a run of ``source`` interpolated by ``scale``."""
    return Path(as_tuned(source).interpolate(scale).artifact_name)


def tuned_source(
    source: Checkpoint, scale: float, texts: tuple[Path, ...], steps: int | None, out: Path
) -> Checkpoint:
    """``source`` interpolated and fine-tuned with preset quick, as the folder it is written to.

    A run of the same settings that was stopped is gone on with; a finished one is refused. Raises
    ``click.Abort`` where it is stopped again.
    """
    from converters.sources import open_checkpoint
    from converters.sources.huggingface import RUN

    folder = out / default_folder(source, scale)
    flags = dict.fromkeys(("window", "global_batch", "learning_rate"))
    schedule = {"save_every": 50, "eval_every": 50, "seed": 0, "allow_short_window": False}
    passes = {"micro_batch": 1, "no_gradient_checkpointing": False}
    done = run_finetune(
        source,
        scale,
        preset="quick",
        steps=steps,
        texts=texts,
        out=folder,
        device="cpu",
        threads=None,
        resume=(folder / RUN).is_dir(),
        **flags,
        **schedule,
        **passes,
    )
    if not done.outcome.finished:
        click.echo(f"stopped after step {done.outcome.step}; the same command goes on.", err=True)
        raise click.Abort
    return open_checkpoint(str(folder))


class _Teller:
    """One line a step on stderr; after the first, what the whole run will take."""

    def __init__(self) -> None:
        self.first: int | None = None  # step that was told; none in processes that do not tell

    def __call__(self, report: StepReport) -> None:
        if self.first is None:
            self.first = report.step
        line = (
            f"step {report.step:,} of {report.steps:,}: loss {report.loss:.4f},"
            f" {report.tokens_per_second:,.0f} tokens/s, {_duration(report.seconds_left)} left"
        )
        if report.perplexity_below is not None:
            line += f"; {_held_out(report.perplexity_below, report.perplexity_past)}"
        tell_line(line)


def _resumed(step: int, steps: int) -> None:
    if step:
        tell_line(f"going on after step {step:,} of {steps:,}")
    else:
        tell_line("no checkpoint yet: the run starts at its first step")


def _corpus(size: CorpusSize, window: int, others: list[Path]) -> None:
    each = f"{size.times:,.1f}".removesuffix(".0")
    often = f"each is trained {each} times" if size.times > 1 else f"{size.times:.0%} are trained"
    held = f", and {size.held_out} held out" if size.held_out else ""
    tell_line(
        f"text: {size.tokens:,} tokens; {size.windows:,} window{'s'[: size.windows != 1]} of"
        f" {window:,} to train on{held}; {often}"
    )
    if others:
        named = ", ".join(path.name for path in others[:3])
        more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
        tell_line(f"in the folders, not read as text: {named}{more}")


def _rough(found: Rough) -> None:
    short, long = found.lengths
    tell_line(
        f"roughly, from passes of {short:,} and {long:,} tokens: {_duration(found.pass_seconds)} a"
        f" pass, {_duration(found.seconds)} in all; the first pass tells more"
    )


def _before(below: float, past: float | None) -> None:
    tell_line(f"before the first step: {_held_out(below, past)}")


def _held_out(below: float, past: float | None) -> str:
    further = "" if past is None else f", {past:.2f} past it"
    return f"held-out perplexity {below:.2f} below L{further}"


def _stopping() -> None:
    tell_line("the step goes on to its end, then it is saved; Ctrl-C again stops at once")


@dataclass(frozen=True, slots=True)
class _Estimated:
    """What the whole run will take, before the first step is over."""

    schedule: Schedule

    def __call__(self, estimate: Estimate) -> None:
        perplexities = ""
        if times := estimate.evaluations:
            perplexities = f" and {times:,} measurement{'s'[: times != 1]} of held-out perplexity"
        tell_line(
            f"estimate: {_duration(estimate.seconds)} for {estimate.steps:,}"
            f" step{'s'[: estimate.steps != 1]}{perplexities}, {size(estimate.peak_bytes)} of"
            " memory at the peak, from one measured pass. Ctrl-C saves and stops."
        )
        if self.schedule.eval_every and not estimate.held_out:
            tell_line("fewer than 10 windows of text: none is held out, so no perplexity is told")


def _require_memory(request: FinetuneRequest) -> None:
    """Raises ``EnvironmentNotReadyError`` where this machine's memory cannot hold the run.

    Weights, gradients and two moments are float32; each layer's input is kept for every token.
    Adapters themselves count as nothing.
    Not known of a GPU and of several processes, which may share the weights.
    """
    from converters.errors import EnvironmentNotReadyError
    from pi_convert.finetune.recipe import TRAINED_BESIDE_ADAPTERS
    from pi_convert.report.runlines import available_memory_bytes

    if request.device != "cpu" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    recipe, hparams = request.recipe, request.source.hparams
    trained = sum(
        tensor.elements
        for name, tensor in request.source.tensors.items()
        if not recipe.lora_rank or any(part in name for part in TRAINED_BESIDE_ADAPTERS)
    )
    inputs = 4 * recipe.window * request.passes.windows * hparams.hidden_size * hparams.layers
    needed = 4 * request.source.parameters + 3 * 4 * trained + inputs
    free = available_memory_bytes()
    if needed > free:
        raise EnvironmentNotReadyError(
            f"training {request.source.parameters:,} weights on windows of {recipe.window:,} tokens"
            f" needs more than {size(needed)} of memory, and {size(free)} are free",
            hint="Free some memory, or give `pi-convert finetune` a shorter --window or --preset"
            " lora.",
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _written(done: Finetuned) -> str:
    from pi_convert.report.console import table

    buckets = done.record["tokens_by_position"]
    rows = [
        [f"{b['from']:,} to {b['to'] - 1:,}", f"{b['tokens']:,}"]
        for b in buckets  # type: ignore[attr-defined]
    ]
    return "\n".join(
        [
            f"wrote {done.out}",
            table(rows, header=("positions", "tokens trained")),
            f"next: pi-convert export {shlex.quote(str(done.out))} --to gguf",
        ]
    )
