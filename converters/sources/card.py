"""What is known of a model besides its numbers: from README.md, the config, and its name.

Which of them wins, and how a name is taken apart, follows gguf-py's ``Metadata`` (0.19), since the
same fields become GGUF's ``general.*`` keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from converters.checkpoint import ModelCard

_TUNED = "-finetuned"
_FENCE = "---"
_HUB_URL = "https://huggingface.co/"
# What exporters append to a model's name: the type of its numbers, and our own mark, which stands
# before ``_TUNED`` in the name of a run's folder.
_TYPE_SUFFIX = re.compile(
    r"[-._](i?q\d\w*|b?f(16|32)|fp(16|32)|tq\d_\d|mxfp4\w*|pi\d+(\.\d+)?)(?=$|-finetuned$)",
    re.IGNORECASE,
)


def card_of_folder(
    folder: Path, config: Mapping[str, object], *, hub_id: str | None, parameters: int, tuned: bool
) -> ModelCard:
    """The card of a Hugging Face folder; ``parameters`` helps to tell a size from a context.

    In a folder that was ``tuned`` by ``pi-convert finetune`` they are the base's, whose name it
    does not share: exports of both would have the same one.
    """
    import gguf

    readme = read_front_matter(folder / "README.md")
    model_id = hub_id or plain_name(folder.resolve().name)
    named = _text(config.get("_name_or_path"))
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), readme, {"_name_or_path": named}, Path(model_id), parameters
    )
    own_name = _text(readme.get("name")) or _text(readme.get("model_name"))
    said = _file_name(own_name or "")
    if not said and hub_id is None and named is not None and named.count("/") <= 1:
        said = _file_name(named)
    if said and tuned:
        said = tuned_name(said)
    return ModelCard(
        name=said or _file_name(model_id) or plain_name(folder.name),
        license=_joined(found.license),
        tags=_texts(found.tags),
        languages=_texts(found.languages),
        base_models=_base_models(found.base_models or ()),
        organization=_text(found.organization) or _organization(hub_id),
        basename=_text(found.basename),
        finetune=_text(found.finetune),
        size_label=_text(found.size_label) or gguf.size_label(parameters, 0, 0, 0),
    )


def card_of_gguf(keys: Mapping[str, object], path: Path) -> ModelCard:
    """The card in a GGUF's ``general.*`` keys; the file's own name is the model's."""
    name = plain_name(path.stem)
    if name in ("model", "ggml-model"):
        name = _file_name(_text(keys.get("general.name")) or "") or name
    count = keys.get("general.base_model.count", 0)
    base_models = (
        _text(keys.get(f"general.base_model.{i}.repo_url"))
        for i in range(count if isinstance(count, int) and count < len(keys) else 0)
    )
    return ModelCard(
        name=name,
        license=_text(keys.get("general.license")),
        tags=_texts(keys.get("general.tags")),
        languages=_texts(keys.get("general.languages")),
        base_models=tuple(url.removeprefix(_HUB_URL) for url in base_models if url),
        organization=_text(keys.get("general.organization")),
        basename=_text(keys.get("general.basename")),
        finetune=_text(keys.get("general.finetune")),
        size_label=_text(keys.get("general.size_label")),
    )


def plain_name(name: str) -> str:
    """A model's name without what exporters append: ``-Q4_1``, ``.f16``, ``-PI8``.

    ``x-PI8-finetuned``, as the folder of a run is called, is ``x-finetuned``.
    """
    while (shorter := _TYPE_SUFFIX.sub("", name)) not in (name, ""):
        name = shorter
    return name


def tuned_name(name: str) -> str:
    """What the model of that name is called once it was fine-tuned."""
    return name if name.endswith(_TUNED) else name + _TUNED


def read_front_matter(readme: Path) -> dict[str, object]:
    """The YAML between the first two ``---`` lines of a README; {} where there is none.

    A card only describes: one that cannot be read is left out and is no error.
    """
    import yaml

    try:
        lines = readme.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if not lines or lines[0] != _FENCE or _FENCE not in lines[1:]:
        return {}
    block = "\n".join(lines[1 : lines.index(_FENCE, 1)])
    try:
        # "no" is Norwegian in a list of languages, not false.
        data = yaml.safe_load(re.sub(r"(?m)^(\s*- |\s*language: )no$", r'\1"no"', block))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _base_models(entries: Iterable[object]) -> tuple[str, ...]:
    urls = (_text(e.get("repo_url")) for e in entries if isinstance(e, Mapping))
    return tuple(url.removeprefix(_HUB_URL) for url in urls if url)


def _organization(hub_id: str | None) -> str | None:
    return hub_id.partition("/")[0] if hub_id else None


def _file_name(model_id: str) -> str:
    """The part after the last slash, with nothing in it that a file's name may not have."""
    return re.sub(r"[^\w.+ -]", "-", model_id.rpartition("/")[2]).strip(". ")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _joined(value: object) -> str | None:
    return ",".join(map(str, value)) if isinstance(value, list) else _text(value)
