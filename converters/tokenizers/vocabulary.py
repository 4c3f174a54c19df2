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
    """A tokenizer as data. Token ``i`` is ``tokens[i]`` of ``types[i]``.

    Added tokens are those of type CONTROL and USER_DEFINED. ``None`` in a flag means that the
    source does not say and that llama.cpp's own default for this tokenizer is the right one.
    """

    kind: VocabularyKind
    pre: str  # GGUF's name of the pre-tokenizer; "default" for SPM
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None = None  # SPM (a BPE file may carry them; nothing reads them)
    merges: tuple[str, ...] | None = None  # BPE: "left right"
    special_ids: Mapping[str, int] = field(default_factory=dict)  # bos, eos, unknown, padding, ...
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # further ones, by name
    other_keys: Mapping[str, object] = field(default_factory=dict)  # GGUF keys carried unread
    files: Mapping[str, bytes] = field(default_factory=dict)  # the original files, by name

    @property
    def size(self) -> int:
        """Number of token ids, added tokens and padding included."""
        return len(self.tokens)

    @property
    def added_ids(self) -> tuple[int, ...]:
        """Ids of the added tokens, in order."""
        added = (TokenType.CONTROL, TokenType.USER_DEFINED)
        return tuple(i for i, kind in enumerate(self.types) if kind in added)


def padding_token(token_id: int) -> str:
    """Text of the unused token that fills an embedding row without a token, as llama.cpp's."""
    return f"[PAD{token_id}]"
