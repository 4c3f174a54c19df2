"""The training loop: transformers' Trainer, with what a long run needs around it."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler

from converters.errors import ConvertError, OutputError, TrainingError
from pi_convert.finetune.data import Segment, TokenStore, WindowDataset
from pi_convert.finetune.memory import peak_bytes
from pi_convert.finetune.recipe import Recipe

HELD_OUT_AT_MOST = 4
_HELD_OUT_SHARE = 10  # one window in so many
_KEPT_CHECKPOINTS = 2
_TRAINER_STATE = "trainer_state.json"  # transformers writes it last
_MOMENT_BYTES = 8  # AdamW's two, float32, for every weight that is trained
LOG_NAME = "trainer_log.jsonl"
CHECKPOINTS = "checkpoints"  # beside the log


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, for people to read."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    perplexity_below: float | None = None  # of held-out tokens at positions below L
    perplexity_past: float | None = None
    peak_bytes: int = 0  # of the GPU's memory, or of the process


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often a run saves and evaluates, in steps; 0: never before the end."""

    save_every: int = 50
    eval_every: int = 50


@dataclass(frozen=True, slots=True)
class Passes:
    """How a step's windows go through the model: speed and memory, the same sums but for rounding.

    ``windows`` at once on each device; with ``recompute`` (gradient checkpointing) only the layers'
    inputs are kept, and backward computes the rest again: a third more work.
    """

    windows: int = 1
    recompute: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended: ``finished``, or after ``step`` at a person's wish."""

    finished: bool
    step: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is ahead, from the first pass of a run."""

    seconds: float
    steps: int  # left
    peak_bytes: int
    held_out: int  # windows that perplexities are of; 0 where there are too few


Report = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class Told:
    """What is told beside the steps."""

    before: Callable[[float, float | None], None] = lambda *_: None  # perplexities below, past L
    estimate: Callable[[Estimate], None] = lambda _: None
    stopping: Callable[[], None] = lambda: None  # at a Ctrl-C, while the step goes on to its end
    held_out: Callable[[int, int], None] = lambda *_: None  # windows done, of so many


def training_arguments(
    folder: Path, recipe: Recipe, device: str, schedule: Schedule, passes: Passes
) -> Any:
    """Settings of transformers; making them joins the processes of ``torchrun``."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=passes.windows,
        learning_rate=recipe.learning_rate,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        **(_checkpointed_activations() if passes.recompute else {}),
        logging_steps=1,
        save_strategy="steps" if schedule.save_every else "no",
        save_steps=max(1, schedule.save_every),
        save_total_limit=_KEPT_CHECKPOINTS,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_timeout=7 * 24 * 3600,  # one process tokenises while the others wait
    )


def share_batch(arguments: Any, recipe: Recipe, passes: Passes) -> None:
    """Sets how many passes a step has.

    Raises ``ConvertError`` where the global batch cannot be shared by the processes and passes.
    """
    at_once = arguments.world_size * passes.windows
    if recipe.global_batch % at_once:
        processes = f"{arguments.world_size} processes" if arguments.world_size > 1 else "a process"
        each = f" with {passes.windows} at once" if passes.windows > 1 else ""
        raise ConvertError(
            f"a global batch of {recipe.global_batch} windows cannot be shared by"
            f" {processes}{each}",
            hint=f"Give --batch as a multiple of {at_once}.",
        )
    arguments.gradient_accumulation_steps = recipe.global_batch // at_once


def _checkpointed_activations() -> dict[str, object]:
    """The setting under the name that this transformers has; the old one warns in 5.24."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    name = "activation" if "activation_checkpointing" in fields else "gradient"
    return {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


def split_windows(
    segments: Sequence[tuple[Segment, ...]],
) -> tuple[Sequence[tuple[Segment, ...]], Sequence[tuple[Segment, ...]]]:
    """(trained, held out): the last tenth is held out, four windows at most."""
    held_out = min(HELD_OUT_AT_MOST, len(segments) // _HELD_OUT_SHARE)
    return segments[: len(segments) - held_out], segments[len(segments) - held_out :]


def training_order(windows: int, recipe: Recipe) -> list[int]:
    """The window of every sample of the run: shuffled anew each time all were seen.

    Step k trains samples k * batch to (k + 1) * batch, whatever the number of processes.
    """
    random = np.random.default_rng(recipe.seed)
    needed = recipe.steps * recipe.global_batch
    rounds = [random.permutation(windows) for _ in range(math.ceil(needed / windows))]
    return [int(i) for i in np.concatenate(rounds)[:needed]]


class PiTrainer(transformers.Trainer):  # type: ignore[misc]
    """The paper's warm-up, samples in the order that was decided, and a stop at a bad loss."""

    def __init__(
        self, recipe: Recipe, first_pass: Callable[[float], None], **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._recipe = recipe
        self._first_pass: Callable[[float], None] | None = first_pass  # None once it was told
        self.lr_scheduler: Any
        self.model_accepts_loss_kwargs = False  # the loss is a mean over equal windows

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A tenth of the peak, rising for the warm-up, then the peak."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, self._recipe.rate_share
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """The loss of one pass; raises ``TrainingError`` before a bad one moves a weight."""
        started = time.monotonic()
        loss: torch.Tensor = super().training_step(*arguments, **named)
        _require_finite(loss, f"in step {self.state.global_step + 1}")
        if self._first_pass is not None:
            self._first_pass(time.monotonic() - started)
            self._first_pass = None
        return loss

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        folder = Path(self.args.output_dir)
        with _having_room(folder, folder / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*arguments, **named)


class Progress(transformers.TrainerCallback):  # type: ignore[misc]
    """Logs, tells, evaluates, and stops where a person asked for it."""

    def __init__(
        self,
        recipe: Recipe,
        original_context: int,
        schedule: Schedule,
        log: Path,
        tell: Report,
        told: Told,
    ) -> None:
        self._recipe, self._original_context = recipe, original_context
        self._schedule, self._log = schedule, log
        self._tell, self.told = tell, told
        self._held_out: torch.Tensor | None = None
        self._model: Any = None
        self._started = self._evaluated = 0.0
        self._first = 0
        self.stop = threading.Event()

    def hold_out(self, model: Any, windows: torch.Tensor | None) -> None:
        """What perplexity is measured on: (windows, tokens), or nothing."""
        self._model, self._held_out = model, windows

    def first_pass(self, trainer: Any, seconds: float) -> None:
        """Tells what the run will take, from its first forward and backward pass."""
        arguments, state = trainer.args, trainer.state
        steps = arguments.max_steps - state.global_step
        passes = steps * arguments.gradient_accumulation_steps
        if not state.is_world_process_zero or passes < 2:
            return
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.told.estimate(
            Estimate(
                seconds=seconds * passes,
                steps=steps,
                peak_bytes=peak_bytes(arguments.device) + _MOMENT_BYTES * trained,
                held_out=0 if self._held_out is None else len(self._held_out),
            )
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock, and drops log lines of steps that are done again.

        What the interpolated model is like before the first step is told where perplexities are.
        """
        self._started, self._first = time.monotonic(), state.global_step
        done = state.global_step if state.global_step else -1
        if state.is_world_process_zero and self._log.is_file():
            lines = self._log.read_text("utf-8").rpartition("\n")[0].splitlines()  # a kill cuts one
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            self._log.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        if self._held_out is None or not self._schedule.eval_every or state.global_step:
            return
        below, past = self._perplexities(args.device, state.is_world_process_zero)
        if state.is_world_process_zero and below is not None:
            self._append({"step": 0, "tokens": 0, **_held_out(below, past)})
            self.told.before(below, past)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves and stops after a Ctrl-C; every process at the same step."""
        flag = torch.tensor(int(self.stop.is_set()), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item():
            self.stop.set()
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line of the log for a step, and one for people."""
        if not logs or "loss" not in logs:
            return
        step, every = state.global_step, self._schedule.eval_every
        seconds = time.monotonic() - self._started - self._evaluated
        below = past = None
        if self._held_out is not None and every and (step % every == 0 or step == args.max_steps):
            below, past = self._perplexities(args.device, state.is_world_process_zero)
        if not state.is_world_process_zero:
            return
        done = step - self._first
        report = StepReport(
            step=step,
            steps=args.max_steps,
            loss=logs["loss"],
            tokens_per_second=done * self._recipe.step_tokens / seconds,
            seconds_left=(args.max_steps - step) * seconds / done,
            perplexity_below=below,
            perplexity_past=past,
            peak_bytes=peak_bytes(args.device),
        )
        self._append(
            {
                "step": report.step,
                "loss": report.loss,
                "grad_norm": logs.get("grad_norm"),
                "learning_rate": logs["learning_rate"],
                "tokens": report.step * self._recipe.step_tokens,
                "tokens_per_second": report.tokens_per_second,
                **_held_out(below, past),
                "peak_bytes": report.peak_bytes,
            }
        )
        self._tell(report)

    def _append(self, line: Mapping[str, float | None]) -> None:
        room = _having_room(self._log.with_name(CHECKPOINTS), self._log)
        with room, self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _perplexities(self, device: Any, is_main: bool) -> tuple[float | None, float | None]:
        """(below L, past L) over the held-out windows."""
        started, length = time.monotonic(), self._original_context - 1
        windows = self._held_out
        if windows is None:
            return None, None
        found = []
        self._model.eval()
        with torch.no_grad():
            for window in windows:
                found.append(self._model(input_ids=window[None].to(device), per_token=True)["loss"])
                if is_main:
                    self.told.held_out(len(found), len(windows))
        self._model.train()
        losses = torch.cat(found).cpu()
        self._evaluated += time.monotonic() - started
        _require_finite(losses, "of held-out windows")
        below, past = losses[:, :length], losses[:, length:]
        return _perplexity(below), _perplexity(past)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on: tokens, and windows over them."""

    store: TokenStore
    segments: Sequence[tuple[Segment, ...]]


def make_trainer(
    model: Any, corpus: Corpus, recipe: Recipe, arguments: Any, progress: Progress
) -> PiTrainer:
    """The trainer over the windows in the order that they are trained in."""
    trained, held_out = split_windows(corpus.segments)
    order = training_order(len(trained), recipe)
    dataset = WindowDataset(corpus.store, [trained[i] for i in order])
    trainer = PiTrainer(
        recipe,
        lambda seconds: progress.first_pass(trainer, seconds),
        model=model,
        args=arguments,
        train_dataset=dataset,
        callbacks=[progress],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    kept = WindowDataset(corpus.store, held_out)
    windows = [kept[i]["input_ids"] for i in range(len(kept))]
    progress.hold_out(_Wrapped(trainer), torch.stack(windows) if windows else None)
    return trainer


def train(trainer: PiTrainer, progress: Progress, resume_from: Path | None) -> Outcome:
    """Where the run ended; the weights are those of the trainer's model.

    Raises ``TrainingError`` for a loss that is not finite; a checkpoint of the weights that gave it
    is removed, so that the last one is good.
    """
    try:
        with _stopping_at_ctrl_c(progress):
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        step: int = trainer.state.global_step
        finished = step >= trainer.args.max_steps
        if finished:
            _require_finite(_last_loss(trainer), "after the last step")
    except TrainingError as error:
        folder = Path(trainer.args.output_dir)
        shutil.rmtree(folder / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
        good = last_checkpoint(folder)
        kept = f"{good} has the last good weights." if good else "No checkpoint is from before it."
        raise TrainingError(error.message, hint=f"{kept} {error.hint}") from error
    return Outcome(finished, step)


def _last_loss(trainer: PiTrainer) -> torch.Tensor:
    """Of the last window once more: no other step shows what the last one did to the weights."""
    window = trainer.train_dataset[len(trainer.train_dataset) - 1]["input_ids"]
    with torch.no_grad():
        loss: torch.Tensor = _Wrapped(trainer)(input_ids=window[None].to(trainer.args.device))[
            "loss"
        ]
    return loss


def _require_finite(loss: torch.Tensor, when: str) -> None:
    if not torch.isfinite(loss).all():
        raise TrainingError(
            f"the loss became {loss.mean().item()} {when}",
            hint="Start anew with a lower --learning-rate and another --out.",
        )


class _Wrapped:
    """The model as the trainer wrapped it, once it has."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, **inputs: Any) -> Any:
        return self._trainer.model_wrapped(**inputs)

    def eval(self) -> None:
        self._trainer.model_wrapped.eval()

    def train(self) -> None:
        self._trainer.model_wrapped.train()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; one that a kill cut short does not count."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _is_whole(path)
    ]
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _having_room(checkpoints: Path, path: Path) -> Iterator[None]:
    """Raises ``OutputError`` where ``path`` cannot be written, and removes it if a checkpoint.

    Of a full disk torch tells with a ``RuntimeError`` about its file, safetensors with its own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        good = last_checkpoint(checkpoints)
        said, _, _ = str(error).partition("\n")
        raise OutputError(
            f"{path} cannot be written: {said}",
            hint="The disk is full, most likely: once there is room the same command with --resume"
            f" goes on {f'from {good.name}' if good else 'from the start'}.",
        ) from error


@contextmanager
def _stopping_at_ctrl_c(progress: Progress) -> Iterator[None]:
    """The first Ctrl-C lets the step end; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        progress.stop.set()
        signal.signal(signal.SIGINT, before)
        progress.told.stopping()

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _held_out(below: float | None, past: float | None) -> dict[str, float | None]:
    return {"perplexity_below": below, "perplexity_past": past}


def _perplexity(losses: torch.Tensor) -> float | None:
    """Infinity where it is too large for a float."""
    return losses.double().mean().exp().item() if losses.numel() else None
