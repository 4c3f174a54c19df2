"""The checkpoints of a run: which is the last one that is whole, and the room for the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from converters.errors import OutputError

CHECKPOINTS = "checkpoints"  # beside the log
_TRAINER_STATE = "trainer_state.json"  # transformers writes it last


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; one that a kill cut short does not count."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _is_whole(path)
    ]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def having_room(checkpoints: Path, path: Path) -> Iterator[None]:
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
