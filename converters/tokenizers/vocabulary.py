"""The value a tokenizer is read into: what GGUF, tokenizer.json and the runtimes all need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum


class VocabularyKind(Enum):
    """The tokenizer's algorithm, by the value of GGUF's ``tokenizer.ggml.model``."""

    BPE = "gpt2"  # byte-level BPE: merges, no scores
    SPM = "llama"  # SentencePiece BPE: scores, byte fallback


class TokenType(IntEnum):
    """GGUF's ``tokenizer.ggml.token_type`` (gguf-py ``TokenType``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as data. Token ``i`` is ``tokens[i]`` of ``types[i]``."""

    kind: VocabularyKind
    pre: str  # GGUF's name of the pre-tokenizer; "default" for SPM
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None = None  # SPM only
    merges: tuple[str, ...] | None = None  # BPE only: "left right"
    special_ids: Mapping[str, int] = field(
        default_factory=dict
    )  # bos, eos, unknown, padding, ... -> id
    add_bos: bool | None = None  # None: the source does not say
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    files: Mapping[str, bytes] = field(
        default_factory=dict
    )  # the original files, by name, for a folder target

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokens)
