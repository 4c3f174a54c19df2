"""Several processes of one run: what is wrong is said once, and none leaves before the others.

``torchrun`` ends all processes as soon as one has ended with an error, also the one that was about
to say what is wrong; so those that have nothing to say wait to be ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from converters.errors import ConvertError, TrainingError

_ENDED_WITHIN_SECONDS = 10.0  # by the launcher; where it does not, a process goes by itself

Ready = TypeVar("Ready")


class OtherProcessError(TrainingError):
    """What went wrong did so in another process, which says it."""


def all_ready(arguments: Any, prepare: Callable[[], Ready]) -> Ready:
    """What ``prepare`` gives here, once it is through in every process of ``arguments``.

    Where it fails in any, the first of these raises its own error and all others
    ``OtherProcessError``; by then they have left the group.
    """
    try:
        found = prepare()
    except Exception:
        first = _first_failure(arguments, arguments.process_index)
        leave_together(arguments)
        if first != arguments.process_index:
            raise _elsewhere(first) from None
        raise
    first = _first_failure(arguments, arguments.world_size)
    if first < arguments.world_size:
        leave_together(arguments)
        raise _elsewhere(first)
    return found


def _first_failure(arguments: Any, mine: int) -> int:
    """The least of all processes' ``mine``."""
    if arguments.world_size == 1:
        return mine
    import torch

    least = torch.tensor(mine, device=arguments.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least.item())


def _elsewhere(process: int) -> OtherProcessError:
    return OtherProcessError(
        f"process {process} could not prepare the run", hint="Its own message says why."
    )


def leave_together(arguments: Any) -> None:
    """No process of ``torchrun`` ends before the one that writes, nor with the group open."""
    if arguments.world_size > 1:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def said_once() -> Iterator[None]:
    """Lets the first process of each machine speak: another one's error waits to be ended with it.

    The first has the same files and libraries and finds the same. Where it does not, the error is
    raised after all.
    """
    try:
        yield
    except OtherProcessError:
        _wait_to_be_ended(2 * _ENDED_WITHIN_SECONDS)  # longer than one that has a word to say
        raise
    except ConvertError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _wait_to_be_ended(_ENDED_WITHIN_SECONDS)
        raise


def _wait_to_be_ended(seconds: float) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no word about it
    time.sleep(seconds)
