"""The weights of a Hugging Face folder: one file, or several with an index; safetensors or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from converters.containers.safetensors import read_safetensors
from converters.containers.strict_json import read_json_object
from converters.errors import SourceError, TensorError, UnsupportedError, shown
from converters.sources.pytorch_bin import read_pytorch
from converters.tensor import Tensor

WEIGHTS = "model.safetensors"
PYTORCH_WEIGHTS = "pytorch_model.bin"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
INDEX = "model.safetensors.index.json"
_HINT = "The download is incomplete, or the index belongs to other files; fetch them again."


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its stored name; headers are read, no data.

    Raises ``SourceError`` where a file is missing, damaged or outside the folder, or where index
    and files disagree, and ``UnsupportedError`` for weights in another format.
    """
    # As transformers: the single file wins where both are there.
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_sharded(folder / INDEX, read_safetensors)
    if (folder / PYTORCH_WEIGHTS).is_file():
        return read_pytorch(folder / PYTORCH_WEIGHTS)
    if (folder / PYTORCH_INDEX).is_file():
        return _read_sharded(folder / PYTORCH_INDEX, read_pytorch)
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if others:
        raise UnsupportedError(
            f"{folder}: the weights are PyTorch pickles of other names ({', '.join(others[:4])})",
            hint=f"Expected {PYTORCH_WEIGHTS}; transformers saves as model.safetensors.",
        )
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    if ggufs:
        raise SourceError(
            f"{folder}: no {WEIGHTS}, but {', '.join(ggufs[:4])}", hint="Give the GGUF file itself."
        )
    graphs = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.onnx"))
    if graphs:
        raise SourceError(
            f"{folder}: no {WEIGHTS}, but {', '.join(graphs[:4])}",
            hint="It is an ONNX export; give the model that it was made from.",
        )
    raise SourceError(
        f"{folder}: neither {WEIGHTS} nor {INDEX}",
        hint="Check the path; of a model from the hub, download the weights too: hf download ID",
    )


def _read_sharded(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    folder = index.parent
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise SourceError(f"{index}: missing files: {', '.join(missing)}", hint=_HINT)
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        found = read(folder / file)
        listed = {name for name, where in weight_map.items() if where == file}
        problems += [f"{name} is not in {file}" for name in sorted(listed - found.keys())]
        problems += [f"{name} of {file} is not listed" for name in sorted(found.keys() - listed)]
        tensors |= found
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise TensorError(f"{index}: {'; '.join(problems[:8])}{more}", hint=_HINT)
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: weight_map is missing or empty", hint=_HINT)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise SourceError(
                f"{index}: {name} is said to be in {shown(file)}, outside the folder",
                hint="Only names of files beside the index are read.",
            )
    return weight_map


def _is_inside(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        bool(name)
        and "\0" not in name
        and not posix.is_absolute()
        and not windows.anchor
        and ".." not in windows.parts
    )
