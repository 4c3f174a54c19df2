from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers import TokenType, Vocabulary, VocabularyKind, read_tokenizer
from converters.tokenizers.pretokenizers import pre_tokenizer_json, pre_tokenizer_named
from tests.converters.tokenizers.folders import NAMED, read_keys, write_folder
from tests.converters.tokenizers.tekken import SPECIAL_TOKENS, tokenizer_json

SIZE = 8005


def mistral_file(name: str) -> Path:
    from tests.sdist import mistral_common_data

    return mistral_common_data() / name


def qwen2_json(**changed: Any) -> dict[str, Any]:
    row = pre_tokenizer_named("qwen2")
    assert row is not None
    return tokenizer_json(pre_tokenizer_json(row), normalizer={"type": "NFC"}, **changed)


def template(*names: str | None) -> dict[str, object]:
    single = [
        {"SpecialToken": {"id": name, "type_id": 0}} if name else {"Sequence": {"id": "A"}}
        for name in names
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


def read(folder: Path, rows: int = SIZE, **config: Any) -> Vocabulary:
    return read_tokenizer(folder, rows, config=config)


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer=qwen2_json(), tokenizer_config=NAMED)
    vocabulary = read(folder, SIZE + 3)
    assert vocabulary.tokens[-1] == f"[PAD{SIZE + 2}]"
    assert vocabulary.types[-4:] == (TokenType.NORMAL, *(TokenType.UNUSED,) * 3)
    assert vocabulary.tokens[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS
    assert vocabulary.types[: len(SPECIAL_TOKENS)] == (TokenType.CONTROL,) * len(SPECIAL_TOKENS)
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert set(vocabulary.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_ids_past_the_embedding_name_both_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer=qwen2_json())
    with pytest.raises(TokenizerError, match=r"ids up to 8004.*8000 rows"):
        read(folder, 8000)


def test_types_of_added_tokens(tmp_path: Path) -> None:
    tokenizer = qwen2_json()
    texts = ["<|look|>", "<｜end｜>", "plain", "▁space", "<pad>"]
    tokenizer["added_tokens"] += [
        {"id": SIZE + i, "content": text, "special": False} for i, text in enumerate(texts)
    ]
    vocabulary = read(write_folder(tmp_path, tokenizer=tokenizer), SIZE + 5)
    control, user = TokenType.CONTROL, TokenType.USER_DEFINED
    assert vocabulary.types[-5:] == (control, control, user, user, control)
    assert vocabulary.tokens[-2] == " space"


@pytest.mark.parametrize(
    ("node", "flags", "expected"),
    [
        (None, {}, (None, None)),
        ({"type": "ByteLevel"}, {}, (False, False)),
        (template("<s>", None), {}, (True, None)),
        (template("<s>", None, "</s>"), {}, (True, True)),
        (template(None), {}, (False, None)),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", None)]},
            {},
            (True, False),
        ),
        (template("<s>", None), {"add_bos_token": False}, (False, None)),
        (None, {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_what_is_added(
    node: object, flags: dict[str, bool], expected: tuple[bool | None, bool | None], tmp_path: Path
) -> None:
    folder = write_folder(
        tmp_path, tokenizer=qwen2_json(post_processor=node), tokenizer_config={**NAMED, **flags}
    )
    vocabulary = read(folder)
    assert (vocabulary.add_bos, vocabulary.add_eos) == expected


def test_a_llama_3_tokenizer_that_adds_nothing_says_so(tmp_path: Path) -> None:
    row = pre_tokenizer_named("llama-bpe")
    assert row is not None
    tokenizer = tokenizer_json(pre_tokenizer_json(row), ignore_merges=True)
    vocabulary = read(write_folder(tmp_path, tokenizer=tokenizer))
    assert (vocabulary.pre, vocabulary.add_bos) == ("llama-bpe", False)


@pytest.mark.parametrize(
    "node",
    [
        template("<s>", "[INST]", None),
        template("[INST]", None),
        {"type": "BertProcessing"},
        {"type": "RobertaProcessing"},
    ],
)
def test_templates_that_gguf_cannot_say_are_refused(node: object, tmp_path: Path) -> None:
    tokenizer = qwen2_json(post_processor=node)
    folder = write_folder(tmp_path, tokenizer=tokenizer, tokenizer_config=NAMED)
    with pytest.raises(UnsupportedError):
        read(folder)


def test_special_ids_come_from_the_tokenizer_then_the_config(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    folder = write_folder(tmp_path, tokenizer=qwen2_json(), tokenizer_config=config)
    ids = {"bos_token_id": 9, "eos_token_id": [2, 3], "pad_token_id": 4, "unk_token_id": -1}
    assert read(folder, **ids).special_ids == {"bos": 1, "eos": 2, "padding": 4}
    with pytest.raises(TokenizerError, match="past the embedding"):
        read(write_folder(tmp_path, tokenizer_config={}), bos_token_id=SIZE)
    with pytest.raises(TokenizerError, match="is no token"):
        read(write_folder(tmp_path, tokenizer_config={"eos_token": "<nope>"}))


def test_chat_templates(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    config = {**NAMED, "chat_template": listed}
    folder = write_folder(tmp_path, tokenizer=qwen2_json(), tokenizer_config=config)
    assert read(folder).chat_template == "a"
    assert read(folder).chat_templates == {"tools": "b"}
    (folder / "chat_template.jinja").write_text("c", encoding="utf-8")
    assert read(folder).chat_template == "c"
    assert "chat_template.jinja" in read(folder).files


def test_vocab_and_merges_alone_need_a_class_that_fixes_the_splitting(tmp_path: Path) -> None:
    model = qwen2_json()["model"]
    folder = write_folder(tmp_path, vocab=model["vocab"], tokenizer_config=NAMED)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TokenizerError, match="tokenizer_class is None"):
        read(folder)
    write_folder(tmp_path, tokenizer_config={**NAMED, "tokenizer_class": "Qwen2Tokenizer"})
    vocabulary = read(folder)
    assert vocabulary.pre == "qwen2"
    assert vocabulary.merges is not None
    assert [merge.split(" ") for merge in vocabulary.merges] == model["merges"]


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"type": "Unigram"}, UnsupportedError, "Unigram"),
        ({"type": "WordPiece"}, UnsupportedError, "WordPiece"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedError, "end_of_word_suffix"),
        ({"dropout": 0.1}, UnsupportedError, "dropout"),
        ({"merges": None}, TokenizerError, "vocab and merges"),
        ({"merges": [["a", "b c"]]}, TokenizerError, "'b c' is no token"),
        ({"merges": [["a", "zzzz"]]}, TokenizerError, "'zzzz' is no token"),
        ({"merges": ["a \u0120the"]}, TokenizerError, "'a\u0120the' is no token"),
        (
            {"vocab": {"a": 0, "b c": 1, "ab c": 2}, "merges": [["a", "b c"]]},
            TokenizerError,
            "merge 'a b c' does not have two parts without spaces",
        ),
    ],
)
def test_models_that_cannot_be_expressed(
    changed: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    tokenizer = qwen2_json()
    tokenizer["model"] |= changed
    with pytest.raises(error, match=named):
        read(write_folder(tmp_path, tokenizer=tokenizer))


def test_no_tokenizer_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not valid JSON"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        read(tmp_path)


def test_reading_a_large_tokenizer_json_is_quick(llama_cpp_source: Path, tmp_path: Path) -> None:
    from converters.tokenizers import build_tokenizer_files, vocabulary_from_gguf

    keys = read_keys(llama_cpp_source / "models" / "ggml-vocab-qwen2.gguf")
    built = build_tokenizer_files(vocabulary_from_gguf(keys, "qwen2"))
    for name, data in built.items():
        (tmp_path / name).write_bytes(data)
    start = time.process_time()
    read_tokenizer(tmp_path, 151936, config={})
    assert time.process_time() - start < 1.5  # 0.3 s measured on an idle core


SPM_FILES = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
]


@pytest.mark.parametrize("name", SPM_FILES)
def test_tokenizer_model_agrees_with_sentencepiece(name: str, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    shutil.copy(mistral_file(name), tmp_path / "tokenizer.model")
    processor = SentencePieceProcessor(model_file=str(mistral_file(name)))
    size = processor.vocab_size()
    vocabulary = read(tmp_path, size + 2)
    assert vocabulary.scores is not None
    assert vocabulary.kind is VocabularyKind.SPM
    assert list(vocabulary.scores[:size]) == [processor.get_score(i) for i in range(size)]
    asked = {
        TokenType.CONTROL: processor.is_control,
        TokenType.BYTE: processor.is_byte,
        TokenType.UNKNOWN: processor.is_unknown,
        TokenType.UNUSED: processor.is_unused,
    }
    for kind, is_kind in asked.items():
        found = [i for i in range(size) if vocabulary.types[i] is kind]
        assert found == [i for i in range(size) if is_kind(i)], kind
    pieces = [processor.id_to_piece(i) for i in range(size)]
    assert [text.replace(" ", "▁") for text in vocabulary.tokens[:size]] == pieces
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unknown": 0}


def test_added_tokens_lie_over_tokenizer_model(tmp_path: Path) -> None:
    shutil.copy(mistral_file("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    decoder = {"0": {"content": "<unk>", "special": True}}
    decoder["32001"] = {"content": "<|im_end|>", "special": False}
    write_folder(
        tmp_path,
        added_tokens={"<extra>": 32000},
        tokenizer_config={**NAMED, "added_tokens_decoder": decoder, "eos_token": "<|im_end|>"},
    )
    vocabulary = read(tmp_path, 32003)
    assert vocabulary.scores is not None
    assert vocabulary.tokens[32000:] == ("<extra>", "<|im_end|>", "[PAD32002]")
    user, control, unused = TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED
    assert vocabulary.types[32000:] == (user, control, unused)
    assert vocabulary.scores[32000:] == (-1000.0, -1000.0, -10000.0)
    assert vocabulary.types[0] is control
    assert vocabulary.special_ids["eos"] == 32001


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_tokenizer_json_has_the_models_order(legacy: bool, tmp_path: Path) -> None:
    """transformers' own conversion of a tokenizer.model, read without that model."""
    from transformers import LlamaTokenizer

    shutil.copy(mistral_file("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    original = read(tmp_path, 32000)
    LlamaTokenizer.from_pretrained(tmp_path, legacy=legacy).save_pretrained(tmp_path / "saved")
    vocabulary = read(tmp_path / "saved", 32000)
    assert vocabulary.kind is VocabularyKind.SPM
    assert vocabulary.tokens == original.tokens
    assert vocabulary.scores is not None
    assert original.scores is not None
    old, new = original.scores, vocabulary.scores
    merged = [i for i, text in enumerate(original.tokens) if len(text.strip("▁")) > 1 and i > 258]
    assert sorted(merged, key=lambda i: -old[i]) == sorted(merged, key=lambda i: -new[i])


def test_merges_that_sentencepiece_would_not_follow_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    shutil.copy(mistral_file("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    del tokenizer["model"]["merges"][100]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="1 pairs"):
        read(tmp_path / "saved", 32000)
