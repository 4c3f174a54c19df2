"""A vocabulary as the files of a Hugging Face folder: for a source that was a GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers.pretokenizers import (
    known_pre_tokenizers,
    pre_tokenizer_json,
    pre_tokenizer_named,
)
from converters.tokenizers.settings import SPECIAL_NAMES
from converters.tokenizers.spm import SPACE, merges_of_scores
from converters.tokenizers.vocabulary import (
    TokenType,
    Vocabulary,
    VocabularyKind,
    padding_token,
)

_BOS, _EOS = "bos", "eos"


def build_tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``, by name.

    They load in transformers 5 and 4.57, and give the ids that llama.cpp gives for the vocabulary.
    Raises TokenizerError when the pre-tokenizer's name is not in the table or merges cannot be
    made, UnsupportedError when special ids are missing that the flags need.
    """
    named = _named_tokens(vocabulary)
    added = {i: _added_token(vocabulary, i) for i in vocabulary.added_ids}
    return {
        "tokenizer.json": _json(_tokenizer(vocabulary, added)),
        "tokenizer_config.json": _json(_config(vocabulary, named, added)),
        "special_tokens_map.json": _json(named),
    }


def adds(vocabulary: Vocabulary, name: str) -> bool:
    """Whether llama.cpp puts ``bos`` before or ``eos`` after a text that asks for specials."""
    said = vocabulary.add_bos if name == _BOS else vocabulary.add_eos
    if said is not None:
        return said
    if name == _EOS:
        return False
    row = pre_tokenizer_named(vocabulary.pre)
    return vocabulary.kind is VocabularyKind.SPM or (row is not None and row.adds_bos)


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8") + b"\n"


def _named_tokens(vocabulary: Vocabulary) -> dict[str, object]:
    ids = vocabulary.special_ids
    return {
        f"{short}_token": vocabulary.tokens[ids[name]]
        for short, name in SPECIAL_NAMES.items()
        if name in ids
    }


def _added_token(vocabulary: Vocabulary, token_id: int) -> dict[str, object]:
    return {
        "content": vocabulary.tokens[token_id],
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": vocabulary.types[token_id] is TokenType.CONTROL,
    }


def _tokenizer(vocabulary: Vocabulary, added: Mapping[int, dict[str, object]]) -> dict[str, object]:
    spm = vocabulary.kind is VocabularyKind.SPM
    parts = _spm_parts(vocabulary) if spm else _bpe_parts(vocabulary)
    model = parts.pop("model")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        **parts,
        "post_processor": _post_processor(vocabulary),
        "model": model,
    }


def _vocab(vocabulary: Vocabulary) -> dict[str, int]:
    """Every token but padding: padding stands for rows that no token has."""
    unused = TokenType.UNUSED
    return {
        text: i
        for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind is not unused or text != padding_token(i)
    }


def _bpe_parts(vocabulary: Vocabulary) -> dict[str, object]:
    row = pre_tokenizer_named(vocabulary.pre)
    if row is None:
        raise TokenizerError(
            f"no tokenizer.json can be made for pre-tokenizer {vocabulary.pre!r}",
            hint=f"known are {', '.join(known_pre_tokenizers())}",
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return {
        "normalizer": None if row.normalizers[0] == "none" else {"type": row.normalizers[0]},
        "pre_tokenizer": pre_tokenizer_json(row),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": row.ignore_merges,
            "vocab": _vocab(vocabulary),
            "merges": list(vocabulary.merges or ()),
        },
    }


def _spm_parts(vocabulary: Vocabulary) -> dict[str, object]:
    # Prepend as a normalizer puts the space after each special token too, as llama.cpp does.
    prefix = vocabulary.add_space_prefix is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.special_ids.get("unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if prefix
        else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": _vocab(vocabulary),
            "merges": merges_of_scores(vocabulary, "the vocabulary"),
        },
    }


def _post_processor(vocabulary: Vocabulary) -> dict[str, object] | None:
    around = {name: _around(vocabulary, name) for name in (_BOS, _EOS) if adds(vocabulary, name)}
    if not around:
        return None

    def template(sequence: str, type_id: int) -> list[dict[str, object]]:
        items: list[dict[str, object]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        if _BOS in around:
            items.insert(0, {"SpecialToken": {"id": around[_BOS][0], "type_id": type_id}})
        if _EOS in around:
            items.append({"SpecialToken": {"id": around[_EOS][0], "type_id": type_id}})
        return items

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in around.values()
        },
    }


def _around(vocabulary: Vocabulary, name: str) -> tuple[str, int]:
    token_id = vocabulary.special_ids.get(name)
    if token_id is None:
        raise UnsupportedError(
            f"the tokenizer adds {name} to each text and names no {name} token",
            hint="correct the source's tokenizer: name the token, or say that it is not added",
        )
    return vocabulary.tokens[token_id], token_id


def _config(
    vocabulary: Vocabulary,
    named: Mapping[str, object],
    added: Mapping[int, dict[str, object]],
) -> dict[str, object]:
    row = pre_tokenizer_named(vocabulary.pre)
    flags = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "add_prefix_space": vocabulary.add_space_prefix,
    }
    config: dict[str, object] = {
        **{key: value for key, value in flags.items() if value is not None},
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        **named,
        "clean_up_tokenization_spaces": row.cleans_spaces if row else False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    templates = dict(vocabulary.chat_templates)
    if vocabulary.chat_template is not None:
        templates = {"default": vocabulary.chat_template, **templates}
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return config
