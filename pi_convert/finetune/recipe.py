"""What a run trains with: three presets, and the record that stays with the weights.

Preset ``paper`` is section 3.1 of arXiv 2306.15595: AdamW with betas (0.9, 0.95) and no weight
decay, 20 warm-up steps from a tenth of the peak, next-token loss. ``lora`` is LongLoRA's finding
(arXiv 2309.12307): adapters on attention, norms and embeddings trained in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from converters.errors import ConvertError
from converters.rope import RopeParameters

LARGE_MODEL_PARAMETERS = 30_000_000_000  # the paper's 33B and 65B take half the rate
WARMUP_START = 0.1  # of the peak
TRAINED_BESIDE_ADAPTERS = ("embed_tokens", "norm")  # parts of names; in full, with preset lora
RECORD_SCHEMA = 1

PresetName = Literal["paper", "lora", "quick"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings that decide a run's weights; equal recipes and data give equal runs."""

    preset: PresetName
    scale: float  # what the source was interpolated by
    window: int  # trained length in tokens
    steps: int
    global_batch: int  # windows a step, over all processes
    learning_rate: float  # the peak
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    lora_rank: int = 0  # 0: every weight is trained
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    allow_short_window: bool = False

    @property
    def step_tokens(self) -> int:
        """Tokens that one step trains on."""
        return self.global_batch * self.window

    def rate_share(self, step: int) -> float:
        """The share of the peak rate at ``step`` (from 0): a tenth, rising over the warm-up."""
        if step >= self.warmup_steps:
            return 1.0
        return WARMUP_START + (1 - WARMUP_START) * step / self.warmup_steps


@dataclass(frozen=True, slots=True)
class Choices:
    """What a command line said; None takes the preset's."""

    steps: int | None = None
    window: int | None = None
    global_batch: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    allow_short_window: bool = False


def choose_recipe(
    preset: PresetName, scale: float, rope: RopeParameters, parameters: int, choices: Choices
) -> Recipe:
    """The recipe for a model of ``parameters`` whose interpolated RoPE is ``rope``.

    Raises ``ConvertError`` for a window past L', and for one that trains no position past L.
    """
    rate = 1e-5 if parameters >= LARGE_MODEL_PARAMETERS else 2e-5
    steps, batch = {"paper": (1000, 64), "lora": (1000, 64), "quick": (200, 4)}[preset]
    recipe = Recipe(
        preset=preset,
        scale=scale,
        window=rope.context if choices.window is None else choices.window,
        steps=steps if choices.steps is None else choices.steps,
        global_batch=batch if choices.global_batch is None else choices.global_batch,
        learning_rate=rate if choices.learning_rate is None else choices.learning_rate,
        seed=choices.seed,
        lora_rank=8 if preset == "lora" else 0,
        allow_short_window=choices.allow_short_window,
    )
    _check_window(recipe, rope)
    return recipe


def _check_window(recipe: Recipe, rope: RopeParameters) -> None:
    if recipe.window > rope.context:
        raise ConvertError(
            f"a window of {recipe.window:,} tokens is longer than L' = {rope.context:,}",
            hint=f"Give --window {rope.context} or less, or a larger --scale.",
        )
    longest = f"--window {rope.original_context + 2} or more"
    if rope.context <= rope.original_context:
        longest = "a larger --scale"  # no window of it reaches past L
    # The last token of a window is only predicted.
    if recipe.window - 1 <= rope.original_context and not recipe.allow_short_window:
        raise ConvertError(
            f"a window of {recipe.window:,} tokens trains no position past L ="
            f" {rope.original_context:,}, which is what fine-tuning after interpolation is for",
            hint=f"Give {longest}, or --allow-short-window, which is recorded.",
        )


def run_record(
    recipe: Recipe,
    rope: RopeParameters,
    source: Mapping[str, object],
    data: Mapping[str, object],
) -> dict[str, object]:
    """What is written beside the weights: L, s, L', the recipe, from what and on what it was
    trained.
    """
    buckets = position_buckets(recipe, rope)
    return {
        "schema_version": RECORD_SCHEMA,
        "original_context": rope.original_context,
        "factor": rope.factor,
        "context": rope.context,
        "source": dict(source),
        "recipe": dataclasses.asdict(recipe) | {"betas": list(recipe.betas)},
        "data": dict(data),
        "tokens_by_position": [
            {"from": start, "to": stop, "tokens": tokens} for start, stop, tokens in buckets
        ],
    }


def position_buckets(recipe: Recipe, rope: RopeParameters) -> list[tuple[int, int, int]]:
    """(first position, position after the last, tokens trained there): up to L, 2L, 4L, ... L'.

    Every window trains each of its positions once but the last, which is only predicted.
    """
    windows = recipe.steps * recipe.global_batch
    found, start, stop = [], 0, rope.original_context
    while start < rope.context:
        stop = min(stop, rope.context)
        width = max(0, min(stop, recipe.window - 1) - start)
        found.append((start, stop, width * windows))
        start, stop = stop, 2 * stop
    return found
