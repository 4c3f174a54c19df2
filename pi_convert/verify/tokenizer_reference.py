"""The oracle of a tokenizer: the source's own files in ``tokenizers`` or ``sentencepiece``."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import EnvironmentNotReadyError, TokenizerError
from converters.install import install_line
from converters.tokenizers import TokenType, Vocabulary, VocabularyKind, build_tokenizer_files
from converters.tokenizers.pretokenizers import byte_alphabet, pre_tokenizer_named
from converters.tokenizers.tokenizer_json import adds

_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)
_TEXT_BYTES = frozenset(range(256)) - {0, 0xC0, 0xC1, *range(0xF5, 0x100)}  # that UTF-8 can have
_KINDS: Mapping[str, Callable[[str], bool]] = {
    "marks": lambda char: unicodedata.category(char).startswith("M"),
    "capitals": lambda char: unicodedata.category(char) in ("Lu", "Lt"),
    "spaces": str.isspace,
}


@dataclass(frozen=True, slots=True)
class ReferenceEncoder:
    """The source's tokenizer, told to treat special tokens as llama.cpp can.

    ``notes`` name what the source's tokenizer does and a GGUF cannot say; texts are prepared so
    that the comparison does not meet it.
    """

    oracle: str  # "tokenizers" or "sentencepiece"
    notes: tuple[str, ...]
    _encode: Callable[[str, bool, bool], list[int]]
    _prepare: Callable[[str], str] = str

    def prepare(self, text: str) -> str:
        """The text both sides are given: without what the notes say is left out."""
        return self._prepare(text)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``."""
        return self._encode(text, add_special, parse_special)


def reference_encoder(vocabulary: Vocabulary) -> ReferenceEncoder:
    """The encoder of the source that ``vocabulary`` was read from.

    From its tokenizer.json where it has one, from tokenizer.model in sentencepiece where only that
    is there, else from the tokenizer.json that its GGUF keys amount to.
    """
    files = vocabulary.files
    if "tokenizer.json" in files:
        own_config = json.loads(files.get("tokenizer_config.json", b"{}"))
        return _from_tokenizers(vocabulary, json.loads(files["tokenizer.json"]), own_config)
    if "tokenizer.model" in files:
        return _from_sentencepiece(vocabulary, files["tokenizer.model"])
    built = build_tokenizer_files(vocabulary)
    return _from_tokenizers(vocabulary, json.loads(built["tokenizer.json"]), {})


def _from_tokenizers(
    vocabulary: Vocabulary, tokenizer: dict[str, Any], config: Mapping[str, object]
) -> ReferenceEncoder:
    from tokenizers import Tokenizer

    notes = _as_llama_cpp_can(tokenizer, vocabulary)
    try:
        backend = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # it raises no other kind
        raise TokenizerError(
            f"the tokenizers library cannot read the source's tokenizer.json: {error}",
            hint="The file is damaged or was edited by hand; fetch it again.",
        ) from error
    # The post-processor says what is added, unless tokenizer_config.json does.
    flags = any(isinstance(config.get(f"add_{name}_token"), bool) for name in ("bos", "eos"))
    silent = tokenizer.get("post_processor") is None or flags
    before, after = _around(vocabulary)

    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        backend.encode_special_tokens = not parse_special
        ids: list[int] = backend.encode(text, add_special_tokens=add_special and not silent).ids
        return [*before, *ids, *after] if add_special and silent else ids

    prepare, left_out = _preparation(tokenizer, vocabulary)
    return ReferenceEncoder("tokenizers", (*notes, *left_out), encode, prepare)


def _preparation(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary
) -> tuple[Callable[[str], str], list[str]]:
    """What makes a text one on which both sides can agree, and a note for each thing it does."""
    if vocabulary.kind is not VocabularyKind.BPE:
        return str, []
    notes = []
    composes = "NFC" in json.dumps(tokenizer.get("normalizer"))
    if composes:
        notes.append("llama.cpp does not compose characters (NFC): compared on composed text")
    row = pre_tokenizer_named(vocabulary.pre)
    inexact = row.inexact if row else ()
    if inexact:
        notes.append(
            f"llama.cpp's {vocabulary.pre} splits otherwise beside non-ASCII "
            f"{' and '.join(inexact)}: left out"
        )
    missing = frozenset(
        value
        for value, text in enumerate(byte_alphabet())
        if text not in tokenizer["model"]["vocab"]
    )
    if missing & _TEXT_BYTES:
        notes.append(
            f"characters with one of {len(missing & _TEXT_BYTES)} bytes that have no token are "
            "left out: both sides drop them, and merge differently across the gap"
        )

    def prepare(text: str) -> str:
        text = unicodedata.normalize("NFC", text) if composes else text
        if text.isascii() and not missing & set(text.encode()):
            return text
        return "".join(
            char
            for char in text
            if not (missing & set(char.encode()))
            and (char.isascii() or not any(_KINDS[kind](char) for kind in inexact))
        )

    return prepare, notes


def _around(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    ids = vocabulary.special_ids
    return (
        [ids["bos"]] if adds(vocabulary, "bos") else [],
        [ids["eos"]] if adds(vocabulary, "eos") else [],
    )


def _as_llama_cpp_can(tokenizer: dict[str, Any], vocabulary: Vocabulary) -> list[str]:
    """Changes what a GGUF cannot say in a parsed tokenizer.json; returns a note for each."""
    notes = []
    listed = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    stripping = sorted(
        entry["content"]
        for entry in listed.values()
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")
    )
    if stripping:
        notes.append(f"llama.cpp keeps the spaces beside {', '.join(stripping[:4])}")
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = []
    for token_id in vocabulary.added_ids:
        text = listed.get(token_id, {}).get("content", vocabulary.tokens[token_id])
        special = vocabulary.types[token_id] in _SPECIAL_TYPES
        added.append({"id": token_id, "content": text, "special": special, **plain})
        tokenizer["model"]["vocab"].setdefault(text, token_id)
    tokenizer["added_tokens"] = added
    metaspace = tokenizer.get("pre_tokenizer") or {}
    if vocabulary.kind is VocabularyKind.SPM and metaspace.get("type") == "Metaspace":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = {"type": "Prepend", "prepend": "▁"}
        never = vocabulary.add_space_prefix is False
        tokenizer["pre_tokenizer"] = None
        tokenizer["normalizer"] = (
            replace if never else {"type": "Sequence", "normalizers": [prepend, replace]}
        )
        if not never:
            notes.append(
                "llama.cpp puts a space before a text and after each special token, "
                "this tokenizer.json only before a text that starts with none"
            )
    return notes


def _from_sentencepiece(vocabulary: Vocabulary, model: bytes) -> ReferenceEncoder:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise EnvironmentNotReadyError(
            "sentencepiece is not installed: it is the oracle of a tokenizer.model",
            hint=install_line("verify"),
        ) from error
    processor = SentencePieceProcessor(model_proto=model)
    ids = {vocabulary.tokens[i]: i for i in vocabulary.added_ids}
    user = [t for t, i in ids.items() if vocabulary.types[i] is TokenType.USER_DEFINED]
    parts = {True: _splitter(list(ids)), False: _splitter(user)}
    before, after = _around(vocabulary)

    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        out = list(before) if add_special else []
        for piece in parts[parse_special](text):
            out += [ids[piece]] if piece in ids else processor.encode(piece)
        return [*out, *after] if add_special else out

    notes = ("special tokens are split off before sentencepiece sees the text, as in llama.cpp",)
    return ReferenceEncoder("sentencepiece", notes, encode)


def _splitter(tokens: list[str]) -> Callable[[str], list[str]]:
    """Splits a text at ``tokens``, the longest first; empty pieces are left out."""
    if not tokens:
        return lambda text: [text] if text else []
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len)[::-1])) + ")")
    return lambda text: [piece for piece in pattern.split(text) if piece]
