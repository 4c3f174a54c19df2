"""What the presets train with, and which windows are refused."""

from __future__ import annotations

import pytest

from converters.errors import ConvertError
from converters.rope import RopeParameters
from pi_convert.finetune.recipe import Choices, choose_recipe, position_buckets

ROPE = RopeParameters(10000.0, 64, original_context=2048, context=8192, factor=4.0)


def test_the_papers_numbers() -> None:
    recipe = choose_recipe("paper", 4, ROPE, 7_000_000_000, Choices())
    assert (recipe.steps, recipe.global_batch, recipe.window) == (1000, 64, 8192)
    assert (recipe.betas, recipe.weight_decay, recipe.learning_rate) == ((0.9, 0.95), 0.0, 2e-5)
    assert recipe.rate_share(0) == pytest.approx(0.1)
    assert recipe.rate_share(10) == pytest.approx(0.55)
    assert recipe.rate_share(20) == recipe.rate_share(999) == 1.0
    assert choose_recipe("paper", 4, ROPE, 33_000_000_000, Choices()).learning_rate == 1e-5


# Of 2,049 tokens the last stands past L, and is only predicted.
@pytest.mark.parametrize(("window", "said"), [(2049, "no position past L"), (8193, "longer than")])
def test_windows_that_make_no_sense_are_refused(window: int, said: str) -> None:
    with pytest.raises(ConvertError, match=said):
        choose_recipe("quick", 4, ROPE, 1, Choices(window=window))


def test_a_short_window_is_recorded_and_trains_nothing_past_it() -> None:
    choices = Choices(window=1024, steps=10, global_batch=2, allow_short_window=True)
    recipe = choose_recipe("quick", 4, ROPE, 1, choices)
    assert recipe.allow_short_window
    assert position_buckets(recipe, ROPE) == [
        (0, 2048, 20 * 1023),
        (2048, 4096, 0),
        (4096, 8192, 0),
    ]
