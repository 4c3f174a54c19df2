"""SentencePiece BPE in tokenizer.json's terms: scores from merges, merges from scores.

SentencePiece merges the pair whose joined piece has the highest score; a tokenizer.json merges the
pair that comes first in its list. The two agree when every pair that joins to a piece is listed
and the list is ordered by piece: that is how transformers writes a SentencePiece model, and what
is checked here before a list of merges is turned into scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers.vocabulary import TokenType, Vocabulary

SPACE = "▁"  # SentencePiece's visible space, U+2581
# llama.cpp's conversion/base.py gives added tokens and padding these scores.
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0


def byte_token(value: int) -> str:
    """The piece that stands for one byte."""
    return f"<0x{value:02X}>"


def scores_of_merges(
    merges: Sequence[tuple[str, str]], normal: Mapping[str, int], where: str
) -> dict[str, float]:
    """A score for every piece of ``normal`` (text to id), such that highest first is merge order.

    Raises UnsupportedError when SentencePiece's rule could not follow these merges.
    """
    rank: dict[str, int] = {}
    previous, disordered = None, 0
    for left, right in merges:
        piece = left + right
        if piece != previous:
            disordered += piece in rank
            rank.setdefault(piece, len(rank))
            previous = piece
    listed = set(merges)
    missing = sum(1 for pair in _splits(normal, normal) if pair not in listed)
    if disordered or missing:
        raise UnsupportedError(
            f"{where}: its merges are not those of a SentencePiece model: {missing} pairs that "
            f"join to a piece are not listed, {disordered} pieces stand in two places",
            hint="add the tokenizer.model it was made from",
        )
    rest = [text for text in sorted(normal, key=normal.__getitem__) if text not in rank]
    return {text: -float(order) for order, text in enumerate((*rank, *rest))}


def merges_of_scores(vocabulary: Vocabulary, where: str) -> list[str]:
    """The merges that make a tokenizer.json merge in the order of the vocabulary's scores.

    Raises TokenizerError when pieces share a score: the merge order is then lost. Runs of spaces
    may share one, and do in LLaMA's models: they keep the order of their ids.
    """
    if vocabulary.scores is None:
        raise TokenizerError(
            f"{where}: a SentencePiece vocabulary without scores", hint="use the original folder"
        )
    normal = {
        text: score
        for text, score, kind in zip(
            vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
        )
        if kind is TokenType.NORMAL
    }
    pairs = [
        (-normal[left + right], left + right, left, right)
        for left, right in _splits(normal, normal)
    ]
    pieces = {piece: score for score, piece, _, _ in pairs if piece.strip(SPACE)}
    if tied := len(pieces) - len(set(pieces.values())):
        raise TokenizerError(
            f"{where}: {tied} pieces share a score with another: the order of merges is lost",
            hint="llama.cpp writes such files from a tokenizer.json; use the original folder",
        )
    pairs.sort(
        key=lambda pair: pair[0]
    )  # stable: ties stay in order of id, as transformers has them
    return [f"{left} {right}" for _, _, left, right in pairs]


def _splits(pieces: Mapping[str, object], parts: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Every way to make one of ``pieces`` of two of ``parts``."""
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in parts and right in parts:
                yield left, right
