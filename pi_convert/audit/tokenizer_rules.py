"""Rules about the tokenizer's keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pi_convert.audit import llamacpp
from pi_convert.audit.findings import Finding, note, wrong
from pi_convert.audit.header import Header, plain
from pi_convert.audit.tokenizer_keys import (
    ADD_BOS,
    BOS,
    EOS,
    MERGES,
    MODEL,
    PRE,
    SCORES,
    TEMPLATE,
    TOKENS,
    TYPES,
    is_id_key,
)

EMBEDDING = "token_embd.weight"
# What llama.cpp takes where no id is stated; 11, GPT-2's, in other BPE tokenizers.
_DEFAULT_IDS = {
    (llamacpp.SPM_MODEL, BOS): "1",
    (llamacpp.SPM_MODEL, EOS): "2",
    (llamacpp.GEMMA4_MODEL, BOS): "none",
    (llamacpp.GEMMA4_MODEL, EOS): "none",
}
EXPORT = "Convert the tokenizer again from the original checkpoint."


def arrays(header: Header) -> Iterator[Finding]:
    """Tokens, scores, types and merges are there and of one length; the embedding agrees."""
    keys = header.file.keys
    model = header.text(MODEL)
    if model is None:
        yield wrong(
            "tokenizer.missing", f"{MODEL} is {'no string' if MODEL in keys else 'missing'}",
            "the tokenizer's kind; llama.cpp cannot load the file without", EXPORT,
        )  # fmt: skip
        return
    if model in llamacpp.NO_VOCABULARY:
        yield note("tokenizer.none", f"{MODEL} = {model}", "token ids only: no text goes in or out")
        return
    if model not in llamacpp.TOKENIZER_MODELS:
        yield wrong(
            "tokenizer.model.unknown",
            f"{MODEL} = {plain(model)}",
            f"a kind that llama.cpp {llamacpp.LLAMA_CPP_VERSION} knows, such as gpt2; it refuses"
            " any other",
            EXPORT,
        )
        return
    count = length(keys.get(TOKENS))
    if count is None:
        yield wrong("tokenizer.tokens.missing", f"{TOKENS} is missing", "the vocabulary", EXPORT)
        return
    yield from _beside_tokens(header, model, count)
    embedding = header.file.tensors.get(EMBEDDING)
    if embedding is not None and embedding.shape[0] != count:
        yield wrong(
            "tokenizer.size",
            f"{count} tokens, {EMBEDDING} has {embedding.shape[0]} rows",
            "one token for each row; llama.cpp refuses the file",
            EXPORT,
        )


def _beside_tokens(header: Header, model: str, count: int) -> Iterator[Finding]:
    keys = header.file.keys
    for key in (SCORES, TYPES):
        size = length(keys.get(key))
        if size is not None and size != count:
            make = wrong if size < count else note
            yield make("tokenizer.lengths", f"{key} has {size} values", f"{count}", EXPORT)
    if model == llamacpp.SPM_MODEL and SCORES not in keys:
        yield wrong(
            "tokenizer.scores.missing", f"{SCORES} is missing",
            "a score a token: SentencePiece merges by them", EXPORT,
        )  # fmt: skip
    if TYPES not in keys:
        yield note(
            "tokenizer.types.missing", f"{TYPES} is missing",
            "a type a token; without them special tokens are plain text", EXPORT,
        )  # fmt: skip
    merged = model in llamacpp.BPE_MODELS and header.text(PRE) not in llamacpp.MERGES_NOT_NEEDED
    if merged and MERGES not in keys:
        yield wrong(
            "tokenizer.merges.missing", f"{MERGES} is missing",
            "the merges; llama.cpp cannot load a BPE tokenizer without", EXPORT,
        )  # fmt: skip


def pre_tokenizer(header: Header) -> Iterator[Finding]:
    """A BPE tokenizer names a pre-tokenizer that llama.cpp knows."""
    if header.text(MODEL) not in llamacpp.BPE_MODELS_WITH_PRE:
        return
    pre = header.text(PRE)
    if not pre:
        yield wrong(
            "tokenizer.pre.missing",
            f"{PRE} is {'missing' if PRE not in header.file.keys else 'no name'}",
            "the pre-tokenizer's name; llama.cpp takes a default that splits text otherwise",
            EXPORT,
        )
    elif pre == "default":
        yield note(
            "tokenizer.pre.default",
            f"{PRE} = default",
            "the tokenizer's own pre-tokenizer; default suits few models",
            "pi-convert verify FILE --against SOURCE",
        )
    elif pre not in llamacpp.PRE_TOKENIZERS:
        yield wrong(
            "tokenizer.pre.unknown",
            f"{PRE} = {plain(pre)}",
            f"a name that llama.cpp {llamacpp.LLAMA_CPP_VERSION} knows; it refuses any other",
            EXPORT,
        )


def special_tokens(header: Header) -> Iterator[Finding]:
    """Ids of special tokens are inside the vocabulary, and BOS can be added where it is."""
    keys = header.file.keys
    count = length(keys.get(TOKENS))
    if count is None:
        return
    outside = []
    for key, value in keys.items():
        if is_id_key(key) and isinstance(value, int) and not 0 <= value < count:
            outside.append(key)
            yield (wrong if key in (BOS, EOS) else note)(
                "tokenizer.id.out-of-range",
                f"{key} = {value}",
                f"an id below {count}; llama.cpp falls back to its default for this tokenizer",
                EXPORT,
            )
    model = header.text(MODEL)
    for key in (BOS, EOS):
        if key not in keys and model in (*llamacpp.BPE_MODELS, llamacpp.SPM_MODEL):
            taken = _DEFAULT_IDS.get((model, key), "11")
            yield note(
                "tokenizer.id.missing", f"{key} is missing", f"the id; llama.cpp takes {taken}"
            )
    if keys.get(ADD_BOS) is True and (BOS not in keys or BOS in outside):
        yield wrong(
            "tokenizer.bos.unusable",
            f"{ADD_BOS} = true, {BOS} is {'out of range' if BOS in outside else 'missing'}",
            "a BOS token that exists, or false",
            EXPORT,
        )
    if ADD_BOS not in keys and model in (*llamacpp.BPE_MODELS, llamacpp.SPM_MODEL):
        adds = model == llamacpp.SPM_MODEL or header.text(PRE) in llamacpp.PRE_TOKENIZERS_ADDING_BOS
        yield note(
            "tokenizer.add-bos.missing",
            f"{ADD_BOS} is missing",
            f"stated; llama.cpp {'adds' if adds else 'does not add'} BOS for this tokenizer",
        )


def chat_template(header: Header) -> Iterator[Finding]:
    """A chat template is there and not empty."""
    if not (header.text(TEMPLATE) or "").strip():
        yield note(
            "tokenizer.chat-template.missing",
            f"{TEMPLATE} is {'empty' if TEMPLATE in header.file.keys else 'missing'}",
            "the model's own, if it is a chat model; runtimes guess one otherwise",
        )


def length(value: object) -> int | None:
    """The length of an array value, None for anything else."""
    return len(value) if isinstance(value, list | np.ndarray) else None
