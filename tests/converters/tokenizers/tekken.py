"""A real byte-level vocabulary for tests: the head of a Tekken file that mistral-common ships."""

from __future__ import annotations

import base64
import json
from functools import cache
from itertools import pairwise
from typing import Any

from converters.tokenizers.pretokenizers import byte_alphabet

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def text_of(token: bytes) -> str:
    """A token's bytes as a byte-level vocabulary writes them."""
    return "".join(byte_alphabet()[value] for value in token)


@cache
def ranks(size: int) -> dict[bytes, int]:
    """The first ``size`` tokens of mistral-common's Tekken vocabulary."""
    from tests.sdist import mistral_common_data

    path = mistral_common_data() / "tekken_240911.json"
    entries = json.loads(path.read_bytes())["vocab"][:size]
    return {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}


def split_in_two(token: bytes, known: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that merges last into ``token``, by tokens of lower rank, or None."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        pairs = [
            (known.get(left + right, known[token]), i)
            for i, (left, right) in enumerate(pairwise(parts))
        ]
        rank, index = min(pairs)
        if rank >= known[token]:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


@cache
def _parts(size: int) -> tuple[dict[str, int], list[list[str]]]:
    known = ranks(size)
    offset = len(SPECIAL_TOKENS)
    vocab = {text: i for i, text in enumerate(SPECIAL_TOKENS)}
    vocab |= {text_of(token): rank + offset for token, rank in known.items()}
    pairs = [split_in_two(token, known) for token in known if len(token) > 1]
    merges = [[text_of(left), text_of(right)] for left, right in filter(None, pairs)]
    return vocab, merges


def tokenizer_json(
    pre_tokenizer: object, *, size: int = 8000, ignore_merges: bool = False, **top: object
) -> dict[str, Any]:
    """A tokenizer.json of that vocabulary with the given pre-tokenizer."""
    vocab, merges = _parts(size)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": True, **plain}
            for i, text in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
        **top,
    }
