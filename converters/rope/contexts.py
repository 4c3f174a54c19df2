"""What L and L' are, and how that was told.

``max_position_embeddings`` of a scaled checkpoint is L in old files and L' in newer ones, so what
else the checkpoint says decides; a context is never over-claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from converters.errors import RopeError


@dataclass(frozen=True, slots=True)
class Evidence:
    """How one value was told: ``name`` (theta, L, L'), and the sentence for a person to read."""

    name: str
    sentence: str
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class ContextClaims:
    """What a checkpoint says about its contexts, in tokens; ``*_key`` is the spelling it used."""

    max_position: int
    max_position_key: str
    original: int | None = None
    original_key: str = ""
    hint: int | None = None  # max_sequence_length or model_max_length
    hint_key: str = ""
    override: int | None = None
    override_key: str = "--original-context"


@dataclass(frozen=True, slots=True)
class Contexts:
    """L and L' in tokens, with the evidence for each."""

    original_context: int
    context: int
    evidence: tuple[Evidence, ...]


# Factors such as 2.2 are not exact in binary: 5000 * 2.2 is 11000.000000000002.
_ROUNDING = 1e-6
MAX_CONTEXT = 2**31 - 1  # llama.cpp's llama_pos is a signed 32-bit number


def scaled_context(context_tokens: int, factor: float) -> int:
    """floor(context * factor), forgiving the last bits of a decimal factor."""
    return math.floor(context_tokens * factor + _ROUNDING)


def extended_context(context_tokens: int, factor: float, where: str = "") -> int:
    """``scaled_context``; ``RopeError`` for more positions than a runtime can count."""
    if context_tokens > MAX_CONTEXT or not context_tokens * factor <= MAX_CONTEXT:
        start = f"{where}: " if where else ""
        raise RopeError(
            f"{start}a context of {context_tokens} tokens times {factor:g} is beyond"
            f" {MAX_CONTEXT:,}",
            hint="Give a smaller scale; positions are signed 32-bit numbers.",
        )
    return scaled_context(context_tokens, factor)


def unscaled_context(context_tokens: int, factor: float) -> int:
    """L of a context L' = L * factor, at least 1: floor, as forgiving as ``scaled_context``."""
    return max(1, math.floor(context_tokens / factor + _ROUNDING))


def resolve_contexts(claims: ContextClaims, factor: float, where: str) -> Contexts:
    """L and L' of a checkpoint whose linear factor is ``factor`` (1 for an unscaled one).

    Raises ``RopeError`` where the claims contradict each other.
    """
    _refuse_beyond_positions(claims, factor, where)
    if claims.override is not None:
        return _from_original(claims, claims.override, claims.override_key, factor, where)
    if factor == 1.0:
        return _unscaled(claims)
    if claims.original is not None:
        return _from_original(claims, claims.original, claims.original_key, factor, where)
    if claims.hint is not None and claims.hint == scaled_context(claims.max_position, factor):
        reason = f"{claims.max_position_key}, since {claims.hint_key} is {factor:g} times it"
        return Contexts(
            claims.max_position,
            claims.hint,
            (Evidence("L", reason), Evidence("L'", claims.hint_key)),
        )
    return _from_extended(claims, factor)


def _refuse_beyond_positions(claims: ContextClaims, factor: float, where: str) -> None:
    stated = {
        claims.max_position_key: claims.max_position,
        claims.override_key: claims.override or 1,
        "the factor": factor,
    }
    for key, value in stated.items():
        if value > MAX_CONTEXT:
            raise RopeError(
                f"{where}: {key} is {value:g}", hint=f"Expected at most {MAX_CONTEXT:,}."
            )


def _from_extended(claims: ContextClaims, factor: float) -> Contexts:
    """L told from L': an assumption, unless the hint says that max_position is L'."""
    original = unscaled_context(claims.max_position, factor)
    agreed = claims.hint == claims.max_position
    reason = f"{claims.max_position_key} / {factor:g}"
    sentence = (
        f"{reason}, since {claims.hint_key} equals it" if agreed else f"{reason}, as if it were L'"
    )
    return Contexts(
        original,
        claims.max_position,
        (Evidence("L", sentence, assumed=not agreed), Evidence("L'", claims.max_position_key)),
    )


def _unscaled(claims: ContextClaims) -> Contexts:
    evidence = (Evidence("L", claims.max_position_key), Evidence("L'", claims.max_position_key))
    return Contexts(claims.max_position, claims.max_position, evidence)


def _from_original(
    claims: ContextClaims, original: int, key: str, factor: float, where: str
) -> Contexts:
    full = extended_context(original, factor, where)
    stated = claims.max_position
    if factor == 1.0:
        # An override below max_position: the model is good to L only, whatever it claims.
        return Contexts(original, original, (Evidence("L", key), Evidence("L'", key)))
    if stated == original:
        return Contexts(original, full, (Evidence("L", key), Evidence("L'", f"L x {factor:g}")))
    if original < stated <= full:
        return Contexts(
            original, stated, (Evidence("L", key), Evidence("L'", claims.max_position_key))
        )
    raise RopeError(
        f"{where}: {claims.max_position_key} is {stated}, but {key} {original} with factor"
        f" {factor:g} gives a context of {full}",
        hint=f"Expected {claims.max_position_key} to be {original} (L) or at most {full} (L')."
        " Give --original-context N if you know the trained context.",
    )
