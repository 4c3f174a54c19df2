"""A vocabulary as GGUF's ``tokenizer.*`` keys, and back.

Key names are those of llama.cpp's gguf-py ``Keys.Tokenizer`` (llama-cpp-python 0.3.36); values are
plain Python: the writer of the file gives ints, floats and bools their GGUF types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

from converters.errors import TokenizerError, UnsupportedError, shown
from converters.tokenizers.pretokenizers import known_pre_tokenizers, pre_tokenizer_named
from converters.tokenizers.vocabulary import TokenType, Vocabulary, VocabularyKind

_MODEL = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_TOKENS = "tokenizer.ggml.tokens"
_TYPES = "tokenizer.ggml.token_type"
_SCORES = "tokenizer.ggml.scores"
_MERGES = "tokenizer.ggml.merges"
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_ADD_EOS = "tokenizer.ggml.add_eos_token"
_ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
_CHAT_TEMPLATE = "tokenizer.chat_template"
_CHAT_TEMPLATES = "tokenizer.chat_templates"
_ID_PREFIX, _ID_SUFFIX = "tokenizer.ggml.", "_token_id"
_SEPARATOR = "separator"
_GGUF_SEPARATOR = "seperator"  # the format's own spelling

# Keys by which llama.cpp would tokenize otherwise than this vocabulary says.
_CHANGES_TOKENS = (
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.normalizer.lowercase",
    "tokenizer.ggml.normalizer.strip_accents",
)
_TYPE_OF = {int(kind): kind for kind in TokenType}


@runtime_checkable
class _Array(Protocol):
    def tolist(self) -> list[object]: ...


def vocabulary_to_gguf(vocabulary: Vocabulary) -> dict[str, object]:
    """The ``tokenizer.*`` keys of ``vocabulary``, in the order in which they are written."""
    keys: dict[str, object] = {}
    if vocabulary.add_space_prefix is not None:
        keys[_ADD_SPACE_PREFIX] = vocabulary.add_space_prefix
    keys[_MODEL] = vocabulary.kind.value
    keys[_PRE] = vocabulary.pre
    keys[_TOKENS] = list(vocabulary.tokens)
    if vocabulary.scores is not None:
        keys[_SCORES] = list(vocabulary.scores)
    keys[_TYPES] = list(map(int, vocabulary.types))
    if vocabulary.merges is not None:
        keys[_MERGES] = list(vocabulary.merges)
    for name, token_id in vocabulary.special_ids.items():
        keys[_id_key(name)] = token_id
    if vocabulary.add_bos is not None:
        keys[_ADD_BOS] = vocabulary.add_bos
    if vocabulary.add_eos is not None:
        keys[_ADD_EOS] = vocabulary.add_eos
    keys.update(vocabulary.other_keys)
    for name, template in vocabulary.chat_templates.items():
        keys[f"{_CHAT_TEMPLATE}.{name}"] = template
    if vocabulary.chat_templates:
        keys[_CHAT_TEMPLATES] = list(vocabulary.chat_templates)
    if vocabulary.chat_template is not None:
        keys[_CHAT_TEMPLATE] = vocabulary.chat_template
    return keys


def vocabulary_from_gguf(keys: Mapping[str, object], where: str) -> Vocabulary:
    """The vocabulary that the parsed keys of a GGUF hold; ``where`` names the file in errors.

    Raises TokenizerError listing every problem found, UnsupportedError for an algorithm other than
    byte-level BPE and SentencePiece BPE.
    """
    own = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    kind = _kind(own, where)
    return _Reader(own, kind, where).read()


def _kind(keys: Mapping[str, object], where: str) -> VocabularyKind:
    model = keys.get(_MODEL)
    if not isinstance(model, str):
        raise TokenizerError(f"{where}: {_MODEL} is missing", hint="this GGUF has no tokenizer")
    if changed := [key for key in _CHANGES_TOKENS if key in keys]:
        raise UnsupportedError(
            f"{where}: a tokenizer with {', '.join(changed)} is not supported",
            hint="supported are tokenizers that do not change characters",
        )
    for kind in VocabularyKind:
        if kind.value == model:
            return kind
    raise UnsupportedError(
        f"{where}: {_MODEL} is {shown(model)}",
        hint="supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)",
    )


class _Reader:
    """Takes keys one by one, collects problems, and raises them together."""

    def __init__(self, keys: Mapping[str, object], kind: VocabularyKind, where: str) -> None:
        self._left = dict(keys)
        self._kind = kind
        self._where = where
        self._problems: list[str] = []

    def read(self) -> Vocabulary:
        self._take(_MODEL, str)
        bpe = self._kind is VocabularyKind.BPE
        pre = self._pre()
        tokens = tuple(cast("list[str]", self._array(_TOKENS, str, required=True)))
        types = self._types(len(tokens))
        scores = self._array(_SCORES, (int, float), required=not bpe)
        merges = cast("list[str]", self._array(_MERGES, str, required=bpe))
        self._check(tokens, scores)
        special_ids = self._special_ids(len(tokens))
        vocabulary = Vocabulary(
            kind=self._kind,
            pre=pre,
            tokens=tokens,
            types=types,
            scores=tuple(map(float, cast("list[float]", scores))) if scores else None,
            merges=tuple(merges) if merges or bpe else None,
            special_ids=special_ids,
            add_bos=cast("bool | None", self._take(_ADD_BOS, bool)),
            add_eos=cast("bool | None", self._take(_ADD_EOS, bool)),
            add_space_prefix=cast("bool | None", self._take(_ADD_SPACE_PREFIX, bool)),
            chat_templates=self._templates(),
            chat_template=cast("str | None", self._take(_CHAT_TEMPLATE, str)),
            other_keys=self._left,
        )
        if self._problems:
            raise TokenizerError(
                f"{self._where}: " + "; ".join(self._problems), hint="convert the model again"
            )
        return vocabulary

    def _take(self, key: str, kind: type) -> object:
        value = self._left.pop(key, None)
        if value is not None and not isinstance(value, kind):
            self._problems.append(f"{key} is {shown(value)}, expected {kind.__name__}")
            return None
        return value

    def _array(
        self, key: str, kind: type | tuple[type, ...], *, required: bool = False
    ) -> list[object]:
        value = self._left.pop(key, None)
        if value is None:
            if required:
                self._problems.append(f"{key} is missing")
            return []
        if isinstance(value, _Array):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            self._problems.append(f"{key} is not an array")
            return []
        kinds = set(map(type, value))
        if any(not issubclass(found, kind) or found is bool for found in kinds):
            names = ", ".join(sorted(found.__name__ for found in kinds))
            self._problems.append(f"{key} holds values of type {names}")
            return []
        return list(value)

    def _pre(self) -> str:
        value = cast("str | None", self._take(_PRE, str))
        if self._kind is VocabularyKind.SPM:
            return "default"  # llama.cpp reads no pre-tokenizer for SentencePiece
        if not value or value == "default":
            self._problems.append(
                f"{_PRE} is {shown(value)}: the splitting of a BPE tokenizer must be named"
            )
            return ""
        if pre_tokenizer_named(value) is None:
            self._problems.append(
                f"{_PRE} is {shown(value)}, expected one of {', '.join(known_pre_tokenizers())}"
            )
        return value

    def _types(self, size: int) -> tuple[TokenType, ...]:
        values = cast("list[int]", self._array(_TYPES, int, required=True))
        if unknown := sorted(set(values) - _TYPE_OF.keys()):
            self._problems.append(f"{_TYPES} holds unknown types {unknown}")
            return ()
        if values and len(values) != size:
            self._problems.append(f"{_TYPES} has {len(values)} values for {size} tokens")
        return tuple(map(_TYPE_OF.__getitem__, values))

    def _check(self, tokens: tuple[str, ...], scores: list[object]) -> None:
        if scores and len(scores) != len(tokens):
            self._problems.append(f"{_SCORES} has {len(scores)} values for {len(tokens)} tokens")
        if repeated := len(tokens) - len(set(tokens)):
            self._problems.append(f"{_TOKENS} repeats {repeated} tokens")

    def _special_ids(self, size: int) -> dict[str, int]:
        ids = {}
        for key in [k for k in self._left if k.startswith(_ID_PREFIX) and k.endswith(_ID_SUFFIX)]:
            value = self._left.pop(key)
            name = key.removeprefix(_ID_PREFIX).removesuffix(_ID_SUFFIX)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
                self._problems.append(f"{key} is {shown(value)}, expected an id under {size}")
            else:
                ids[_SEPARATOR if name == _GGUF_SEPARATOR else name] = value
        return ids

    def _templates(self) -> dict[str, str]:
        self._array(_CHAT_TEMPLATES, str)
        prefix = _CHAT_TEMPLATE + "."
        names = [key.removeprefix(prefix) for key in self._left if key.startswith(prefix)]
        return {name: str(self._take(prefix + name, str)) for name in names}


def _id_key(name: str) -> str:
    return f"{_ID_PREFIX}{_GGUF_SEPARATOR if name == _SEPARATOR else name}{_ID_SUFFIX}"
