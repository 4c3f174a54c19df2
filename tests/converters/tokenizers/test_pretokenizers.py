from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from converters.errors import TokenizerError
from converters.tokenizers import known_pre_tokenizers, read_tokenizer
from converters.tokenizers.pretokenizers import (
    _table,
    pre_tokenizer_json,
    pre_tokenizer_named,
    recognise,
)
from pi_convert.runtimes.llamacpp import LlamaCppTokenizer
from pi_convert.verify.tokenizer_reference import reference_encoder
from pi_convert.verify.tokenizer_texts import random_unicode
from tests.converters.tokenizers.folders import NAMED, write_folder, write_gguf
from tests.converters.tokenizers.tekken import tokenizer_json

LLAMA3 = _table().patterns["llama3"]
RANDOM_TEXTS = 400


def model_json(name: str) -> dict[str, Any]:
    row = pre_tokenizer_named(name)
    assert row is not None
    form = row.normalizers[0]
    return {
        "pre_tokenizer": pre_tokenizer_json(row),
        "normalizer": None if form == "none" else {"type": form},
        "model": {"ignore_merges": row.ignore_merges},
    }


@pytest.mark.parametrize("name", known_pre_tokenizers())
def test_each_form_has_its_name(name: str) -> None:
    row = pre_tokenizer_named(name)
    assert row is not None
    assert recognise(model_json(name), cleans_spaces=row.cleans_spaces, where="here") == row


# Falcon splits bytes after mapping them to letters: exact with its own merges only
@pytest.mark.parametrize("name", [name for name in known_pre_tokenizers() if name != "falcon"])
def test_llama_cpp_splits_as_the_form_under_each_name(name: str, tmp_path: Path) -> None:
    row = pre_tokenizer_named(name)
    assert row is not None
    parts = model_json(name)
    tokenizer = tokenizer_json(
        parts["pre_tokenizer"],
        ignore_merges=row.ignore_merges,
        normalizer=parts["normalizer"],
    )
    config = {**NAMED, "clean_up_tokenization_spaces": row.cleans_spaces}
    folder = write_folder(tmp_path / "folder", tokenizer=tokenizer, tokenizer_config=config)
    vocabulary = read_tokenizer(folder, 8005, config={})
    assert vocabulary.pre == name
    reference = reference_encoder(vocabulary)
    with LlamaCppTokenizer(write_gguf(tmp_path / "v.gguf", vocabulary)) as runtime:
        for case in islice(random_unicode(seed=7), RANDOM_TEXTS):
            text = reference.prepare(case.text)
            expected = reference.encode(text, add_special=True, parse_special=True)
            assert runtime.encode(text, add_special=True, parse_special=True) == expected


def test_llama_cpp_knows_every_name(llama_cpp_source: Path) -> None:
    source = (llama_cpp_source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    names = [name for row in _table().rows for name in (row.name, *row.aliases)]
    assert [name for name in names if f'tokenizer_pre == "{name}"' not in source] == []
    assert len(names) == len(set(names))


def test_what_llama_cpp_does_by_name(llama_cpp_source: Path) -> None:
    """ignore_merges, adds_bos and cleans_spaces are those of the branch that has the name."""
    source = (llama_cpp_source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    for row in _table().rows:
        start = source.index(f'tokenizer_pre == "{row.name}"')
        branch = source[start : source.index("} else if", start)]
        assert ("ignore_merges = true" in branch) == row.ignore_merges, row.name
        assert ("add_bos = true" in branch) == row.adds_bos, row.name
        assert ("clean_spaces = false" not in branch) == row.cleans_spaces, row.name


@pytest.mark.parametrize(
    "spelling",
    [
        {"pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": True},
        {
            "pattern": {"Regex": LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")},
            "behavior": "Isolated",
            "invert": False,
        },
    ],
)
def test_other_spellings_are_the_same(spelling: dict[str, object]) -> None:
    tokenizer = model_json("llama-bpe")
    tokenizer["pre_tokenizer"]["pretokenizers"][0] = {"type": "Split", **spelling}
    assert recognise(tokenizer, cleans_spaces=True, where="here").name == "llama-bpe"


@pytest.mark.parametrize(
    ("cleans_spaces", "name"), [(False, "smollm"), (None, "smollm"), (True, "starcoder")]
)
def test_how_spaces_are_cleaned_tells_equal_forms_apart(
    cleans_spaces: bool | None, name: str
) -> None:
    tokenizer = model_json("smollm")
    assert recognise(tokenizer, cleans_spaces=cleans_spaces, where="here").name == name


def split(regex: str, **other: object) -> dict[str, object]:
    node = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {**node, **other}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "BertPreTokenizer"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(LLAMA3)]}},
        {"pre_tokenizer": [split(LLAMA3.replace("{1,3}", "{1,2}")), BYTE_LEVEL]},
        {"pre_tokenizer": [split(LLAMA3, behavior="MergedWithNext"), BYTE_LEVEL]},
        {"pre_tokenizer": [split(LLAMA3, invert=True), BYTE_LEVEL]},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
    ],
)
def test_what_is_not_in_the_table_is_an_error(changed: dict[str, Any]) -> None:
    nodes = changed.get("pre_tokenizer")
    if isinstance(nodes, list):
        changed = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": nodes}}
    with pytest.raises(TokenizerError) as caught:
        recognise({**model_json("llama-bpe"), **changed}, cleans_spaces=None, where="a/folder")
    assert "a/folder" in caught.value.message
    assert "llama-bpe" in caught.value.hint
    found = str(changed.get("normalizer") or changed.get("pre_tokenizer"))
    kinds = ("Bert", "Metaspace", "NFKC", "Lowercase")
    assert all(kind in caught.value.message for kind in kinds if kind in found)


def test_the_table_is_json_that_tokenizers_loads() -> None:
    from tokenizers import Tokenizer

    for name in known_pre_tokenizers():
        parts = model_json(name)
        Tokenizer.from_str(json.dumps(tokenizer_json(parts["pre_tokenizer"], size=300)))
