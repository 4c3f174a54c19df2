"""Sources: every kind of checkpoint that can be opened."""

from __future__ import annotations

from pathlib import Path

from converters.checkpoint import Checkpoint, Origin
from converters.errors import SourceError
from converters.sources.adapter_config import ADAPTER_CONFIG
from converters.sources.gguf import checkpoint_of_gguf, open_gguf
from converters.sources.hub import fetch_hub, is_hub_id
from converters.sources.huggingface import CONFIG, open_folder
from converters.sources.lora import is_adapter, open_adapter

__all__ = ["checkpoint_of_gguf", "open_checkpoint"]

_FORMS = (
    "MODEL is a Hugging Face folder (config.json, weights, tokenizer), an adapter's folder, a .gguf"
    " file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
)


def open_checkpoint(
    reference: str, *, revision: str | None = None, original_context: int | None = None
) -> Checkpoint:
    """The checkpoint that ``reference`` names: a folder, a .gguf file, or else a hub id.

    An adapter, in a folder or on the hub, gives its base with the adapter merged.
    ``revision`` is a hub id's branch, tag or commit; ``original_context`` is L in tokens where the
    caller knows it. Raises ``SourceError`` or one of its kinds for what cannot be found, read or
    believed, and ``UnsupportedError`` for what is understood and cannot be exported right.
    """
    return _open(reference, revision, original_context, ())


def _open(
    reference: str,
    revision: str | None,
    original_context: int | None,
    adapters: tuple[Path, ...],
) -> Checkpoint:
    """``open_checkpoint``; ``adapters`` are the folders that lead here as one another's base."""
    path = Path(reference)
    if _exists(path):
        if revision is not None:
            raise SourceError(
                f"{reference} is here on disk and has no revision {revision}",
                hint="--revision belongs to a hub id.",
            )
        if path.is_dir():
            origin = Origin(label=path.resolve().name, kind="folder", path=path)
            return _open_at(origin, original_context, adapters)
        if path.suffix.lower() == ".gguf":
            return open_gguf(path, original_context=original_context)
        raise SourceError(
            f"{reference} is neither a folder nor a .gguf file",
            hint=f"Give its folder: {path.parent}" if _is_checkpoint(path.parent) else _FORMS,
        )
    if is_hub_id(reference) and path.suffix.lower() != ".gguf":
        origin = fetch_hub(reference, revision=revision)
        return _open_at(origin, original_context, adapters)
    raise SourceError(f"{reference}: no such folder or file", hint=_FORMS)


def _open_at(
    origin: Origin, original_context: int | None, adapters: tuple[Path, ...]
) -> Checkpoint:
    """A folder's model, or its adapter on the base that it names, which may be another adapter."""
    if not is_adapter(origin.path):
        return open_folder(origin.path, original_context=original_context, origin=origin)
    place = origin.path.resolve()
    if place in adapters:
        raise SourceError(
            f"{adapters[-1] / ADAPTER_CONFIG}: base_model_name_or_path leads back to {place}",
            hint="State the folder or hub id of the model that the adapter was trained on.",
        )

    def open_base(reference: str, revision: str | None) -> Checkpoint:
        # As transformers: what is here on disk stands for the base, whatever its revision.
        on_hub = None if _exists(Path(reference)) else revision
        return _open(reference, on_hub, original_context, (*adapters, place))

    return open_adapter(origin, open_base, original_context=original_context)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise SourceError(f"{path}: {error.strerror}", hint=_FORMS) from error
