"""What a run tells of itself: every step, what is ahead, and perplexities of held-out windows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from converters.errors import TrainingError
from pi_convert.finetune.checkpoints import CHECKPOINTS, having_room
from pi_convert.finetune.memory import peak_bytes
from pi_convert.finetune.recipe import Recipe

LOG_NAME = "trainer_log.jsonl"
_MOMENT_BYTES = 8  # AdamW's two, float32, for every weight that is trained
_FORWARD_SHARE = 1 / 3  # of a pass, at most: backward is two forwards, with recomputation three


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
class Estimate:
    """What is ahead, from the first pass of a run."""

    seconds: float
    steps: int  # left
    peak_bytes: int
    held_out: int  # windows that perplexities are of; 0 where there are too few
    evaluations: int  # of them that are ahead


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """The text as it is trained."""

    tokens: int
    windows: int  # to train on
    held_out: int
    times: float  # that each is trained in the whole run


@dataclass(frozen=True, slots=True)
class Rough:
    """What is ahead where even one pass takes minutes: told from shorter ones before it."""

    lengths: tuple[int, int]  # tokens of the passes that were measured
    pass_seconds: float
    seconds: float


Report = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class Told:
    """What is told beside the steps."""

    corpus: Callable[[CorpusSize], None] = lambda _: None
    rough: Callable[[Rough], None] = lambda _: None
    before: Callable[[float, float | None], None] = lambda *_: None  # perplexities below, past L
    estimate: Callable[[Estimate], None] = lambda _: None
    stopping: Callable[[], None] = lambda: None  # at a Ctrl-C, while the step goes on to its end
    held_out: Callable[[int, int], None] = lambda *_: None  # windows done, of so many
    resumed: Callable[[int], None] = lambda _: None  # the step after which a run is gone on with


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
        self._evaluation = 0.0  # seconds that one takes: estimated, then measured
        self._first = 0
        self.stop = threading.Event()

    def hold_out(self, model: Any, windows: torch.Tensor | None) -> None:
        """What perplexity is measured on: (windows, tokens), or nothing."""
        self._model, self._held_out = model, windows

    def first_pass(self, trainer: Any, seconds: float) -> None:
        """Tells what the run will take, from its first forward and backward pass.

        Then what the interpolated model is like before the first step, where perplexities are: no
        weight has moved yet.
        """
        arguments, state = trainer.args, trainer.state
        if state.is_world_process_zero:
            self._estimate(trainer, seconds)
        self._evaluation = self._evaluation_seconds(trainer, seconds)
        if state.global_step == 0 and self._evaluates:
            below, past = self._perplexities(arguments.device, state.is_world_process_zero)
            if state.is_world_process_zero and below is not None:
                self._append({"step": 0, "tokens": 0, **_held_out(below, past)})
                self.told.before(below, past)

    def roughly(self, trainer: Any, lengths: tuple[int, int], seconds: float) -> None:
        """Tells what the run will take, as far as passes of ``lengths`` tokens tell it."""
        passes, evaluations = self._ahead(trainer)
        evaluation = self._evaluation_seconds(trainer, seconds)
        self.told.rough(Rough(lengths, seconds, seconds * passes + evaluation * evaluations))

    def _evaluation_seconds(self, trainer: Any, pass_seconds: float) -> float:
        held_out = 0 if self._held_out is None else len(self._held_out)
        window: float = pass_seconds / trainer.args.per_device_train_batch_size
        return _FORWARD_SHARE * window * held_out

    def _ahead(self, trainer: Any) -> tuple[int, int]:
        """(passes, evaluations)."""
        arguments, step = trainer.args, trainer.state.global_step
        passes = (arguments.max_steps - step) * arguments.gradient_accumulation_steps
        evaluations = self._evaluations_after(step, arguments.max_steps)
        return passes, evaluations + (step == 0 and self._evaluates)

    def _estimate(self, trainer: Any, seconds: float) -> None:
        arguments, step = trainer.args, trainer.state.global_step
        passes, evaluations = self._ahead(trainer)
        if passes + evaluations < 2:
            return
        evaluation = self._evaluation_seconds(trainer, seconds)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.told.estimate(
            Estimate(
                seconds=seconds * passes + evaluation * evaluations,
                steps=arguments.max_steps - step,
                peak_bytes=peak_bytes(arguments.device) + _MOMENT_BYTES * trained,
                held_out=0 if self._held_out is None else len(self._held_out),
                evaluations=evaluations,
            )
        )

    @property
    def _evaluates(self) -> bool:
        return self._held_out is not None and self._schedule.eval_every > 0

    def _is_evaluated(self, step: int, steps: int) -> bool:
        return self._evaluates and (step % self._schedule.eval_every == 0 or step == steps)

    def _evaluations_after(self, step: int, steps: int) -> int:
        return sum(self._is_evaluated(later, steps) for later in range(step + 1, steps + 1))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock, and drops log lines of steps that are done again."""
        self._started, self._first = time.monotonic(), state.global_step
        done = state.global_step if state.global_step else -1
        if state.is_world_process_zero and self._log.is_file():
            lines = self._log.read_text("utf-8").rpartition("\n")[0].splitlines()  # a kill cuts one
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            self._log.write_text("".join(f"{line}\n" for line in kept), "utf-8")

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
        step = state.global_step
        seconds = time.monotonic() - self._started - self._evaluated
        below = past = None
        if self._is_evaluated(step, args.max_steps):
            below, past = self._perplexities(args.device, state.is_world_process_zero)
        if not state.is_world_process_zero:
            return
        done = step - self._first
        report = StepReport(
            step=step,
            steps=args.max_steps,
            loss=logs["loss"],
            tokens_per_second=done * self._recipe.step_tokens / seconds,
            seconds_left=(args.max_steps - step) * seconds / done
            + self._evaluations_after(step, args.max_steps) * self._evaluation,
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
        room = having_room(self._log.with_name(CHECKPOINTS), self._log)
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
        self._evaluation = time.monotonic() - started
        self._evaluated += self._evaluation
        require_finite(losses, "of held-out windows")
        below, past = losses[:, :length], losses[:, length:]
        return _perplexity(below), _perplexity(past)


def require_finite(loss: torch.Tensor, when: str) -> None:
    """Raises ``TrainingError`` for a loss that is not finite."""
    if not torch.isfinite(loss).all():
        raise TrainingError(
            f"the loss became {loss.mean().item()} {when}",
            hint="Start anew with a lower --learning-rate and another --out.",
        )


def _held_out(below: float | None, past: float | None) -> dict[str, float | None]:
    return {"perplexity_below": below, "perplexity_past": past}


def _perplexity(losses: torch.Tensor) -> float | None:
    """Infinity where it is too large for a float."""
    return losses.double().mean().exp().item() if losses.numel() else None
