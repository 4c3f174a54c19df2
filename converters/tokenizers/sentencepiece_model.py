"""Reading ``tokenizer.model``: SentencePiece's ``ModelProto`` (sentencepiece_model.proto).

A reader of the few fields needed, on protobuf's wire format, so that no protobuf runtime is asked
for. It refuses what llama.cpp's SentencePiece tokenizer would do otherwise than SentencePiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers.vocabulary import TokenType

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BPE = 2
# ModelProto; SentencePiece; TrainerSpec; NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK, _UNK, _BOS, _EOS, _PAD = 3, 24, 35, 40, 41, 42, 43
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The pieces of a SentencePiece BPE model, and what of its settings matters."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[TokenType, ...]
    add_dummy_prefix: bool
    special_ids: dict[str, int]  # "unk", "bos", "eos", "pad" -> id, where there is one


def read_sentencepiece_model(data: bytes, where: str) -> SentencePieceModel:
    """The model in the bytes of a ``tokenizer.model``; ``where`` names the file in errors.

    Raises TokenizerError when they are no SentencePiece model, UnsupportedError naming what
    llama.cpp cannot reproduce (unigram, a normalizer, no byte fallback, ...).
    """
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        trainer = dict(_fields(_last(fields, _TRAINER)))
        normalizer = dict(_fields(_last(fields, _NORMALIZER)))
    except (ValueError, struct.error, TypeError) as error:
        raise TokenizerError(
            f"{where}: not a SentencePiece model: {error}",
            hint="a tiktoken file is not read; give the folder its tokenizer.json",
        ) from error
    if not pieces:
        raise TokenizerError(
            f"{where}: not a SentencePiece model: it has no pieces", hint="fetch the file again"
        )
    _refuse(trainer, normalizer, where)
    tokens, scores, types = zip(*pieces, strict=True)
    ids = {"unk": (_UNK, 0), "bos": (_BOS, 1), "eos": (_EOS, 2), "pad": (_PAD, -1)}
    special = {
        name: _signed(trainer.get(number, default)) for name, (number, default) in ids.items()
    }
    return SentencePieceModel(
        tokens=tokens,
        scores=scores,
        types=types,
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        special_ids={name: token_id for name, token_id in special.items() if token_id >= 0},
    )


def _refuse(trainer: dict[int, object], normalizer: dict[int, object], where: str) -> None:
    kind = trainer.get(_MODEL_TYPE, 1)
    problems = []
    if kind != _BPE:
        problems.append(f"its algorithm is {_MODEL_TYPES.get(_signed(kind), kind)}, not bpe")
    if not trainer.get(_BYTE_FALLBACK, 0):
        problems.append("it has no byte fallback")
    if trainer.get(_SUFFIX, 0):
        problems.append("it writes spaces after words (treat_whitespace_as_suffix)")
    if normalizer.get(_CHARSMAP):
        problems.append("it normalizes characters (precompiled_charsmap)")
    if normalizer.get(_EXTRA_SPACES, 1):
        problems.append("it removes extra spaces (remove_extra_whitespaces)")
    if not normalizer.get(_ESCAPE, 1):
        problems.append("it does not escape spaces (escape_whitespaces)")
    if problems:
        raise UnsupportedError(
            f"{where}: llama.cpp cannot reproduce this SentencePiece model: " + "; ".join(problems),
            hint="supported are BPE models with byte fallback that take a text as it is",
        )


def _piece(data: object) -> tuple[str, float, TokenType]:
    text, score, kind = "", 0.0, TokenType.NORMAL
    for number, value in _fields(data):
        if number == _PIECE_TEXT:
            if not isinstance(value, bytes):
                raise ValueError("a piece is not text")
            text = value.decode("utf-8")
        elif number == _PIECE_SCORE:
            if not isinstance(value, float):
                raise ValueError("a score is not a float")
            score = value
        elif number == _PIECE_TYPE:
            kind = TokenType(_signed(value))
    return text, score, kind


def _last(fields: list[tuple[int, object]], number: int) -> object:
    found = [value for key, value in fields if key == number]
    return found[-1] if found else b""


def _signed(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"a number is {value!r}")
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: object) -> Iterator[tuple[int, object]]:
    """Field numbers and values of one protobuf message; floats for 32-bit fields."""
    if not isinstance(data, bytes):
        raise ValueError("a message is expected")
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            size, position = _varint(data, position)
        if size is None or size > end - position:
            raise ValueError(f"field {number} at byte {position} does not fit")
        raw = data[position : position + size]
        position += size
        yield number, struct.unpack("<f", raw)[0] if wire == _FIXED32 else raw


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number at byte {position} does not end")
