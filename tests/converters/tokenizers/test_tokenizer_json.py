from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.errors import TokenizerError
from converters.tokenizers import (
    TokenType,
    Vocabulary,
    VocabularyKind,
    build_tokenizer_files,
    read_tokenizer,
    vocabulary_from_gguf,
    vocabulary_to_gguf,
)
from tests.converters.tokenizers.folders import read_keys
from tests.converters.tokenizers.test_gguf_keys import NAMED

SEPARATOR = "\n__ggml_vocab_test__\n"


def write_built(folder: Path, vocabulary: Vocabulary) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in build_tokenizer_files(vocabulary).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", NAMED)
def test_llama_cpps_own_vectors(name: str, llama_cpp_source: Path) -> None:
    """The ids that llama.cpp's tests expect, from the tokenizer.json made of its keys."""
    from tokenizers import Tokenizer

    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    files = build_tokenizer_files(vocabulary_from_gguf(read_keys(path), name))
    backend = Tokenizer.from_str(files["tokenizer.json"].decode())
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().splitlines()
    expected = [[int(i) for i in line.split()] for line in lines]
    found = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert len(texts) > 40
    assert found[: len(expected)] == expected[: len(found)]


@pytest.mark.parametrize("name", ["default", "llama-spm", "llama-bpe", "qwen2", "deepseek-coder"])
def test_there_and_back(
    name: str, llama_cpp_source: Path, default_gguf: Path, tmp_path: Path
) -> None:
    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    keys = read_keys(default_gguf if name == "default" else path)
    vocabulary = vocabulary_from_gguf(keys, name)
    folder = write_built(tmp_path / "folder", vocabulary)
    back = vocabulary_to_gguf(read_tokenizer(folder, vocabulary.size, config={}))
    # what llama.cpp adds by default is said outright in a folder
    assert back.pop("tokenizer.ggml.add_bos_token", False) in (
        keys.pop("tokenizer.ggml.add_bos_token", None),
        name == "llama-bpe",
    )
    if name == "llama-spm":  # scores keep their order, types gain what added tokens are
        check_spm(keys, back)
    if name == "deepseek-coder":  # its file took some bracketed tokens for plain ones
        old, new = (side.pop("tokenizer.ggml.token_type") for side in (keys, back))
        pairs = set(zip(old, new, strict=True))  # type: ignore[call-overload]
        assert {pair for pair in pairs if pair[0] != pair[1]} == {(4, 3)}
    assert back == keys


def check_spm(keys: dict[str, Any], back: dict[str, Any]) -> None:
    old, new = keys.pop("tokenizer.ggml.scores"), back.pop("tokenizer.ggml.scores")
    types = keys.pop("tokenizer.ggml.token_type")
    assert back.pop("tokenizer.ggml.token_type")[1:] == types[1:]
    tokens = keys["tokenizer.ggml.tokens"]
    normal = [i for i, kind in enumerate(types) if kind == 1 and len(tokens[i]) > 1]
    by_old = sorted(normal, key=lambda i: -old[i])
    assert by_old == sorted(normal, key=lambda i: -new[i])


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("default", "llama"),
        ("default", None),
        ("llama-spm", "llama"),
        ("llama-spm", None),
        ("llama-bpe", "llama"),
        ("qwen2", "qwen2"),
    ],
)
def test_transformers_loads_what_was_made(
    name: str,
    model_type: str | None,
    llama_cpp_source: Path,
    default_gguf: Path,
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    vocabulary = vocabulary_from_gguf(read_keys(default_gguf if name == "default" else path), name)
    folder = write_built(tmp_path / "folder", vocabulary)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "  Hello wörld, it's 12,345 tokens\n\n\tof 日本語 🦙."
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded.encode(text) == own.encode(text).ids
    assert loaded.bos_token_id == vocabulary.special_ids["bos"]
    assert loaded.eos_token_id == vocabulary.special_ids["eos"]
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.chat_template == vocabulary.chat_template


def test_llama_cpps_converter_recognises_the_default_model(
    default_gguf: Path, llama_cpp_source: Path, tmp_path: Path
) -> None:
    """Its hash of the ids of a test text is the one it has for SmolLM."""
    import re
    from hashlib import sha256

    from tokenizers import Tokenizer

    source = (llama_cpp_source / "conversion" / "base.py").read_text(encoding="utf-8")
    line = next(row for row in source.splitlines() if row.strip().startswith("chktxt = "))
    text = eval(line.split("=", 1)[1])
    vocabulary = vocabulary_from_gguf(read_keys(default_gguf), "default")
    files = build_tokenizer_files(vocabulary)
    ids = Tokenizer.from_str(files["tokenizer.json"].decode()).encode(text).ids
    digest = sha256(str(ids).encode()).hexdigest()
    found = re.search(rf'"{digest}":\s+# ref: \S+\s+res = "([^"]+)"', source)
    assert found is not None
    assert found[1] == vocabulary.pre


def test_chat_templates_are_embedded(llama_cpp_source: Path) -> None:
    keys = read_keys(llama_cpp_source / "models" / "ggml-vocab-command-r.gguf")
    files = build_tokenizer_files(vocabulary_from_gguf(keys, "command-r"))
    config = json.loads(files["tokenizer_config.json"])
    assert [entry["name"] for entry in config["chat_template"]] == ["default", "tool_use", "rag"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def spm(scores: tuple[float, ...]) -> Vocabulary:
    tokens = ("<unk>", "a", "b", "ab", "ba")
    types = (TokenType.UNKNOWN, *(TokenType.NORMAL,) * 4)
    return Vocabulary(VocabularyKind.SPM, "default", tokens, types, scores, add_bos=False)


def test_pieces_with_one_score_have_lost_their_order() -> None:
    build_tokenizer_files(spm((0, -3, -4, -1, -2)))
    with pytest.raises(TokenizerError, match="share a score"):
        build_tokenizer_files(spm((-1000,) * 5))


def test_an_unknown_pre_tokenizer_makes_no_tokenizer_json() -> None:
    types = (TokenType.NORMAL,) * 2
    vocabulary = Vocabulary(VocabularyKind.BPE, "whitespace", ("a", "b"), types, merges=())
    with pytest.raises(TokenizerError, match="whitespace"):
        build_tokenizer_files(vocabulary)
