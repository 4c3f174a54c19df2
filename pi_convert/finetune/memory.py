"""Memory of the training: its peak, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GROWTH_BYTES = 1 << 30
_STATM = Path("/proc/self/statm")


def return_freed_memory(blocks: torch.nn.ModuleList) -> None:
    """Has glibc give what is free in its heap back whenever the process has grown by 1 GiB.

    Looked at after every block: a layer of the model, passed through in the forward pass and once
    more where its activations are recomputed. Left alone glibc keeps a heap full of holes, SmolLM2
    on 8,192 tokens 3 GiB of them; asked too often, every page is faulted in anew.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is None or not _STATM.is_file():
        return
    bound = _resident_bytes() + _GROWTH_BYTES

    def after_block(*_: object) -> None:
        nonlocal bound
        if _resident_bytes() > bound:
            trim(0)
            bound = _resident_bytes() + _GROWTH_BYTES

    for block in blocks:
        block.register_forward_hook(after_block)


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE


def peak_bytes(device: torch.device) -> int:
    """Of the accelerator, or of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
