"""What a folder says of its tokenizer beside the tokens: flags, special tokens, chat templates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from converters.containers.strict_json import parse_json_object
from converters.errors import SourceError, TokenizerError, shown

T = TypeVar("T")

DAMAGED = "the file is damaged or was edited by hand; fetch it again"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE_FOLDER = "additional_chat_templates"
_DEFAULT_TEMPLATE = "default"
# tokenizer_config's and config's short names of the special tokens that GGUF has ids for.
SPECIAL_NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "separator",
    "pad": "padding",
    "mask": "mask",
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the model's own vocabulary, matched in the text before anything else."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and templates, read."""

    class_name: str | None = None
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)  # "bos" -> text
    named_ids: Mapping[str, int] = field(default_factory=dict)  # config.json's, "bos" -> id
    other_special: frozenset[str] = frozenset()  # texts of additional special tokens
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    cleans_spaces: bool | None = None
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of all tokens that the settings call special."""
        return self.other_special | frozenset(self.named.values())


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files that ``folder`` has, whole, by name."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    names += sorted(
        f"{_TEMPLATE_FOLDER}/{path.name}" for path in (folder / _TEMPLATE_FOLDER).glob("*.jinja")
    )
    return {name: (folder / name).read_bytes() for name in names}


def parse_json(data: bytes, where: str) -> dict[str, object]:
    """The JSON object in ``data``; raises TokenizerError naming ``where``."""
    try:
        return parse_json_object(data, where)
    except SourceError as error:
        raise TokenizerError(error.message, hint=error.hint) from error


def parse_text(data: bytes, where: str) -> str:
    """``data`` as UTF-8; raises TokenizerError naming ``where``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}: not UTF-8: {error}", hint=DAMAGED) from error


def checked_id(value: object, text: object, where: str) -> int:
    """``value`` as the id of the token ``text``; raises TokenizerError for anything but one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TokenizerError(
            f"{where}: token {shown(text)} has id {shown(value)}",
            hint="expected a whole number from 0 on",
        )
    return value


def token_ids(vocab: Mapping[str, object], where: str) -> dict[str, int]:
    """A vocabulary's ids by text; raises TokenizerError for a bad one and for one given twice."""
    ids = {text: checked_id(value, text, where) for text, value in vocab.items()}
    if len(set(ids.values())) < len(ids):
        shared, _ = Counter(ids.values()).most_common(1)[0]
        texts = [text for text, value in ids.items() if value == shared]
        raise TokenizerError(
            f"{where}: id {shared} is given to {', '.join(map(repr, texts[:4]))}", hint=DAMAGED
        )
    return ids


def optional(values: Mapping[str, object], key: str, kind: type[T], where: str) -> T | None:
    """``values[key]`` if it is there and not null; raises TokenizerError on another type."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TokenizerError(
            f"{where}: {key} is {shown(value)}, expected {kind.__name__}", hint=DAMAGED
        )
    return value


def read_settings(
    files: Mapping[str, bytes], config: Mapping[str, object], where: str
) -> TokenizerSettings:
    """Settings from a folder's tokenizer files and its parsed config.json.

    ``where`` names the folder in errors. A chat template in a file of its own wins over the one in
    tokenizer_config.json, as in transformers 5.24.
    """
    own = f"{where}/tokenizer_config.json"
    values = parse_json(files.get("tokenizer_config.json", b"{}"), own)
    special_map = parse_json(
        files.get("special_tokens_map.json", b"{}"), f"{where}/special_tokens_map.json"
    )
    template, templates = _chat_templates(files, values, where)
    return TokenizerSettings(
        class_name=optional(values, "tokenizer_class", str, own),
        added=_added_tokens(files, values, where),
        named={**_named(special_map), **_named(values)},
        named_ids=_config_ids(config),
        other_special=frozenset(
            (
                *_other_special(special_map, f"{where}/special_tokens_map.json"),
                *_other_special(values, own),
            )
        ),
        add_bos=optional(values, "add_bos_token", bool, own),
        add_eos=optional(values, "add_eos_token", bool, own),
        add_space_prefix=optional(values, "add_prefix_space", bool, own),
        cleans_spaces=optional(values, "clean_up_tokenization_spaces", bool, own),
        chat_template=template,
        chat_templates=templates,
    )


def _text(value: object) -> str | None:
    """The text of a special token, spelled as a string or as an AddedToken object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named(values: Mapping[str, object]) -> dict[str, str]:
    texts = {short: _text(values.get(f"{short}_token")) for short in SPECIAL_NAMES}
    return {short: text for short, text in texts.items() if text is not None}


def _other_special(values: Mapping[str, object], where: str) -> list[str]:
    texts: list[str | None] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        found = values.get(key)
        if found is not None and not isinstance(found, list | dict):
            raise TokenizerError(
                f"{where}: {key} is {shown(found)}", hint="expected a list of tokens"
            )
        listed = found.values() if isinstance(found, dict) else found
        texts += map(_text, listed or [])
    return [text for text in texts if text is not None]


def _config_ids(config: Mapping[str, object]) -> dict[str, int]:
    """config.json's ids; a list (several eos) or a negative one (none) says nothing here."""
    ids = {short: config.get(f"{short}_token_id") for short in SPECIAL_NAMES}
    return {
        short: value
        for short, value in ids.items()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0
    }


def _added_tokens(
    files: Mapping[str, bytes], values: Mapping[str, object], where: str
) -> dict[int, AddedToken]:
    own = f"{where}/added_tokens.json"
    added = {}
    stated = parse_json(files.get("added_tokens.json", b"{}"), own)
    for text, number in token_ids(stated, own).items():
        added[number] = AddedToken(number, text, special=False)
    own = f"{where}/tokenizer_config.json"
    decoder = optional(values, "added_tokens_decoder", dict, own) or {}
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not re.fullmatch(r"[0-9]{1,10}", key) or not isinstance(content, str):
            raise TokenizerError(
                f"{own}: added_tokens_decoder has an entry {shown(key)}: {shown(entry)}",
                hint="expected an id, and an object with the token's content",
            )
        added[int(key)] = AddedToken(int(key), content, special=bool(entry.get("special")))
    return added


def _chat_templates(
    files: Mapping[str, bytes], values: Mapping[str, object], folder: str
) -> tuple[str | None, dict[str, str]]:
    """The default chat template, and the others by name."""
    own = f"{folder}/tokenizer_config.json"
    found = values.get("chat_template")
    if "chat_template.json" in files:
        own = f"{folder}/chat_template.json"
        found = parse_json(files["chat_template.json"], own).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates[_DEFAULT_TEMPLATE] = found
    elif isinstance(found, list):
        for entry in found:
            known = entry if isinstance(entry, dict) else {}
            name, text = known.get("name"), known.get("template")
            if not isinstance(name, str) or not isinstance(text, str):
                raise TokenizerError(
                    f"{own}: chat_template has an entry without name or text",
                    hint="expected objects with name and template, both texts",
                )
            templates[name] = text
    elif found is not None:
        raise TokenizerError(
            f"{own}: chat_template is {type(found).__name__}", hint="expected a text or a list"
        )
    for name, data in files.items():
        if name == "chat_template.jinja":
            templates[_DEFAULT_TEMPLATE] = parse_text(data, f"{folder}/{name}")
        elif name.startswith(_TEMPLATE_FOLDER):
            templates[Path(name).stem] = parse_text(data, f"{folder}/{name}")
    return templates.pop(_DEFAULT_TEMPLATE, None), templates
