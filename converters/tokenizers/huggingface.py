"""The tokenizer of a Hugging Face folder as a vocabulary.

Follows llama.cpp's converter (conversion/base.py, gguf-py vocab.py, llama-cpp-python 0.3.36) in
token types, padding and special ids, so that metadata agree; where it drops or guesses, an error
is raised here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import TokenizerError, UnsupportedError, shown
from converters.tokenizers.postprocessor import Template, read_post_processor
from converters.tokenizers.pretokenizers import (
    PreTokenizer,
    canonical_normalizer,
    pre_tokenizer_of_class,
    recognise,
)
from converters.tokenizers.sentencepiece_model import read_sentencepiece_model
from converters.tokenizers.settings import (
    DAMAGED,
    SPECIAL_NAMES,
    AddedToken,
    TokenizerSettings,
    checked_id,
    optional,
    parse_json,
    parse_text,
    read_files,
    read_settings,
    token_ids,
)
from converters.tokenizers.spm import (
    ADDED_SCORE,
    PADDING_SCORE,
    SPACE,
    byte_token,
    scores_of_merges,
)
from converters.tokenizers.vocabulary import (
    TokenType,
    Vocabulary,
    VocabularyKind,
    padding_token,
)

# Added tokens that checkpoints forget to mark as special (llama.cpp conversion/base.py).
_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_FORMS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_SPECIAL_HINT = "correct it in tokenizer_config.json or config.json"
_MERGE_HINT = "expected two texts, as a list or with a space between them"
_CODE_LLAMA_EOT = "▁<EOT>"


@dataclass(slots=True)
class _Slots:
    """One slot for each row of the embedding, filled from the padding up."""

    tokens: list[str]
    types: list[TokenType]
    scores: list[float]

    @classmethod
    def of(cls, rows: int) -> _Slots:
        return cls(
            [padding_token(i) for i in range(rows)],
            [TokenType.UNUSED] * rows,
            [PADDING_SCORE] * rows,
        )

    def add(self, token: AddedToken, special_texts: frozenset[str]) -> None:
        special = token.special or token.text in special_texts or _looks_special(token.text)
        # llama.cpp matches a user-defined token in the raw text, where a space is a space
        self.tokens[token.id] = token.text if special else token.text.replace(SPACE, " ")
        self.types[token.id] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        self.scores[token.id] = ADDED_SCORE


def read_tokenizer(
    folder: Path, embedding_rows: int, *, config: Mapping[str, object]
) -> Vocabulary:
    """The vocabulary of the tokenizer in ``folder``, padded to ``embedding_rows`` tokens.

    ``config`` is the parsed config.json (for ids of special tokens that the tokenizer does not
    name). A ``tokenizer.model`` comes before a ``tokenizer.json``, this before ``vocab.json`` and
    ``merges.txt``. Raises TokenizerError when the tokenizer is missing, not recognised or larger
    than the embedding, UnsupportedError when its algorithm cannot be expressed.
    """
    files = read_files(folder)
    where = str(folder)
    settings = read_settings(files, config, where)
    tokenizer = (
        parse_json(files["tokenizer.json"], f"{where}/tokenizer.json")
        if "tokenizer.json" in files
        else None
    )
    source = _Source(where, files, embedding_rows, settings, tokenizer)
    if "tokenizer.model" in files:
        return _from_sentencepiece(source)
    if tokenizer is not None:
        return _from_tokenizer_json(source, tokenizer)
    if "vocab.json" in files and "merges.txt" in files:
        return _from_vocab_and_merges(source)
    raise TokenizerError(
        f"{where}: no tokenizer",
        hint="expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
    )


@dataclass(frozen=True, slots=True)
class _Source:
    where: str
    files: Mapping[str, bytes]
    rows: int
    settings: TokenizerSettings
    tokenizer: dict[str, object] | None

    def added(self) -> dict[int, AddedToken]:
        """Added tokens of every file; tokenizer_config.json's word on one is the last."""
        own = f"{self.where}/tokenizer.json"
        added: dict[int, AddedToken] = {}
        for entry in optional(self.tokenizer or {}, "added_tokens", list, own) or []:
            text = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(text, str):
                raise TokenizerError(
                    f"{own}: added_tokens has {shown(entry)}",
                    hint="expected objects with id and content",
                )
            number = checked_id(entry.get("id"), text, own)
            if number in added and added[number].text != text:
                raise TokenizerError(
                    f"{own}: id {number} is given to {added[number].text!r}, {text!r}", hint=DAMAGED
                )
            added[number] = AddedToken(number, text, special=bool(entry.get("special")))
        return added | dict(self.settings.added)

    def check_size(self, ids: int) -> None:
        """Raises TokenizerError when token ids reach past the embedding."""
        if ids > self.rows:
            raise TokenizerError(
                f"{self.where}: the tokenizer has ids up to {ids - 1}, "
                f"the embedding has {self.rows} rows",
                hint="resize the model's embedding, or use the tokenizer it was trained with",
            )


def _looks_special(text: str) -> bool:
    return text in _SPECIAL_TEXTS or any(
        text.startswith(start) and text.endswith(end) for start, end in _SPECIAL_FORMS
    )


def _from_sentencepiece(source: _Source) -> Vocabulary:
    model = read_sentencepiece_model(
        source.files["tokenizer.model"], f"{source.where}/tokenizer.model"
    )
    size = len(model.tokens)
    added = {i: t for i, t in source.added().items() if i >= size or i in source.settings.added}
    source.check_size(max(size, max(added, default=-1) + 1))
    slots = _Slots.of(source.rows)
    slots.tokens[:size] = [
        text.replace(SPACE, " ") if kind is TokenType.USER_DEFINED else text
        for text, kind in zip(model.tokens, model.types, strict=True)
    ]
    slots.types[:size], slots.scores[:size] = model.types, model.scores
    for token in added.values():
        slots.add(token, source.settings.special_texts)
    prefix = source.settings.add_space_prefix
    if not model.add_dummy_prefix:
        prefix = False
    spm = _Model(VocabularyKind.SPM, special_ids=model.special_ids)
    return _vocabulary(source, slots, spm, prefix)


def _from_tokenizer_json(source: _Source, tokenizer: dict[str, object]) -> Vocabulary:
    where = f"{source.where}/tokenizer.json"
    model = optional(tokenizer, "model", dict, where) or {}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedError(f"{where}: its algorithm is {kind}", hint="supported is BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                f"{where}: a BPE model with {key} is not supported",
                hint=f"llama.cpp has no {key}; only a tokenizer without it can be exported",
            )
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise TokenizerError(f"{where}: a BPE model needs vocab and merges", hint=DAMAGED)
    vocab = token_ids(vocab, where)
    added = source.added()
    source.check_size(max((*vocab.values(), *added), default=-1) + 1)
    if model.get("byte_fallback") and byte_token(0) in vocab:
        return _sentencepiece_json(source, tokenizer, vocab, _pairs(merges, vocab, where))
    row = recognise(tokenizer, cleans_spaces=source.settings.cleans_spaces, where=where)
    return _byte_level(source, row, vocab, _joined(merges, vocab, where))


def _from_vocab_and_merges(source: _Source) -> Vocabulary:
    row = pre_tokenizer_of_class(source.settings.class_name)
    if row is None:
        raise TokenizerError(
            f"{source.where}: vocab.json and merges.txt alone do not say how text is split, and "
            f"tokenizer_class is {source.settings.class_name!r}",
            hint="save the tokenizer again with transformers, so that it has a tokenizer.json",
        )
    vocab = parse_json(source.files["vocab.json"], f"{source.where}/vocab.json")
    ids = token_ids(vocab, f"{source.where}/vocab.json")
    text = parse_text(source.files["merges.txt"], f"{source.where}/merges.txt")
    lines = text.split("\n")
    merges: list[object] = [
        line.rstrip("\r") for line in lines if line.strip() and line[:8] != "#version"
    ]
    source.check_size(max((*ids.values(), *source.settings.added), default=-1) + 1)
    return _byte_level(source, row, ids, _joined(merges, ids, f"{source.where}/merges.txt"))


def _byte_level(
    source: _Source, row: PreTokenizer, vocab: Mapping[str, int], merges: tuple[str, ...]
) -> Vocabulary:
    slots = _Slots.of(source.rows)
    for text, token_id in vocab.items():
        slots.tokens[token_id] = text
        slots.types[token_id] = TokenType.NORMAL
    _add_tokens(source, slots, vocab)
    bpe = _Model(VocabularyKind.BPE, row, merges)
    return _vocabulary(source, slots, bpe, source.settings.add_space_prefix)


def _sentencepiece_json(
    source: _Source,
    tokenizer: Mapping[str, object],
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
) -> Vocabulary:
    where = f"{source.where}/tokenizer.json"
    prefix = _space_prefix(tokenizer, where)
    missing = [byte_token(value) for value in range(256) if byte_token(value) not in vocab]
    if missing:
        raise TokenizerError(
            f"{where}: byte tokens are missing: {', '.join(missing[:4])} ...", hint=DAMAGED
        )
    added = {token.text for token in source.added().values()}
    bytes_ = {byte_token(value) for value in range(256)}
    normal = {text: i for text, i in vocab.items() if text not in added and text not in bytes_}
    scores = scores_of_merges(merges, normal, where)
    slots = _Slots.of(source.rows)
    for text, token_id in vocab.items():
        slots.tokens[token_id] = text
        slots.types[token_id] = TokenType.NORMAL if text in normal else TokenType.BYTE
        slots.scores[token_id] = scores.get(text, 0.0)
    _add_tokens(source, slots, vocab)
    return _vocabulary(source, slots, _Model(VocabularyKind.SPM), prefix)


def _add_tokens(source: _Source, slots: _Slots, vocab: Mapping[str, int]) -> None:
    added = source.added()
    for token in added.values():
        if vocab.get(token.text, token.id) != token.id:
            raise TokenizerError(
                f"{source.where}: added token {token.text!r} has id {token.id}, "
                f"the vocabulary gives it {vocab[token.text]}",
                hint=DAMAGED,
            )
        in_vocab = slots.types[token.id] is not TokenType.UNUSED
        if (
            in_vocab
            and token.id not in source.settings.added
            and (slots.tokens[token.id] != token.text)
        ):
            raise TokenizerError(
                f"{source.where}/tokenizer.json: added token {token.text!r} has id {token.id}, "
                f"which the vocabulary gives to {slots.tokens[token.id]!r}",
                hint=DAMAGED,
            )
        slots.add(token, source.settings.special_texts)


def _space_prefix(tokenizer: Mapping[str, object], where: str) -> bool | None:
    """GGUF's ``add_space_prefix``; None is llama.cpp's default for SentencePiece, which is true.

    Raises UnsupportedError for a normalizer or pre-tokenizer that is not SentencePiece's.
    """
    normalizer = canonical_normalizer(tokenizer.get("normalizer"))
    node = tokenizer.get("pre_tokenizer")
    if isinstance(node, Mapping) and node.get("type") == "Metaspace" and normalizer == "none":
        scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space") else None)
        if node.get("replacement") == SPACE and scheme in ("first", "always", "never"):
            return False if scheme == "never" else None
    elif node is None and normalizer in ("Prepend+Replace", "Replace"):
        return False if normalizer == "Replace" else None
    raise UnsupportedError(
        f"{where}: its normalizer {normalizer} with pre-tokenizer {shown(node)} is not"
        " SentencePiece's",
        hint="expected Prepend and Replace of ▁, or Metaspace",
    )


def _pairs(merges: list[object], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Merges as pairs of tokens that join to a token; ``TokenizerError`` for any other."""
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not isinstance(parts[0], str)
            or not isinstance(parts[1], str)
        ):
            raise TokenizerError(
                f"{where}: merge {shown(merge)} does not have two parts", hint=_MERGE_HINT
            )
        left, right = parts
        if not (left in vocab and right in vocab and left + right in vocab):
            missing = next(text for text in (left, right, left + right) if text not in vocab)
            raise TokenizerError(
                f"{where}: merge {shown(merge)}: {shown(missing)} is no token", hint=DAMAGED
            )
        pairs.append((left, right))
    return pairs


def _joined(merges: list[object], vocab: Mapping[str, int], where: str) -> tuple[str, ...]:
    """Merges as GGUF writes them, ``left right``."""
    joined = tuple(" ".join(pair) for pair in _pairs(merges, vocab, where))
    if bad := next((merge for merge in joined if merge.count(" ") != 1), None):
        raise TokenizerError(
            f"{where}: merge {shown(bad)} does not have two parts without spaces", hint=_MERGE_HINT
        )
    return joined


@dataclass(frozen=True, slots=True)
class _Model:
    """What is particular to the algorithm."""

    kind: VocabularyKind
    row: PreTokenizer | None = None
    merges: tuple[str, ...] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)  # tokenizer.model's own


def _vocabulary(
    source: _Source, slots: _Slots, model: _Model, add_space_prefix: bool | None
) -> Vocabulary:
    ids = {text: i for i, text in enumerate(slots.tokens)}
    if repeated := source.rows - len(ids):
        raise TokenizerError(
            f"{source.where}: the tokenizer repeats {repeated} tokens", hint=DAMAGED
        )
    node = (source.tokenizer or {}).get("post_processor")
    template = read_post_processor(node, f"{source.where}/tokenizer.json")
    add_bos, add_eos = source.settings.add_bos, source.settings.add_eos
    add_bos = template.add_bos if add_bos is None else add_bos
    if add_bos is None and _llama_cpp_alone_adds_bos(source, model):
        add_bos = False
    return Vocabulary(
        kind=model.kind,
        pre=model.row.name if model.row else "default",
        tokens=tuple(slots.tokens),
        types=tuple(slots.types),
        scores=tuple(slots.scores) if model.kind is VocabularyKind.SPM else None,
        merges=model.merges,
        special_ids=_special_ids(source, ids, template, model.special_ids),
        add_bos=add_bos,
        add_eos=template.add_eos if add_eos is None else add_eos,
        add_space_prefix=add_space_prefix,
        chat_template=source.settings.chat_template,
        chat_templates=source.settings.chat_templates,
        files=source.files,
    )


def _llama_cpp_alone_adds_bos(source: _Source, model: _Model) -> bool:
    """Whether nothing in the folder asks for the BOS that llama.cpp adds by default."""
    if model.row is not None:
        return model.row.adds_bos
    # a SentencePiece model is meant with BOS where its class is LLaMA's, or is all there is
    class_name = source.settings.class_name or "Llama"
    return source.tokenizer is not None and "Llama" not in class_name


def _special_ids(
    source: _Source, ids: Mapping[str, int], template: Template, model_ids: Mapping[str, int]
) -> dict[str, int]:
    """Ids of the special tokens: by name in the tokenizer, else config.json, else the model."""
    named = dict(source.settings.named)
    special = {}
    if template.first and named.setdefault("bos", template.first) != template.first:
        raise UnsupportedError(
            f"{source.where}: its template puts {template.first!r} first, "
            f"bos_token is {named['bos']!r}",
            hint="make them one in tokenizer_config.json: GGUF has one token for both",
        )
    if template.last and named.setdefault("eos", template.last) != template.last:
        if named["eos"] not in ids:
            raise TokenizerError(
                f"{source.where}: eos_token {named['eos']!r} is no token", hint=_SPECIAL_HINT
            )
        special["eot"] = ids[named["eos"]]  # what ends a turn, beside what ends a text
        named["eos"] = template.last
    for short, name in SPECIAL_NAMES.items():
        found = ids.get(named[short]) if short in named else None
        if found is None and short in named and short in ("bos", "eos"):
            raise TokenizerError(
                f"{source.where}: {short}_token {named[short]!r} is no token", hint=_SPECIAL_HINT
            )
        for other in (source.settings.named_ids, model_ids):
            found = other.get(short) if found is None else found
        if found is not None and found < source.rows:
            special[name] = found
        elif found is not None and short in ("bos", "eos"):
            raise TokenizerError(
                f"{source.where}: {short}_token_id {found} is past the embedding",
                hint=_SPECIAL_HINT,
            )
    if _CODE_LLAMA_EOT in ids:
        special.setdefault("eot", ids[_CODE_LLAMA_EOT])
    return special
