"""How long work tells where it is."""

from __future__ import annotations

from collections.abc import Callable

# (stage, done, total), called from any thread; done and total are in the stage's own unit.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""
