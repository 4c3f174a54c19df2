"""Recognition of pre-tokenizers: a tokenizer.json's own splitting to llama.cpp's name, and back.

A pre-tokenizer is brought to a canonical form (a tuple of steps) and looked up in
``pretokenizers.toml``. What is not in the table is an error: llama.cpp splits by name, so a wrong
name gives wrong tokens for good text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from converters.errors import TokenizerError

_SPLIT = "split "
_EACH_DIGIT = "digits each"
_DIGIT_RUNS = "digits runs"
_PUNCTUATION = "punctuation runs"
_BYTES = "bytes"
# `Digits` of the tokenizers library asks for Unicode category N, so these say the same.
_DIGIT_SPLITS = {_SPLIT + r"\p{N}": _EACH_DIGIT, _SPLIT + r"\p{N}+": _DIGIT_RUNS}


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One row of the table: llama.cpp's name and the form it has in a tokenizer.json."""

    name: str
    steps: tuple[str, ...]  # "split REGEX", "digits each", ..., in canonical form
    normalizers: tuple[str, ...]  # accepted ones: "none", "NFC"; the first is written
    ignore_merges: bool
    adds_bos: bool  # llama.cpp's default for add_bos_token
    cleans_spaces: bool
    models: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()  # kinds of characters beside which llama.cpp splits otherwise


@dataclass(frozen=True, slots=True)
class _Table:
    rows: tuple[PreTokenizer, ...]
    covering: frozenset[str]  # regexes that match every character
    classes: Mapping[str, str]  # tokenizer class -> pre, for vocab.json + merges.txt
    patterns: Mapping[str, str]


@cache
def _table() -> _Table:
    text = files("converters.tokenizers").joinpath("pretokenizers.toml").read_text("utf-8")
    data = tomllib.loads(text)
    patterns: dict[str, str] = data["patterns"]
    return _Table(
        rows=tuple(_row(row, patterns) for row in data["pre"]),
        covering=frozenset(patterns[name] for name in data["options"]["covering"]),
        classes=data["classes"],
        patterns=patterns,
    )


def _row(row: Mapping[str, Any], patterns: Mapping[str, str]) -> PreTokenizer:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    steps = tuple(
        _SPLIT + patterns[step.removeprefix(_SPLIT)] if step.startswith(_SPLIT) else step
        for step in values.pop("steps")
    )
    return PreTokenizer(steps=steps, **values)


def known_pre_tokenizers() -> tuple[str, ...]:
    """Names that recognition can give, in the table's order."""
    return tuple(row.name for row in _table().rows)


def pre_tokenizer_named(name: str) -> PreTokenizer | None:
    """The row that llama.cpp's ``name`` or one of its aliases belongs to, or None."""
    for row in _table().rows:
        if name == row.name or name in row.aliases:
            return row
    return None


def pre_tokenizer_of_class(class_name: str | None) -> PreTokenizer | None:
    """The row of a tokenizer class that fixes its own splitting (vocab.json + merges.txt only)."""
    name = _table().classes.get(class_name or "")
    return pre_tokenizer_named(name) if name else None


def recognise(
    tokenizer: Mapping[str, object], *, cleans_spaces: bool | None, where: str
) -> PreTokenizer:
    """The row that a parsed byte-level BPE ``tokenizer.json`` matches.

    ``cleans_spaces`` is tokenizer_config's ``clean_up_tokenization_spaces``: it chooses between
    rows that split alike. Raises TokenizerError naming the form found and the rows there are.
    """
    steps = canonical_steps(tokenizer.get("pre_tokenizer"))
    normalizer = canonical_normalizer(tokenizer.get("normalizer"))
    model = tokenizer.get("model")
    ignore_merges = bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False
    found = [
        row
        for row in _table().rows
        if row.steps == steps
        and normalizer in row.normalizers
        and row.ignore_merges == ignore_merges
    ]
    if not found:
        names = {_SPLIT + regex: _SPLIT + name for name, regex in _table().patterns.items()}
        shown = " > ".join(names.get(step, step) for step in steps) or "none"
        raise TokenizerError(
            f"{where}: its pre-tokenizer is not one that llama.cpp knows by name: {shown}, "
            f"normalizer {normalizer}, ignore_merges {str(ignore_merges).lower()}",
            hint=f"recognised are {', '.join(known_pre_tokenizers())}",
        )
    return next((row for row in found if row.cleans_spaces == cleans_spaces), found[0])


def canonical_steps(node: object) -> tuple[str, ...]:
    """The canonical steps of a tokenizer.json ``pre_tokenizer``; unknown ones as ``?Type(...)``."""
    if node is None:
        return ()
    if not isinstance(node, Mapping):
        return (f"?{node!r}",)
    if node.get("type") == "Sequence":
        parts = node.get("pretokenizers")
        nodes = parts if isinstance(parts, list) else [parts]
        return tuple(step for part in nodes for step in canonical_steps(part))
    return _leaf_steps(node)


def _leaf_steps(node: Mapping[str, object]) -> tuple[str, ...]:
    steps: tuple[str, ...] = (_unknown(node),)
    match node.get("type"):
        case "Split":
            steps = (_split_step(node),)
        case "Digits":
            steps = (_EACH_DIGIT if node.get("individual_digits") is True else _DIGIT_RUNS,)
        case "Punctuation" if node.get("behavior") == "Contiguous":
            steps = (_PUNCTUATION,)
        case "ByteLevel" if node.get("add_prefix_space") is False:
            regex = (_SPLIT + _table().patterns["gpt2"],)
            steps = (*(regex if node.get("use_regex", True) else ()), _BYTES)
    return steps


def _split_step(node: Mapping[str, object]) -> str:
    pattern = node.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(regex, str):
        return _unknown(node)
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    isolated = node.get("behavior") == "Isolated" and not node.get("invert")
    covered = node.get("behavior") == "Removed" and node.get("invert") is True
    if isolated or (covered and regex in _table().covering):
        step = _SPLIT + regex
        return _DIGIT_SPLITS.get(step, step)
    return _unknown(node)


def _unknown(node: Mapping[str, object]) -> str:
    fields = ", ".join(f"{key}={value!r}" for key, value in node.items() if key != "type")
    return f"?{node.get('type')}({fields})"


def canonical_normalizer(node: object) -> str:
    """``none``, ``NFC``, or the names of the normalizers found, joined by ``+``."""
    if node is None:
        return "none"
    if not isinstance(node, Mapping):
        return f"?{node!r}"
    if node.get("type") == "Sequence":
        parts = node.get("normalizers")
        names = [canonical_normalizer(part) for part in parts] if isinstance(parts, list) else []
        return "+".join(name for name in names if name != "none") or "none"
    return str(node.get("type"))


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's alphabet).

    Printable Latin-1 bytes stand for themselves, the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in printable)
    moved = {value: 0x100 + order for order, value in enumerate(others)}
    return tuple(chr(moved.get(value, value)) for value in range(256))


def pre_tokenizer_json(row: PreTokenizer) -> dict[str, object]:
    """The tokenizer.json ``pre_tokenizer`` node of a row, spelled as its models spell it."""
    nodes: list[dict[str, object]] = []
    gpt2 = _SPLIT + _table().patterns["gpt2"]
    for index, step in enumerate(row.steps):
        own_regex = step == gpt2 and row.steps[index + 1 : index + 2] == (_BYTES,)
        if not own_regex:
            previous = row.steps[index - 1] if index else ""
            nodes.append(_step_json(step, use_regex=previous == gpt2))
    return nodes[0] if len(nodes) == 1 else {"type": "Sequence", "pretokenizers": nodes}


def _step_json(step: str, *, use_regex: bool) -> dict[str, object]:
    if step.startswith(_SPLIT):
        pattern = {"Regex": step.removeprefix(_SPLIT)}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    nodes: dict[str, dict[str, object]] = {
        _EACH_DIGIT: {"type": "Digits", "individual_digits": True},
        _DIGIT_RUNS: {"type": "Digits", "individual_digits": False},
        _PUNCTUATION: {"type": "Punctuation", "behavior": "Contiguous"},
        _BYTES: {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": use_regex,
        },
    }
    return nodes[step]
