"""Folders and GGUF files with a tokenizer and nothing else, and how to read the latter back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.containers.gguf import read_gguf_file
from converters.tokenizers import Vocabulary, vocabulary_to_gguf

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_folder(folder: Path, **files: Any) -> Path:
    """Writes ``tokenizer=...`` as tokenizer.json, ``tokenizer_config=...`` and so on."""
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def write_gguf(path: Path, vocabulary: Vocabulary) -> Path:
    """A GGUF with the vocabulary's keys, which llama.cpp loads with ``vocab_only``."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in vocabulary_to_gguf(vocabulary).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.add_uint32("llama.vocab_size", vocabulary.size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@cache
def _read_keys(path: Path) -> Mapping[str, object]:
    keys = read_gguf_file(path).keys
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in keys.items()
        if key.startswith("tokenizer.")
    }


def read_keys(path: Path) -> dict[str, object]:
    """The ``tokenizer.*`` keys of a GGUF (gguf-py's reader takes seconds for them)."""
    return dict(_read_keys(path))
