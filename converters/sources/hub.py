"""A model on the Hugging Face hub: a snapshot in the cache, downloaded where it is not there."""

from __future__ import annotations

import re
from pathlib import Path

from converters.checkpoint import Checkpoint, Origin
from converters.errors import SourceError
from converters.sources.huggingface import open_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", "LICENSE*")
# The same weights once more, in the vendor's own layout; and everything in folders.
_UNWANTED = ("*/*", "consolidated*.safetensors")


def is_hub_id(reference: str) -> bool:
    """Whether ``reference`` has the form ``organization/name``."""
    return _HUB_ID.fullmatch(reference) is not None


def open_hub(
    hub_id: str, *, revision: str | None = None, original_context: int | None = None
) -> Checkpoint:
    """The checkpoint of a hub id; a cached snapshot needs no network.

    ``revision`` is a branch, tag or commit, the main branch where it is None. Raises
    ``SourceError`` where the model is neither cached nor can be downloaded; and as ``open_folder``.
    """
    folder = _snapshot(hub_id, revision)
    origin = Origin(label=hub_id, kind="hub", path=folder, revision=folder.name)
    return open_folder(folder, original_context=original_context, origin=origin)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{hub_id} at revision {revision}" if revision else hub_id
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except GatedRepoError:
        raise SourceError(
            f"{named}: the hub wants a login and its licence accepted",
            hint=f"Accept it at https://huggingface.co/{hub_id}, then run `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{named}: there is no such folder here, and no such model on the hub",
            hint="Check the spelling; a private model needs `hf auth login`.",
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{named}: the hub has no such revision", hint="Give a branch, tag or commit."
        ) from None
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        raise SourceError(
            f"{named}: there is no such folder here, the model is not in the cache"
            f" ({constants.HF_HUB_CACHE}), and {offline}",
            hint=f"Run once with a network: hf download {hub_id}",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"{named}: {error}", hint="Check the network and try again.") from error
    return Path(folder)
