from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from converters.tokenizers import (
    TokenType,
    Vocabulary,
    build_tokenizer_files,
    read_tokenizer,
    vocabulary_from_gguf,
)
from pi_convert.runtimes.llamacpp import LlamaCppTokenizer
from pi_convert.verify.tokenizer import MINIMUM_TOKENS, TokenizerComparison, compare_tokenizers
from pi_convert.verify.tokenizer_reference import reference_encoder
from tests.converters.tokenizers.folders import read_keys, write_gguf
from tests.converters.tokenizers.test_read_tokenizer import SPM_FILES, mistral_file

TEXTS = ["\n\n".join(topics.values())[:100_000]]


def compare(artifact: Path, source: Vocabulary, *, seed: int = 0) -> TokenizerComparison:
    with LlamaCppTokenizer(artifact) as runtime:
        return compare_tokenizers(runtime, reference_encoder(source), source, TEXTS, seed=seed)


@pytest.fixture(scope="module")
def default(default_gguf: Path) -> Vocabulary:
    return vocabulary_from_gguf(read_keys(default_gguf), "default")


def test_the_default_model(default_gguf: Path, default: Vocabulary) -> None:
    found = compare(default_gguf, default)
    assert found.ok, found.mismatches
    assert found.tokens >= MINIMUM_TOKENS
    assert set(found.cases) == {
        *("empty", "text", "added tokens", "spaces", "digits", "chat", "unicode"),
    }
    assert found.cases["chat"] == 2


def test_a_folder_made_of_the_default_model(
    default_gguf: Path, default: Vocabulary, tmp_path: Path
) -> None:
    for name, data in build_tokenizer_files(default).items():
        (tmp_path / name).write_bytes(data)
    source = read_tokenizer(tmp_path, default.size, config={})
    found = compare(default_gguf, source, seed=1)
    assert found.ok, found.mismatches


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2", "deepseek-llm", "starcoder"])
def test_llama_cpps_vocabularies(name: str, llama_cpp_source: Path) -> None:
    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    found = compare(path, vocabulary_from_gguf(read_keys(path), name))
    assert found.ok, found.mismatches


@pytest.mark.parametrize("name", SPM_FILES)
def test_tokenizer_model_against_sentencepiece(name: str, tmp_path: Path) -> None:
    shutil.copy(mistral_file(name), tmp_path / "tokenizer.model")
    size = 32000 if name.endswith("v1") else 32768
    source = read_tokenizer(tmp_path, size, config={})
    found = compare(write_gguf(tmp_path / "v.gguf", source), source)
    assert found.oracle == "sentencepiece"
    assert found.ok, found.mismatches


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_tokenizer_json(legacy: bool, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    shutil.copy(mistral_file("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    LlamaTokenizer.from_pretrained(tmp_path, legacy=legacy).save_pretrained(tmp_path / "saved")
    source = read_tokenizer(tmp_path / "saved", 32000, config={})
    found = compare(write_gguf(tmp_path / "v.gguf", source), source)
    assert found.oracle == "tokenizers"
    assert found.ok, found.mismatches


def swapped(vocabulary: Vocabulary) -> Vocabulary:
    tokens = list(vocabulary.tokens)
    one, two = tokens.index("Ġthe"), tokens.index("Ġand")
    tokens[one], tokens[two] = tokens[two], tokens[one]
    return replace(vocabulary, tokens=tuple(tokens))


def without_a_merge(vocabulary: Vocabulary) -> Vocabulary:
    assert vocabulary.merges is not None
    return replace(vocabulary, merges=tuple(m for m in vocabulary.merges if m != "Ġt he"))


def with_plain_token(vocabulary: Vocabulary) -> Vocabulary:
    types = list(vocabulary.types)
    types[vocabulary.tokens.index("<repo_name>")] = TokenType.NORMAL
    return replace(vocabulary, types=tuple(types))


@pytest.mark.parametrize(
    ("fault", "groups"),
    [
        (lambda v: replace(v, pre="qwen2"), {"text", "spaces", "chat"}),
        (lambda v: replace(v, pre="gpt-2"), {"text", "unicode"}),
        (lambda v: replace(v, add_bos=True), {"empty", "text"}),
        (lambda v: replace(v, add_eos=True), {"empty", "text"}),
        (without_a_merge, {"text"}),
        (swapped, {"text"}),
        (with_plain_token, {"added tokens"}),
    ],
)
def test_faults_are_seen(
    fault: Callable[[Vocabulary], Vocabulary],
    groups: set[str],
    default: Vocabulary,
    tmp_path: Path,
) -> None:
    found = compare(write_gguf(tmp_path / "v.gguf", fault(default)), default)
    assert not found.ok
    assert groups <= set(found.failures)
    assert found.mismatches[0].expected != found.mismatches[0].found


def test_a_wrong_bos_is_seen(llama_cpp_source: Path, tmp_path: Path) -> None:
    path = llama_cpp_source / "models" / "ggml-vocab-llama-spm.gguf"
    source = vocabulary_from_gguf(read_keys(path), "llama-spm")
    wrong = replace(source, special_ids={**source.special_ids, "bos": 2})
    found = compare(write_gguf(tmp_path / "v.gguf", wrong), source)
    assert not found.ok
    assert "text" in found.failures


def test_the_same_seed_asks_the_same(default_gguf: Path, default: Vocabulary) -> None:
    assert compare(default_gguf, default, seed=3) == compare(default_gguf, default, seed=3)
    assert compare(default_gguf, default, seed=3) != compare(default_gguf, default, seed=4)
