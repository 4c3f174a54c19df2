"""Passkey retrieval (arXiv 2306.15595, section 3.4.2, after Mohtashami and Jaggi 2023).

Five random digits are told once inside a long filler text, and asked for at its end. One pass over
a prompt and its right answer says both whether greedy decoding gives the digits (each is the first
choice after those before it) and how probable they were.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converters.errors import UnsupportedError
from converters.progress import Progress, silent
from pi_convert.evaluate.cost import Speed
from pi_convert.evaluate.models import Model
from pi_convert.evaluate.statistics import negative_log_likelihood, wilson_interval
from pi_convert.runtimes.base import CHUNK_TOKENS, Runtime, Session, Tokens

DEPTHS = 32
TRIALS = 10
LEAST_RATE = 0.2  # the paper's rule for k_max
DIGITS = 5

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize"
    " them. I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
TOLD = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its right answer behind it; the answer starts at ``answer_from``."""

    depth: int  # 0 is the nearest to the end
    trial: int
    key: str
    distance: int  # tokens from where the passkey is told to the end of the prompt
    tokens: Tokens
    answer_from: int


@dataclass(frozen=True, slots=True)
class PasskeyPlan:
    """Prompts in an order in which each shares as much as it can with the one before."""

    prompts: tuple[Prompt, ...]
    depths: int
    trials: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(prompt.tokens) for prompt in self.prompts)

    @property
    def fed(self) -> int:
        """Tokens to feed, what neighbours share counted once."""
        return sum(stop - start for start, stop in self._parts())

    def seconds(self, speed: Speed) -> float:
        """What it will take."""
        return sum(speed.feeding(start, stop, 0) for start, stop in self._parts())

    def _parts(self) -> list[tuple[int, int]]:
        kept = [0, *(shared(a, b) for a, b in zip(self.prompts, self.prompts[1:], strict=False))]
        return [(k, len(p.tokens) - 1) for k, p in zip(kept, self.prompts, strict=True)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model makes of one prompt."""

    depth: int
    trial: int
    distance: int
    found: bool  # greedy decoding gives the digits
    log_probability: float  # of the right answer, in nats; its tokens all together


@dataclass(frozen=True, slots=True)
class AtDepth:
    """All trials at one distance."""

    distance: int  # tokens
    found: int
    trials: int
    log_probability: float  # mean, in nats

    @property
    def rate(self) -> float:
        """Share of trials in which the digits were found."""
        return self.found / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson_interval(self.found, self.trials)


@dataclass(frozen=True, slots=True)
class Passkey:
    """One model's answers, by depth from the nearest to the farthest."""

    answers: tuple[Answer, ...]
    depths: tuple[AtDepth, ...]
    prompt_tokens: int  # the longest
    seconds: float

    @property
    def k_max(self) -> int:
        """The paper's: the largest distance up to which every rate is at least 20 %; 0: none."""
        return self._reach([depth.rate for depth in self.depths])

    @property
    def k_max_bounds(self) -> tuple[int, int]:
        """``k_max`` by the lower and by the upper ends of the rates' Wilson intervals."""
        low, high = zip(*(depth.interval for depth in self.depths), strict=True)
        return self._reach(low), self._reach(high)

    def _reach(self, rates: Sequence[float]) -> int:
        reach = 0
        for depth, rate in zip(self.depths, rates, strict=True):
            if rate < LEAST_RATE:
                break
            reach = depth.distance
        return reach


def plan_passkey(
    model: Model,
    context_tokens: int,
    *,
    depths: int = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
) -> PasskeyPlan:
    """``depths`` places of the passkey, uniform over ``context_tokens``, ``trials`` keys at each.

    Raises ``UnsupportedError`` for a context too short for the prompt with one filler line.
    """
    most = _most_lines(model, context_tokens)
    for filler in range(most, 0, -1):  # some keys are more tokens than the one that was tried
        plan = _plan(model, filler, depths, trials, seed)
        if plan.longest <= context_tokens:
            return plan
    raise _too_short(context_tokens, plan.longest)


def _plan(model: Model, filler: int, depths: int, trials: int, seed: int) -> PasskeyPlan:
    """Every prompt with ``filler`` lines around its key."""
    behind = sorted({max(1, round(filler * (i + 1) / depths)) for i in range(depths)})
    draw = random.Random(seed)
    prompts = []
    for depth, lines in enumerate(behind):
        head = _head(model, filler - lines)
        for trial in range(trials):
            key = "".join(draw.choices("0123456789", k=DIGITS))
            prompts.append(_prompt(model, head, key, lines, (depth, trial)))
    prompts.sort(key=lambda p: (-p.depth, p.trial))
    return PasskeyPlan(tuple(prompts), len(behind), trials)


def within_budget(
    model: Model,
    context_tokens: int,
    plan: PasskeyPlan,
    speed: Speed,
    seconds: float,
    *,
    seed: int = 0,
) -> PasskeyPlan:
    """The plan with fewer trials, then fewer depths, until it takes at most ``seconds``.

    One trial at two depths is the least.
    """
    depths, trials = plan.depths, plan.trials
    while plan.seconds(speed) > seconds and (trials > 1 or depths > 2):
        if trials > 1:
            trials = max(1, min(trials - 1, int(trials * seconds / plan.seconds(speed))))
        else:
            depths = max(2, min(depths - 1, int(depths * seconds / plan.seconds(speed))))
        plan = plan_passkey(model, context_tokens, depths=depths, trials=trials, seed=seed)
    return plan


def measure_passkey(
    runtime: Runtime, plan: PasskeyPlan, progress: Progress = silent, name: str = ""
) -> Passkey:
    """Runs every prompt of the plan. Raises ``ConvertError`` from the runtime."""
    started, answers, total, done = time.monotonic(), [], plan.fed, 0
    before: Prompt | None = None
    with runtime.open_session(plan.longest) as session:
        for prompt in plan.prompts:
            start = session.keep(shared(before, prompt) if before else 0)
            answers.append(_answer(session, prompt, start))
            before, done = prompt, done + len(prompt.tokens) - 1 - start
            progress(f"{name}passkeys", min(done, total), total)
    return Passkey(tuple(answers), _by_depth(answers), plan.longest, time.monotonic() - started)


def shared(a: Prompt, b: Prompt) -> int:
    """How many tokens of ``b`` a session that was fed ``a`` need not be fed again.

    The last of the prompt is always fed, since its logits are wanted.
    """
    count = min(a.answer_from, b.answer_from) - 1
    (differing,) = np.nonzero(a.tokens[:count] != b.tokens[:count])
    return int(differing[0]) if len(differing) else count


def _answer(session: Session, prompt: Prompt, start: int) -> Answer:
    tokens, first = prompt.tokens, prompt.answer_from - 1
    for at in range(start, first, CHUNK_TOKENS):
        part = np.ascontiguousarray(tokens[at : min(at + CHUNK_TOKENS, first)])
        session.feed(part, position=at, logits=False)
    logits = session.feed(np.ascontiguousarray(tokens[first:-1]), position=first, logits=True)
    if logits is None:
        raise ValueError("a session gave no logits")
    right = tokens[first + 1 :]
    return Answer(
        prompt.depth,
        prompt.trial,
        prompt.distance,
        bool((logits.argmax(axis=1) == right).all()),
        -float(negative_log_likelihood(logits, right).sum()),
    )


def _by_depth(answers: Sequence[Answer]) -> tuple[AtDepth, ...]:
    out = []
    for depth in sorted({answer.depth for answer in answers}):
        here = [answer for answer in answers if answer.depth == depth]
        out.append(
            AtDepth(
                distance=max(answer.distance for answer in here),
                found=sum(answer.found for answer in here),
                trials=len(here),
                log_probability=float(np.mean([answer.log_probability for answer in here])),
            )
        )
    return tuple(out)


def _most_lines(model: Model, context_tokens: int) -> int:
    """How many lines of filler the prompt and its answer leave room for, by one key."""
    head, key = _head(model, 0), "0" * DIGITS
    one, two = (len(_prompt(model, head, key, n, (0, 0)).tokens) for n in (1, 2))
    if one > context_tokens:
        raise _too_short(context_tokens, one)
    return 1 + (context_tokens - one) // (two - one)


def _too_short(context_tokens: int, least: int) -> UnsupportedError:
    return UnsupportedError(
        f"{context_tokens:,} tokens hold no passkey prompt, which has {least} at least",
        hint="Give a larger --max-context.",
    )


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the passkey."""

    text: str
    tokens: int


def _head(model: Model, lines: int) -> _Head:
    text = TASK + FILLER * lines
    return _Head(text, len(model.bos) + len(model.encode(text)))


def _prompt(model: Model, head: _Head, key: str, lines: int, which: tuple[int, int]) -> Prompt:
    """The prompt with ``lines`` of filler behind the passkey; ``which`` is (depth, trial)."""
    asked = head.text + TOLD.format(key=key) + FILLER * lines + QUESTION
    prompt = [*model.bos, *model.encode(asked)]
    whole = [*model.bos, *model.encode(f"{asked} {key}")]
    same = 0
    while same < len(prompt) and prompt[same] == whole[same]:
        same += 1
    tokens = np.array(whole, dtype=np.int32)
    return Prompt(*which, key, same - head.tokens, tokens, same)
