"""The texts on which two tokenizers are compared, drawn from a seed.

Each group asks for something else: plain text, every added token in three surroundings, random
Unicode of many scripts, runs of spaces and digits, a rendered chat.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.tokenizers import TokenType, Vocabulary

CHUNK_CHARS = 2000  # a text is compared in pieces, so that a difference is shown where it is
# Blocks whose characters are assigned in every Unicode version the tokenizers use (6.0 on), so
# that a table a version older is not taken for a wrong tokenizer.
_BLOCKS = {
    "latin": [(0x20, 0x7E), (0xA1, 0x17F)],
    "greek": [(0x391, 0x3A1), (0x3A3, 0x3C9)],
    "cyrillic": [(0x400, 0x45F)],
    "hebrew": [(0x5D0, 0x5EA)],
    "arabic": [(0x621, 0x63A), (0x641, 0x64A), (0x660, 0x669)],
    "devanagari": [(0x905, 0x939), (0x93E, 0x94C), (0x966, 0x96F)],
    "thai": [(0xE01, 0xE3A), (0xE40, 0xE4E), (0xE50, 0xE59)],
    "khmer": [(0x1780, 0x17B3), (0x17B6, 0x17D3)],
    "kana": [(0x3041, 0x3096), (0x30A1, 0x30FA)],
    "han": [(0x4E00, 0x9FA5)],
    "hangul": [(0xAC00, 0xD7A3)],
    "marks": [(0x300, 0x36F)],
    "punctuation": [(0x2010, 0x2027), (0x2030, 0x205E), (0x3001, 0x3003), (0xFF01, 0xFF0F)],
    "symbols": [(0x20A0, 0x20B8), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x257F)],
    "numbers": [(0xB2, 0xB3), (0xBC, 0xBE), (0x2150, 0x2188), (0x2460, 0x249B)],
    "spaces": [(0x9, 0xD), (0x20, 0x20), (0xA0, 0xA0), (0x2000, 0x200A), (0x3000, 0x3000)],
    "joiners": [(0x200B, 0x200F), (0x2028, 0x2029), (0xFE0E, 0xFE0F), (0xFEFF, 0xFEFF)],
    "control": [(0x1, 0x1F), (0x7F, 0x9F)],
    "emoji": [(0x1F300, 0x1F320), (0x1F400, 0x1F43E), (0x1F600, 0x1F640), (0x1F680, 0x1F6C5)],
    "supplementary": [(0x10400, 0x1044F), (0x1D400, 0x1D454), (0x20000, 0x2A6D6)],
}
_SEQUENCES = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family of four
    "\U0001f3f3\ufe0f\u200d\U0001f308",  # a flag of two emoji
    "\U0001f44d\U0001f3fd",  # a skin tone
    "\U0001f1eb\U0001f1f7\U0001f1f0\U0001f1f7",  # two flags of regional indicators
    "e\u0301",
    "i\u0307",
    *("'s", "'RE", "'Ll", "\r\n", "\n\n", " \n", "\t\t"),
)
_SPACES = (" ", "\t", "\n", "\r\n", "\u00a0", "\u3000")
_LONGEST_RUN = 40


@dataclass(frozen=True, slots=True)
class Case:
    """One text to encode, and how."""

    group: str
    text: str
    add_special: bool
    parse_special: bool


def cases(vocabulary: Vocabulary, texts: Sequence[str], *, seed: int) -> Iterator[Case]:
    """The fixed cases: all but random Unicode, which has no end."""
    yield Case("empty", "", add_special=True, parse_special=True)
    for text in texts:
        for start in range(0, len(text), CHUNK_CHARS):
            piece = text[start : start + CHUNK_CHARS]
            plain = (start // CHUNK_CHARS) % 2 == 0
            yield Case("text", piece, add_special=plain, parse_special=plain)
    yield from _added_tokens(vocabulary)
    yield from _runs(random.Random(seed))


def random_unicode(*, seed: int) -> Iterator[Case]:
    """Random texts of one to four scripts each, without end, the same for the same seed."""
    draw = random.Random(seed)
    names = sorted(_BLOCKS)
    while True:
        chosen = draw.sample(names, draw.randint(1, 4))
        text = "".join(_piece(draw, chosen) for _ in range(draw.randint(1, 60)))
        yield Case("unicode", text, add_special=draw.random() < 0.5, parse_special=True)


def chat_cases(rendered: Sequence[str]) -> Iterator[Case]:
    """Rendered chats, which bring their own special tokens."""
    for text in rendered:
        yield Case("chat", text, add_special=False, parse_special=True)


def _piece(draw: random.Random, blocks: Sequence[str]) -> str:
    if draw.random() < 0.06:
        return draw.choice(_SEQUENCES)
    if draw.random() < 0.12:
        return " "
    first, last = draw.choice(_BLOCKS[draw.choice(blocks)])
    return chr(draw.randint(first, last))


def _added_tokens(vocabulary: Vocabulary) -> Iterator[Case]:
    for token_id in vocabulary.added_ids:
        token = vocabulary.tokens[token_id]
        for text in (token, f"a{token}b", f"Left {token} right", f"{token}\n{token}{token}"):
            yield Case("added tokens", text, add_special=False, parse_special=True)
        # some bracketed tokens are control tokens to llama.cpp by their text (llama-vocab.cpp)
        user_defined = vocabulary.types[token_id] is TokenType.USER_DEFINED
        if user_defined and not token.startswith(("<", "[", "_<")):
            yield Case("added tokens", f"a{token}b", add_special=False, parse_special=False)


def _runs(draw: random.Random) -> Iterator[Case]:
    for space in _SPACES:
        for length in range(1, _LONGEST_RUN):
            for text in (space * length, f"a{space * length}", f"{space * length}a b"):
                yield Case("spaces", text, add_special=True, parse_special=True)
    for length in range(1, _LONGEST_RUN):
        digits = "".join(draw.choice("0123456789") for _ in range(length))
        for text in (digits, f"x{digits}", f"{digits[: length // 2]}.{digits}, {digits}"):
            yield Case("digits", text, add_special=False, parse_special=True)
