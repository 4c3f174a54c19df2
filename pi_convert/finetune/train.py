"""The training loop: transformers' Trainer, with what a long run needs around it."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import SequentialSampler

from converters.errors import ConvertError, TrainingError
from pi_convert.finetune.checkpoints import having_room, last_checkpoint
from pi_convert.finetune.data import Segment, TokenStore, WindowDataset
from pi_convert.finetune.progress import CorpusSize, Progress, Schedule, require_finite
from pi_convert.finetune.recipe import Recipe

HELD_OUT_AT_MOST = 4
_HELD_OUT_SHARE = 10  # one window in so many
_KEPT_CHECKPOINTS = 2
ROUGH_BEYOND = 8192  # tokens of a window: on a CPU its first pass takes minutes, later ones hours
ROUGH_TOKENS = 512, 2048


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
        processes, each = arguments.world_size, f"--micro-batch {passes.windows}"
        shared = f"{processes} processes{f' with {each}' * (passes.windows > 1)}"
        raise ConvertError(
            f"--batch {recipe.global_batch} (windows a step) cannot be shared by"
            f" {shared if processes > 1 else each}",
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

    def __init__(self, recipe: Recipe, progress: Progress, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._recipe = recipe
        self._untold: Progress | None = progress  # None once the first pass was told
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
        if self._untold is not None and _is_slow(self.args, self._recipe):
            seconds = _rough_seconds(*arguments[:2])
            self._untold.roughly(self, ROUGH_TOKENS, seconds)
        started = time.monotonic()
        loss: torch.Tensor = super().training_step(*arguments, **named)
        require_finite(loss, f"in step {self.state.global_step + 1}")
        if self._untold is not None:
            self._untold.first_pass(self, time.monotonic() - started)
            self._untold = None
        return loss

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        folder = Path(self.args.output_dir)
        with having_room(folder, folder / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*arguments, **named)


def _is_slow(arguments: Any, recipe: Recipe) -> bool:
    alone_on_cpu = arguments.device.type == "cpu" and arguments.world_size == 1
    return alone_on_cpu and recipe.window > ROUGH_BEYOND


def _rough_seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """What a pass of ``inputs`` will take, from its first tokens alone.

    Leaves no gradient behind, and the random numbers as they were.
    """
    ids = inputs["input_ids"]
    short, long = ROUGH_TOKENS
    seconds = []
    model.train()  # or nothing is recomputed, a quarter of a pass, and dropout is off
    with torch.random.fork_rng(devices=[]):
        for length in (short, short, long):  # what is made once is made in the first
            started = time.monotonic()
            model(input_ids=ids[:, :length])["loss"].backward()
            seconds.append(time.monotonic() - started)
    model.zero_grad()
    return pass_seconds((short, seconds[1]), (long, seconds[2]), ids.shape[1])


def pass_seconds(short: tuple[int, float], long: tuple[int, float], tokens: int) -> float:
    """Of a pass of so many tokens, from two that are (tokens, seconds).

    The weights' work grows with the tokens, attention's with their square: a n + b n^2.
    """
    (n, s), (m, t) = short, long
    square = max(0.0, (t / m - s / n) / (m - n))
    return tokens * (t / m + square * (tokens - m))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens, and windows over them: to train on, and held out."""

    store: TokenStore
    trained: Sequence[tuple[Segment, ...]]
    held_out: Sequence[tuple[Segment, ...]]


def make_trainer(
    model: Any, corpus: Corpus, recipe: Recipe, arguments: Any, progress: Progress
) -> PiTrainer:
    """The trainer over the windows in the order that they are trained in."""
    trained, held_out = corpus.trained, corpus.held_out
    order = training_order(len(trained), recipe)
    if arguments.process_index == 0:
        size = CorpusSize(
            corpus.store.tokens, len(trained), len(held_out), len(order) / len(trained)
        )
        progress.told.corpus(size)
    dataset = WindowDataset(corpus.store, [trained[i] for i in order])
    trainer = PiTrainer(
        recipe,
        progress,
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
            require_finite(_last_loss(trainer), "after the last step")
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
