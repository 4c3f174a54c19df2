"""What a measurement will cost, from chunks that were measured first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi_convert.evaluate.models import Model, Sizes, Workbench
from pi_convert.evaluate.windows import Window, scored_chunk
from pi_convert.evaluate.wording import duration
from pi_convert.runtimes.base import CHUNK_TOKENS, Runtime

_WARM_UP_TOKENS = 32
_TIMED_SECONDS = 0.15


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured at the start of a sequence, where attention costs next to nothing."""

    token_seconds: float
    scored_seconds: float  # more for a token whose logits are wanted
    attention_seconds: float  # more for each token already in the cache

    def of(self, windows: Sequence[Window]) -> float:
        """Seconds that ``windows`` will take, each from an empty cache."""
        return sum(self.feeding(0, window.fed, window.scored) for window in windows)

    def feeding(self, start: int, stop: int, scored: int) -> float:
        """Seconds for tokens ``start`` to ``stop`` of a sequence, ``scored`` with logits."""
        attended = (stop**2 - start**2) / 2
        return (
            (stop - start) * self.token_seconds
            + attended * self.attention_seconds
            + scored * self.scored_seconds
        )


def measure_speed(model: Model, runtime: Runtime) -> Speed:
    """Feeds a few tokens to warm up, then what takes ``_TIMED_SECONDS``, then some scored ones.

    A chunk at most each time, so that a slow model's estimate does not take minutes itself.
    """
    most = min(CHUNK_TOKENS, model.held_context or CHUNK_TOKENS)
    with runtime.open_session(most) as session:

        def feed(count: int, *, logits: bool) -> float:
            session.keep(0)
            tokens = np.arange(count, dtype=np.int32) % runtime.vocabulary
            started = time.perf_counter()
            session.feed(tokens, position=0, logits=logits)
            return (time.perf_counter() - started) / count

        def affordable(token_seconds: float, least: int, limit: int) -> int:
            count = max(least, int(_TIMED_SECONDS / max(token_seconds, 1e-9)))
            return min(count, limit, most)

        feed(min(_WARM_UP_TOKENS, most), logits=False)  # the weights come from the disk
        rough = feed(min(_WARM_UP_TOKENS, most), logits=False)
        plain = feed(affordable(rough, 2 * _WARM_UP_TOKENS, CHUNK_TOKENS), logits=False)
        limit = scored_chunk(runtime.vocabulary)
        scored = feed(affordable(plain, _WARM_UP_TOKENS, limit), logits=True)
    return Speed(plain, max(0.0, scored - plain), plain * _attention_share(model.sizes))


def cost_text(bench: Workbench, models: Sequence[Model], windows: Sequence[Window]) -> str:
    """What running ``windows`` in every model will take, each model's speed measured first."""
    fed, seconds, parts = sum(window.fed for window in windows), 0.0, []
    for model in models:
        speed = measure_speed(model, bench.runtime(model))
        seconds += speed.of(windows)
        parts.append(f"{model.name} at {1 / speed.token_seconds:,.0f} tokens/s and less")
    return f"about {duration(seconds)}: {fed:,} tokens through {', '.join(parts)}"


def _attention_share(sizes: Sizes) -> float:
    """A cached token's multiplications over a weight pass's: queries x keys and weights x values.

    Multiplications count alike here; in truth attention's are slower, so long windows take longer.
    """
    return 2 * sizes.attention_width / max(1, sizes.parameters)
