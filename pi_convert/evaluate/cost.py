"""What a measurement will cost, from chunks that were measured first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi_convert.evaluate.models import Model, Sizes, Workbench
from pi_convert.evaluate.windows import Window, scored_chunk_alone
from pi_convert.evaluate.wording import duration
from pi_convert.runtimes.base import CHUNK_TOKENS, Runtime


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
    """Feeds three chunks: the first warms up, the second is timed, the third with logits."""
    count = min(CHUNK_TOKENS, model.held_context or CHUNK_TOKENS)
    scored = min(count, scored_chunk_alone(runtime.vocabulary))
    tokens = np.arange(count, dtype=np.int32) % runtime.vocabulary
    seconds = []
    with runtime.open_session(count) as session:
        for part, logits in ((tokens, False), (tokens, False), (tokens[:scored], True)):
            session.keep(0)
            started = time.perf_counter()
            session.feed(part, position=0, logits=logits)
            seconds.append((time.perf_counter() - started) / len(part))
    plain = seconds[1]
    return Speed(plain, max(0.0, seconds[2] - plain), plain * _attention_share(model.sizes))


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
