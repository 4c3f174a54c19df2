"""``pytorch_model.bin`` and its like: tensors that torch maps, and nothing else of a pickle.

torch's ``weights_only`` unpickler builds tensors and plain containers and refuses every other
object, so no code of the file runs. Data stay on disk until rows are asked for.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.encodings import BF16, F16, F32
from converters.errors import EnvironmentNotReadyError, SourceError, UnsupportedError
from converters.install import install_line
from converters.tensor import Tensor


def read_pytorch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, their data mapped.

    Raises ``SourceError`` for a file that is damaged, or that holds anything but tensors by name,
    and ``UnsupportedError`` for tensors of other types than float32, float16 and bfloat16.
    """
    stored = _load(path)
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise SourceError(f"{path}: no tensors by name", hint="Expected a saved state_dict.")
    return {name: _tensor(name, value, path) for name, value in stored.items()}


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"{path} is a PyTorch pickle, and reading it safely needs torch",
            hint=f"Install it: {install_line('verify')}",
        ) from error
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].splitlines()
        raise SourceError(
            f"{path}: refused by torch's weights-only reader"
            f"{': ' + reason[0].strip() if reason else ''}",
            hint="It holds more than tensors, or is damaged; such files can run code when read.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SourceError(
            f"{path}: {str(error).strip().splitlines()[0] if str(error).strip() else 'empty'}",
            hint="The file is damaged or incomplete; fetch it again.",
        ) from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint="Check the path.") from error


def _tensor(name: str, value: Any, path: Path) -> Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise SourceError(
            f"{path}: {name} is {type(value).__name__}, no tensor",
            hint="Expected a saved state_dict.",
        )
    encodings = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
    if value.dtype not in encodings or value.is_sparse or value.is_quantized:
        raise UnsupportedError(
            f"{path}: {name} is {str(value.dtype).removeprefix('torch.')}",
            hint="Supported are float32, float16 and bfloat16.",
        )
    shape = tuple(value.shape) or (1,)
    rows = value.detach().reshape(-1, shape[-1])

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        part = rows[start:stop].contiguous().view(torch.uint8).numpy()
        return np.asarray(part, dtype=np.uint8)

    return Tensor(name, shape, encodings[value.dtype], read)
