"""Whether BOS and EOS are added, as a tokenizer.json's post-processor says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError, shown

_HINT = "supported are ByteLevel, and TemplateProcessing with at most one token on either side"


@dataclass(frozen=True, slots=True)
class Template:
    """What is put around a text; ``None`` where the post-processor says nothing."""

    add_bos: bool | None = None
    add_eos: bool | None = None
    first: str | None = None  # the special token put first
    last: str | None = None


def read_post_processor(node: object, where: str) -> Template:
    """The template of a tokenizer.json ``post_processor`` node.

    Raises UnsupportedError for one that puts more than one token on a side: GGUF can say no more
    than ``add_bos_token`` and ``add_eos_token``.
    """
    if node is None:
        return Template()
    if not isinstance(node, Mapping):
        raise UnsupportedError(f"{where}: post_processor is {shown(node)}", hint=_HINT)
    match node.get("type"):
        case "ByteLevel":
            return Template(add_bos=False, add_eos=False)
        case "TemplateProcessing":
            return _single(node, where)
        case "Sequence":
            parts = node.get("processors")
            template = Template()
            for part in parts if isinstance(parts, list) else []:
                template = _merge(template, read_post_processor(part, where))
            return template
    raise UnsupportedError(
        f"{where}: post-processor {node.get('type')} is not supported",
        hint=_HINT,
    )


def _merge(first: Template, second: Template) -> Template:
    return Template(
        add_bos=first.add_bos if second.add_bos is None else second.add_bos,
        add_eos=first.add_eos if second.add_eos is None else second.add_eos,
        first=second.first or first.first,
        last=second.last or first.last,
    )


def _single(node: Mapping[str, object], where: str) -> Template:
    items = node.get("single")
    names = [_piece(item) for item in items] if isinstance(items, list) else []
    if names.count(None) != 1:
        raise UnsupportedError(f"{where}: its template for one text is {shown(items)}", hint=_HINT)
    text = names.index(None)
    before, after = names[:text], names[text + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedError(
            f"{where}: its template puts {len(before)} tokens before a text and {len(after)} "
            "after it; GGUF can say one of each",
            hint=_HINT,
        )
    return Template(
        add_bos=bool(before),  # a template without BOS says that there is none
        add_eos=True if after else None,  # no tokenizer of llama.cpp's adds EOS unasked
        first=before[0] if before else None,
        last=after[0] if after else None,
    )


def _piece(item: object) -> str | None:
    """The text of a special token of a template, None for the place of the text itself."""
    special = item.get("SpecialToken") if isinstance(item, Mapping) else None
    return str(special.get("id")) if isinstance(special, Mapping) else None
