"""GGUF's spellings of RoPE, in and out, and what llama.cpp makes of them.

Keys are named without the architecture's prefix (``rope.freq_base`` stands for
``llama.rope.freq_base``). How they are read follows llama.cpp's ``load_hparams`` and
``llama_context`` (0c1e57098): a missing type means linear, type none switches the factor off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from converters.errors import RopeError, UnsupportedError, shown
from converters.rope.config import llama3_block, number, read_llama3, whole
from converters.rope.contexts import ContextClaims, Evidence, resolve_contexts
from converters.rope.parameters import (
    FloatArray,
    Llama3Scaling,
    RopeParameters,
    shortest_float32,
    ulp_distance,
)

CONTEXT_KEY = "context_length"
THETA_KEY = "rope.freq_base"
DIMENSION_KEY = "rope.dimension_count"
TYPE_KEY = "rope.scaling.type"
FACTOR_KEY = "rope.scaling.factor"
ORIGINAL_KEY = "rope.scaling.original_context_length"
ATTENTION_KEY = "rope.scaling.attn_factor"
LEGACY_FACTOR_KEY = "rope.scale_linear"
FINETUNED_KEY = "rope.scaling.finetuned"
DIVISORS_TENSOR = "rope_freqs.weight"
RECORD_PREFIX = "pi_convert."
# Keys of our own, without a prefix of the architecture: the llama3 numbers behind the tensor, from
# which they cannot be told. transformers' names follow (``llama3_block``).
LLAMA3_RECORD = f"{RECORD_PREFIX}rope.llama3"
NO_KEYS: Mapping[str, object] = MappingProxyType({})

KNOWN_TYPES = ("none", "linear", "yarn", "longrope")
LLAMA_CPP_DEFAULT_THETA = 10000.0  # llama_hparams: used where freq_base is missing

# Published llama3 settings, tried in turn to name the formula behind a rope_freqs tensor that has
# no record. Where every frequency is stretched fully or not at all, the factor is the tensor's
# largest value.
_LLAMA3_SHAPES = ((1.0, 4.0, 8192),)
_DIVISOR_ULP = 8  # llama.cpp's converter computes them in float64 and is 3 to 4 off transformers


@dataclass(frozen=True, slots=True)
class EffectiveRope:
    """What llama.cpp rotates by when it loads the file with no flags."""

    theta: float
    rotary_dim: int
    type: str
    factor: float  # as applied: 1 where the type switches it off
    stored_factor: float | None  # as written
    attention_factor: float
    divisors: FloatArray | None
    context: int
    original_context: int | None

    def inv_freq(self) -> FloatArray:
        """The inverse frequencies the file's own values give, float32 (rotary_dim / 2,)."""
        base = RopeParameters(self.theta, self.rotary_dim, 1, 1).base_inv_freq()
        if self.divisors is not None:
            base = base / self.divisors
        return base / np.float32(self.factor)


def effective_rope(
    keys: Mapping[str, object], divisors: FloatArray | None, *, rotary_dim: int, where: str
) -> EffectiveRope:
    """RoPE as llama.cpp applies it; ``keys`` are without prefix, ``divisors`` is rope_freqs.

    Raises ``RopeError`` for a value llama.cpp would abort on or that is not a number.
    """
    kind = keys.get(TYPE_KEY, "linear")
    if not isinstance(kind, str) or kind not in KNOWN_TYPES:
        raise RopeError(
            f"{where}: {TYPE_KEY} is {shown(kind)}, on which llama.cpp aborts",
            hint=f"Expected one of {', '.join(KNOWN_TYPES)}.",
        )
    factor_key = FACTOR_KEY if FACTOR_KEY in keys else LEGACY_FACTOR_KEY
    stored = _optional(keys, factor_key, where)
    context = whole(keys, CONTEXT_KEY, where)
    if context is None:
        raise RopeError(f"{where}: {CONTEXT_KEY} is missing", hint="llama.cpp cannot load it.")
    return EffectiveRope(
        theta=_positive(keys, THETA_KEY, LLAMA_CPP_DEFAULT_THETA, where),
        rotary_dim=whole(keys, DIMENSION_KEY, where) or rotary_dim,
        type=kind,
        factor=1.0 if kind == "none" else stored or 1.0,
        stored_factor=stored,
        attention_factor=_positive(keys, ATTENTION_KEY, 1.0, where),
        divisors=divisors,
        context=context,
        original_context=whole(keys, ORIGINAL_KEY, where),
    )


def read_gguf(
    keys: Mapping[str, object],
    divisors: FloatArray | None,
    *,
    rotary_dim: int,
    original_context: int | None,
    where: str,
    file_keys: Mapping[str, object] = NO_KEYS,
) -> RopeParameters:
    """The RoPE of a GGUF used as a source; stricter than llama.cpp: nothing is left to defaults.

    ``original_context`` is ``--original-context``, ``file_keys`` are all keys under their full
    names, among them our record of llama3. Raises ``RopeError`` where a key is missing,
    contradictory or out of range, ``UnsupportedError`` for a kind that cannot be exported right.
    """
    effective = effective_rope(keys, divisors, rotary_dim=rotary_dim, where=where)
    _refuse_other_kinds(effective, where)
    claims = ContextClaims(
        max_position=effective.context,
        max_position_key=CONTEXT_KEY,
        original=effective.original_context,
        original_key=ORIGINAL_KEY,
        override=original_context,
    )
    contexts = resolve_contexts(claims, effective.factor, where)
    rope = RopeParameters(
        theta=effective.theta,
        rotary_dim=effective.rotary_dim,
        original_context=contexts.original_context,
        context=contexts.context,
        factor=shortest_float32(effective.factor),
        evidence=(_theta_evidence(keys), *contexts.evidence),
    )
    record = _recorded_llama3(file_keys, where)
    if record is not None:
        return _with_record(rope, record, divisors, where)
    return rope if divisors is None else _with_published_llama3(rope, divisors, where)


def _refuse_other_kinds(effective: EffectiveRope, where: str) -> None:
    """Raises for what is neither plain, nor linear, nor llama3."""
    if effective.type in ("yarn", "longrope"):
        raise UnsupportedError(
            f"{where}: {TYPE_KEY} is {effective.type}",
            hint="Supported are default (none), linear and llama3 (rope_freqs).",
        )
    if effective.type == "none" and effective.stored_factor not in (None, 1.0):
        raise RopeError(
            f"{where}: {TYPE_KEY} is none, but a factor of {effective.stored_factor:g} is stored",
            hint="llama.cpp ignores the factor. Repair the file with `pi-convert fix`.",
        )
    if effective.attention_factor != 1.0:
        raise UnsupportedError(
            f"{where}: {ATTENTION_KEY} is {effective.attention_factor:g}",
            hint="Only 1 is linear RoPE.",
        )
    if effective.factor < 1.0:
        raise RopeError(
            f"{where}: {FACTOR_KEY} is {effective.factor:g}", hint="Expected 1 or more."
        )


def _theta_evidence(keys: Mapping[str, object]) -> Evidence:
    if THETA_KEY in keys:
        return Evidence("theta", THETA_KEY)
    return Evidence("theta", f"{THETA_KEY} is missing: llama.cpp's default 10000", assumed=True)


def write_gguf(rope: RopeParameters) -> dict[str, str | int | float]:
    """The keys that make llama.cpp apply ``rope`` with no flags; L is written always."""
    keys: dict[str, str | int | float] = {
        CONTEXT_KEY: rope.context,
        DIMENSION_KEY: rope.rotary_dim,
        THETA_KEY: rope.theta,
        TYPE_KEY: "none" if rope.factor == 1.0 else "linear",
        ORIGINAL_KEY: rope.original_context,
    }
    if rope.factor != 1.0:
        keys[FACTOR_KEY] = rope.factor
    return keys


def write_llama3_record(rope: RopeParameters) -> dict[str, float | int]:
    """The keys, under their full names, from which ``read_gguf`` tells llama3 again."""
    if rope.llama3 is None:
        return {}
    return {f"{LLAMA3_RECORD}.{name}": value for name, value in llama3_block(rope.llama3).items()}


def _positive(keys: Mapping[str, object], key: str, default: float, where: str) -> float:
    """A number above 0, ``default`` where the key is absent; llama.cpp would compute with a 0."""
    value = number(keys.get(key, default), key, where)
    if value <= 0:
        raise RopeError(f"{where}: {key} is {value:g}", hint="Expected a number above 0.")
    return value


def _optional(keys: Mapping[str, object], key: str, where: str) -> float | None:
    """A factor, None where the key is absent or 0, which llama.cpp takes as not set."""
    return number(keys[key], key, where) or None if key in keys else None


def _recorded_llama3(file_keys: Mapping[str, object], where: str) -> Llama3Scaling | None:
    prefix = f"{LLAMA3_RECORD}."
    block = {k.removeprefix(prefix): v for k, v in file_keys.items() if k.startswith(prefix)}
    return read_llama3(block, LLAMA3_RECORD, where) if block else None


def _with_record(
    rope: RopeParameters, record: Llama3Scaling, divisors: FloatArray | None, where: str
) -> RopeParameters:
    """llama3 as recorded, held against the tensor, which is what llama.cpp rotates by."""
    recorded = dataclasses.replace(rope, llama3=record)
    if divisors is None:
        problem = f"{LLAMA3_RECORD}.* is recorded, and {DIVISORS_TENSOR} is missing"
    elif not _gives(recorded, divisors):
        problem = f"{DIVISORS_TENSOR} holds other frequency factors than {LLAMA3_RECORD}.* gives"
    else:
        return recorded
    raise RopeError(
        f"{where}: {problem}",
        hint="One of them was edited; export again from the original Hugging Face folder.",
    )


def _with_published_llama3(
    rope: RopeParameters, divisors: FloatArray, where: str
) -> RopeParameters:
    largest = float(np.max(divisors, initial=1.0))
    for low, high, original in _LLAMA3_SHAPES:
        for factor in (largest, 8.0, 32.0, 16.0, 4.0, 2.0):
            candidate = dataclasses.replace(rope, llama3=Llama3Scaling(factor, low, high, original))
            if _gives(candidate, divisors):
                return candidate
    raise UnsupportedError(
        f"{where}: {DIVISORS_TENSOR} holds frequency factors that no published llama3 setting"
        f" gives, and the file records no other ({LLAMA3_RECORD}.*)",
        hint="Export from the original Hugging Face folder instead.",
    )


def _gives(rope: RopeParameters, divisors: FloatArray) -> bool:
    """Whether llama3 of ``rope`` has these divisors, up to what tools' arithmetic differs by."""
    expected = rope.frequency_divisors()
    return (
        expected is not None
        and expected.shape == divisors.shape
        and ulp_distance(expected, divisors) <= _DIVISOR_ULP
    )
