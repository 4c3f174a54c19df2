"""A model on the Hugging Face hub: a snapshot in the cache, downloaded where it is not there.

Pickles (.bin) are downloaded only where the same weights are not there as safetensors, as
transformers does.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from converters.checkpoint import Origin
from converters.errors import SourceError
from converters.sources.adapter_config import ADAPTER_CONFIG
from converters.sources.lora import TRAINABLE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", "LICENSE*")
# The same weights once more, in the vendor's own layout; and everything in folders.
_UNWANTED = ("*/*", "consolidated*.safetensors")


def is_hub_id(reference: str) -> bool:
    """Whether ``reference`` has the form ``organization/name``."""
    return _HUB_ID.fullmatch(reference) is not None


def fetch_hub(hub_id: str, *, revision: str | None = None) -> Origin:
    """Where the snapshot of a hub id lies; a cached one needs no network.

    ``revision`` is a branch, tag or commit, the main branch where it is None. Raises
    ``SourceError`` where the model is neither cached nor can be downloaded.
    """
    folder = _download(hub_id, revision, _WANTED, revision)
    if pickles := _pickles(folder):
        folder = _download(hub_id, folder.name, pickles, revision)  # of the same commit
    return Origin(label=hub_id, kind="hub", path=folder, revision=folder.name)


def _pickles(folder: Path) -> tuple[str, ...]:
    """The pickled files that a model may have for want of safetensors in its snapshot."""
    if any(folder.glob("model*.safetensors")):
        return ()
    if not (folder / ADAPTER_CONFIG).is_file():
        return ("pytorch_model*.bin",)
    if (folder / "adapter_model.safetensors").is_file():
        return (TRAINABLE,)
    return ("pytorch_model*.bin", "adapter_model.bin", TRAINABLE)


def _download(
    hub_id: str, revision: str | None, patterns: tuple[str, ...], named: str | None
) -> Path:
    """The snapshot's folder; errors speak of the revision that was ``named``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _explain(error, hub_id, named) from error
    return Path(folder)


def _explain(error: Exception, hub_id: str, revision: str | None) -> SourceError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{hub_id} at revision {revision}" if revision else hub_id
    page = f"https://huggingface.co/{hub_id}"
    match error:
        case GatedRepoError():  # a kind of RepositoryNotFoundError
            wrong = "the hub wants a login and its licence accepted"
            hint = f"Accept it at {page}, then run: hf auth login"
        case RepositoryNotFoundError():
            wrong = "there is no such folder here, and no such model on the hub"
            name = hub_id.rpartition("/")[2]
            hint = (
                f"Check the spelling (https://huggingface.co/models?search={name}); for a private"
                " model run: hf auth login"
            )
        case RevisionNotFoundError():
            wrong = "the hub has no such revision"
            hint = f"Give a branch, tag or commit that {page}/commits/main lists."
        case LocalEntryNotFoundError():
            return _not_cached(hub_id, revision, named)
        case HFValidationError():
            wrong = f"there is no such folder here, and it is no hub id: {error}"
            hint = "Expected organization/name, such as HuggingFaceTB/SmolLM2-135M-Instruct."
        case _:
            wrong = " ".join(str(error).split())
            hint = f"Check the network and try again: {_download_line(hub_id, revision)}"
    return SourceError(f"{named}: {wrong}", hint=hint)


def _not_cached(hub_id: str, revision: str | None, named: str) -> SourceError:
    """What is said without a network, where the cache holds the model not or in other revisions."""
    from huggingface_hub import constants

    is_offline = constants.HF_HUB_OFFLINE
    line = f"{'HF_HUB_OFFLINE=0 ' if is_offline else ''}{_download_line(hub_id, revision)}"
    cached = _cached_revisions(hub_id)
    wanted = "the revision" if cached else "the model"
    return SourceError(
        f"{named}: there is no such folder here, {wanted} is not in the cache"
        f" ({constants.HF_HUB_CACHE}),"
        f" and {'HF_HUB_OFFLINE is set' if is_offline else 'the hub is out of reach'}",
        hint=f"Run once with a network: {line}"
        + (f"; or give a --revision that is cached: {', '.join(cached)}" if cached else ""),
    )


def _download_line(hub_id: str, revision: str | None) -> str:
    return f"hf download {hub_id}" + (f" --revision {shlex.quote(revision)}" if revision else "")


def _cached_revisions(hub_id: str) -> list[str]:
    """Branches and tags whose snapshots are here, and the commits of snapshots that have none."""
    from huggingface_hub import constants

    model = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    commits = {path.name for path in (model / "snapshots").glob("*")}
    refs = (path for path in sorted((model / "refs").rglob("*")) if path.is_file())
    names = {
        str(path.relative_to(model / "refs")): path.read_text("utf-8").strip() for path in refs
    }
    found = [name for name, commit in names.items() if commit in commits]
    return [*found, *sorted(commits - set(names.values()))]
