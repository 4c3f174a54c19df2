"""Tokenizers: what a folder or a GGUF holds, as one value that every target and check reads."""

from converters.tokenizers.gguf_keys import vocabulary_from_gguf, vocabulary_to_gguf
from converters.tokenizers.huggingface import read_tokenizer
from converters.tokenizers.pretokenizers import known_pre_tokenizers
from converters.tokenizers.tokenizer_json import build_tokenizer_files
from converters.tokenizers.vocabulary import TokenType, Vocabulary, VocabularyKind

__all__ = [
    "TokenType",
    "Vocabulary",
    "VocabularyKind",
    "build_tokenizer_files",
    "known_pre_tokenizers",
    "read_tokenizer",
    "vocabulary_from_gguf",
    "vocabulary_to_gguf",
]
