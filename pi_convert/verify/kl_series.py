"""Link 4's KL by position, for reports: the artifact and every control on its window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from converters.rope import RopeParameters
from pi_convert.evaluate.statistics import Comparison
from pi_convert.evaluate.windows import Window
from pi_convert.verify.verdict import Series

if TYPE_CHECKING:
    from pi_convert.verify.execution import Execution, Windows

_BINS = 32


def kl_series(rope: RopeParameters, execution: Execution, windows: Windows) -> tuple[Series, ...]:
    """Mean KL in up to 32 bins of each window."""
    right = "artifact"
    found = [(right, windows.past, execution.past)]
    if execution.past_dropped is not None:
        found.append(("control: factor dropped", windows.past, execution.past_dropped))
    found += [(right, windows.far, execution.far), (right, windows.control, execution.control)]
    found += [
        (f"control: {name}", windows.control, fault) for name, fault in execution.faults.items()
    ]
    return tuple(
        _binned(name, window, comparison, rope, is_control=name != right)
        for name, window, comparison in found
    )


def _binned(
    name: str, window: Window, comparison: Comparison, rope: RopeParameters, *, is_control: bool
) -> Series:
    kl = np.concatenate(comparison.kl)
    parts = np.array_split(kl, min(_BINS, len(kl)))
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])]) + window.scored_from
    middles = [int(s + len(part) // 2) for s, part in zip(starts, parts, strict=True)]
    contexts = ((rope.original_context, "L"), (rope.context, "L'"))
    first, last = window.scored_from, window.position + window.tokens
    return Series(
        name,
        window.name,
        tuple(middles),
        tuple(float(part.mean()) for part in parts),
        is_control,
        tuple((float(c), label) for c, label in contexts if first <= c <= last),
    )
