from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers import TokenType, vocabulary_from_gguf, vocabulary_to_gguf
from tests.converters.tokenizers.folders import read_keys

NAMED = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)


def small(**changed: Any) -> dict[str, object]:
    keys: dict[str, object] = {
        "general.name": "not a tokenizer key",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }
    for name, value in changed.items():
        keys[f"tokenizer.ggml.{name}"] = value
    return {key: value for key, value in keys.items() if value is not None}


def test_the_default_model_keeps_every_key(default_gguf: Path) -> None:
    keys = read_keys(default_gguf)
    vocabulary = vocabulary_from_gguf(keys, "default")
    assert vocabulary_to_gguf(vocabulary) == keys
    assert (vocabulary.size, vocabulary.pre) == (49152, "smollm")
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}


@pytest.mark.parametrize("name", NAMED)
def test_llama_cpps_vocabularies_keep_every_key(name: str, llama_cpp_source: Path) -> None:
    keys = read_keys(llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf")
    assert vocabulary_to_gguf(vocabulary_from_gguf(keys, name)) == keys


def test_numpy_arrays_and_unread_keys() -> None:
    keys = small(token_type=np.array([1, 1, 1, 3], np.int32), add_sep_token=False)
    vocabulary = vocabulary_from_gguf(keys, "here")
    assert vocabulary.types[3] is TokenType.CONTROL
    assert vocabulary_to_gguf(vocabulary)["tokenizer.ggml.add_sep_token"] is False


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"pre": "default"}, "tokenizer.ggml.pre"),
        ({"pre": 3}, "tokenizer.ggml.pre is 3"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a", "b", "ab", 3]}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a", "<s>"]}, "repeats 1"),
        ({"token_type": [1, 1, 1]}, "3 values for 4 tokens"),
        ({"token_type": [1, 1, 1, 9]}, r"unknown types \[9\]"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"scores": [0.0]}, "1 values for 4 tokens"),
        ({"bos_token_id": 4}, "bos_token_id is 4"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
        ({"model": "llama", "scores": None}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(TokenizerError, match=named):
        vocabulary_from_gguf(small(**changed), "here")


def test_all_problems_come_together() -> None:
    with pytest.raises(TokenizerError) as caught:
        vocabulary_from_gguf(small(pre=None, merges=None, bos_token_id=9), "a.gguf")
    assert caught.value.message.count(";") == 2
    assert caught.value.message.startswith("a.gguf")


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "no_vocab", "gemma4"])
def test_other_algorithms_are_refused_by_name(model: str) -> None:
    with pytest.raises(UnsupportedError, match=model):
        vocabulary_from_gguf(small(model=model), "here")


def test_a_normalizer_in_the_keys_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="precompiled_charsmap"):
        vocabulary_from_gguf(small(precompiled_charsmap=[1]), "here")


def test_a_large_vocabulary_is_quick(llama_cpp_source: Path) -> None:
    keys = read_keys(llama_cpp_source / "models" / "ggml-vocab-qwen2.gguf")
    start = time.perf_counter()
    vocabulary_to_gguf(vocabulary_from_gguf(keys, "qwen2"))
    assert time.perf_counter() - start < 1.0  # 0.07 s measured for 152,000 tokens
