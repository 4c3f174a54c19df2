"""The tokenizer's keys under the names that a GGUF has them (gguf-py ``Keys.Tokenizer``)."""

from __future__ import annotations

PREFIX = "tokenizer.ggml."
MODEL = f"{PREFIX}model"
PRE = f"{PREFIX}pre"
TOKENS = f"{PREFIX}tokens"
SCORES = f"{PREFIX}scores"
TYPES = f"{PREFIX}token_type"
MERGES = f"{PREFIX}merges"
ADD_BOS = f"{PREFIX}add_bos_token"
ADD_EOS = f"{PREFIX}add_eos_token"
TEMPLATE = "tokenizer.chat_template"
_ID_SUFFIX = "_token_id"


def id_key(name: str) -> str:
    """The key of a special token's id, such as that of ``bos``."""
    return f"{PREFIX}{name}{_ID_SUFFIX}"


def is_id_key(key: str) -> bool:
    """Whether a key gives the id of a special token."""
    return key.startswith(PREFIX) and key.endswith(_ID_SUFFIX)


BOS = id_key("bos")
EOS = id_key("eos")
