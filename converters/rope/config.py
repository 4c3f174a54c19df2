"""Hugging Face's spellings of RoPE, in and out.

In: ``rope_parameters`` (transformers 5), ``rope_scaling`` with ``rope_type`` or ``type``
(transformers 4, and earlier), ``rope_theta`` in any of them or at the top. Out: a set of keys that
transformers 4 and 5, vLLM and mlx-lm all read to the same factor and theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

from converters.errors import RopeError, UnsupportedError, shown
from converters.rope.contexts import ContextClaims, Evidence, resolve_contexts
from converters.rope.parameters import FloatArray, Llama3Scaling, RopeParameters, ulp_distance

LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
MAX_INTEGER = 2**63 - 1  # beyond it a JSON number is no size of anything
SUPPORTED_KINDS = ("default", "linear", "llama3")
_REFUSED_HINTS = {
    "dynamic": "Dynamic NTK changes with the length of the input and no file can hold it;"
    " fix a factor and write it as linear.",
    "yarn": "yarn is not supported yet; supported are default, linear and llama3.",
    "longrope": "longrope is not supported yet; supported are default, linear and llama3.",
}
_COMMON_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor"}
_KIND_KEYS = {
    "default": {"factor"},
    "linear": {"factor", "original_max_position_embeddings", "finetuned"},
    "llama3": {*LLAMA3_FACTORS, "original_max_position_embeddings"},
    # only beside our own record
    "longrope": {"factor", "short_factor", "long_factor", "short_mscale", "long_mscale",
                 "original_max_position_embeddings"},
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"
_ONLY_ONE = ("partial_rotary_factor", "attention_factor", "short_mscale", "long_mscale")
_RECORD = "pi_convert"  # our own config key: what a longrope spelling stands for

# float32 division and multiplication round once each; transformers' pow and numpy's differ by one.
_RECORD_ULP = 4


@dataclass(frozen=True, slots=True)
class RopeContext:
    """What RoPE needs to know besides its own keys."""

    where: str  # the file, for messages
    rotary_dim: int
    default_theta: float | None = None  # the architecture's own, where a config may leave it out
    model_max_length: int | None = None  # tokenizer_config.json's
    original_context: int | None = None  # L as somebody knows it who is to be believed
    original_context_key: str = "--original-context"  # who that is


def read_config(config: Mapping[str, object], about: RopeContext) -> RopeParameters:
    """The RoPE of a Hugging Face ``config.json``.

    Raises ``RopeError`` naming the key where one is missing, contradictory, not a number or out of
    range, and ``UnsupportedError`` for a kind that cannot be exported right.
    """
    where = about.where
    blocks = _blocks(config, where)
    kind = _kind(blocks, where)
    record = config.get(_RECORD)
    if kind == "longrope" and isinstance(record, Mapping) and "llama3" in record:
        return _read_record(config, record, blocks, about)
    if kind not in SUPPORTED_KINDS:
        hint = _REFUSED_HINTS.get(kind, f"Supported are {', '.join(SUPPORTED_KINDS)}.")
        raise UnsupportedError(f"{where}: RoPE of type {shown(kind)}", hint=hint)
    for name, block in blocks.items():
        _refuse_unknown(block, name, kind, where)
    theta, evidence = _theta(config, blocks, about)
    factor = 1.0
    llama3 = None
    if kind == "default" and (claimed := _claimed_factor(blocks, where)) != 1.0:
        raise RopeError(
            f"{where}: the RoPE type is default, but a factor of {claimed:g} is stated",
            hint="Expected type linear, or no factor.",
        )
    if kind == "linear":
        factor = _agreed(blocks, "factor", where, minimum=1.0)
    elif kind == "llama3":
        llama3 = _llama3(config, blocks, where)
    claims = _claims(config, blocks, about, kind)
    contexts = resolve_contexts(claims, factor, where)
    return RopeParameters(
        theta=theta,
        rotary_dim=about.rotary_dim,
        original_context=contexts.original_context,
        context=contexts.context,
        factor=factor,
        llama3=llama3,
        evidence=(*evidence, *contexts.evidence),
    )


def write_config(rope: RopeParameters) -> dict[str, object]:
    """The config keys that spell ``rope`` for every reader; keys to leave out are None.

    PI over llama3 has no kind of its own in transformers: it is written as longrope with both
    factor lists equal, and recorded under ``pi_convert`` so that it can be read back.
    """
    block = _block(rope)
    keys: dict[str, object] = {
        "rope_theta": rope.theta,
        "rope_parameters": {**block, "rope_theta": rope.theta},
        "rope_scaling": None,
        "max_position_embeddings": rope.context,
        "original_max_position_embeddings": None,
        _RECORD: None,
    }
    if rope.kind != "default":
        keys["rope_scaling"] = {"type": block["rope_type"], **block}
    if rope.factor != 1.0:
        # Not for plain llama3: there a top-level value overrides the formula's own.
        keys["original_max_position_embeddings"] = rope.original_context
    if rope.factor != 1.0 and rope.llama3 is not None:
        keys[_RECORD] = {"factor": rope.factor, "llama3": llama3_block(rope.llama3)}
    return keys


def _block(rope: RopeParameters) -> dict[str, object]:
    if rope.llama3 is not None and rope.factor != 1.0:
        factors = [float(f) for f in _longrope_factors(rope)]
        return {
            "rope_type": "longrope",
            "factor": rope.factor,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "short_mscale": 1.0,  # vLLM's names for attention_factor
            "long_mscale": 1.0,
            "original_max_position_embeddings": rope.original_context,
        }
    if rope.llama3 is not None:
        return {"rope_type": "llama3", **llama3_block(rope.llama3)}
    if rope.factor != 1.0:
        return {"rope_type": "linear", "factor": rope.factor}
    return {"rope_type": "default"}


def _longrope_factors(rope: RopeParameters) -> FloatArray:
    ratios = rope.base_inv_freq().astype(np.float64) / rope.inv_freq()
    return ratios.astype(np.float32)


def llama3_block(scaling: Llama3Scaling) -> dict[str, float | int]:
    """llama3's four numbers under transformers' names."""
    factors = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
    return {**dict(zip(LLAMA3_FACTORS, factors, strict=True)), _ORIGINAL: scaling.original_context}


def _blocks(config: Mapping[str, object], where: str) -> dict[str, Mapping[str, object]]:
    blocks: dict[str, Mapping[str, object]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        block = config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise RopeError(
                f"{where}: {name} is {shown(block)}", hint="Expected an object or null."
            )
        if any(isinstance(value, Mapping) for value in block.values()):
            raise UnsupportedError(
                f"{where}: {name} gives RoPE by layer type",
                hint="Only one RoPE for all layers can be exported.",
            )
        blocks[name] = block
    return blocks


def _kind(blocks: Mapping[str, Mapping[str, object]], where: str) -> str:
    stated = {
        f"{name}.{key}": block[key]
        for name, block in blocks.items()
        for key in ("rope_type", "type")
        if block.get(key) is not None
    }
    for name, block in blocks.items():
        scales = block.keys() & {"factor", "short_factor", "long_factor", "low_freq_factor"}
        if scales and not block.keys() & {"rope_type", "type"}:
            raise RopeError(
                f"{where}: {name} has {', '.join(sorted(scales))} and no rope_type",
                hint=f"Expected {name}.rope_type to name the kind, such as linear.",
            )
    if (odd := next((v for v in stated.values() if not isinstance(v, str)), None)) is not None:
        raise RopeError(f"{where}: RoPE type {shown(odd)}", hint="Expected a text such as linear.")
    kinds = set(map(str, stated.values()))
    if len(kinds) > 1:
        listed = ", ".join(f"{key} {shown(value)}" for key, value in stated.items())
        raise RopeError(f"{where}: contradictory RoPE types: {listed}", hint="Expected one type.")
    return kinds.pop() if kinds else "default"


def _refuse_unknown(block: Mapping[str, object], name: str, kind: str, where: str) -> None:
    unknown = sorted(block.keys() - _COMMON_KEYS - _KIND_KEYS[kind])
    if unknown:
        raise RopeError(
            f"{where}: {name} has {', '.join(unknown)}, which {kind} RoPE does not know",
            hint="Correct the spelling or remove the key.",
        )
    for key in _ONLY_ONE:
        if (
            key in block
            and block[key] is not None
            and number(block[key], f"{name}.{key}", where) != 1
        ):
            raise UnsupportedError(
                f"{where}: {name}.{key} is {block[key]}", hint="Only 1 can be exported."
            )


def _theta(
    config: Mapping[str, object], blocks: Mapping[str, Mapping[str, object]], about: RopeContext
) -> tuple[float, tuple[Evidence, ...]]:
    stated = {f"{n}.rope_theta": b["rope_theta"] for n, b in blocks.items() if "rope_theta" in b}
    if config.get("rope_theta") is not None:
        stated["rope_theta"] = config["rope_theta"]
    if not stated:
        if about.default_theta is None:
            raise RopeError(f"{about.where}: rope_theta is missing", hint="Add it to the config.")
        note = f"rope_theta is not stated: the architecture's default {about.default_theta:g}"
        return about.default_theta, (Evidence("theta", note, assumed=True),)
    theta = _one_value(stated, about.where, minimum=1.0)
    return theta, (Evidence("theta", next(iter(stated))),)


def _agreed(
    blocks: Mapping[str, Mapping[str, object]], key: str, where: str, *, minimum: float
) -> float:
    """The number that every block gives for ``key``."""
    stated = {f"{name}.{key}": block[key] for name, block in blocks.items() if key in block}
    for name, block in blocks.items():
        stated_kind = block.get("rope_type", block.get("type"))
        if key not in block and (stated_kind is not None or not stated):
            raise RopeError(
                f"{where}: {name}.{key} is missing", hint=f"{stated_kind or 'This'} RoPE needs it."
            )
    return _one_value(stated, where, minimum=minimum)


def _claimed_factor(blocks: Mapping[str, Mapping[str, object]], where: str) -> float:
    stated = {f"{n}.factor": b["factor"] for n, b in blocks.items() if b.get("factor") is not None}
    return _one_value(stated, where, minimum=1.0) if stated else 1.0


def _one_value(stated: Mapping[str, object], where: str, *, minimum: float) -> float:
    values = {key: number(value, key, where, minimum=minimum) for key, value in stated.items()}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{key} {value:g}" for key, value in values.items())
        raise RopeError(f"{where}: contradictory values: {listed}", hint="Make them one value.")
    return next(iter(values.values()))


def read_llama3(block: Mapping[str, object], name: str, where: str) -> Llama3Scaling:
    """llama3's four numbers from a record of our own; the counterpart of ``llama3_block``.

    ``name`` is put before the keys in messages. Raises ``RopeError`` for one that is missing or out
    of range.
    """
    return _llama3({}, {name: block}, where)


def _llama3(
    config: Mapping[str, object], blocks: Mapping[str, Mapping[str, object]], where: str
) -> Llama3Scaling:
    low = _agreed(blocks, "low_freq_factor", where, minimum=0.0)
    high = _agreed(blocks, "high_freq_factor", where, minimum=0.0)
    if not 0 < low < high:
        raise RopeError(
            f"{where}: low_freq_factor {low:g} and high_freq_factor {high:g}",
            hint="Expected 0 < low_freq_factor < high_freq_factor.",
        )
    # transformers lets one at the top win over the formula's own, so they have to agree.
    original = _original(config, blocks, where)
    if original is None:
        raise RopeError(f"{where}: {next(iter(blocks))}.{_ORIGINAL} is missing",
                        hint="llama3 RoPE needs it.")  # fmt: skip
    factor = _agreed(blocks, "factor", where, minimum=1.0)
    return Llama3Scaling(factor, low, high, original[0])


def _original(
    config: Mapping[str, object], blocks: Mapping[str, Mapping[str, object]], where: str
) -> tuple[int, str] | None:
    """The one value at the top and in the blocks, and the key that first says it."""
    stated = {_ORIGINAL: whole(config, _ORIGINAL, where)}
    for name, block in blocks.items():
        stated[f"{name}.{_ORIGINAL}"] = whole(block, _ORIGINAL, where, block=f"{name}.")
    present = {key: value for key, value in stated.items() if value is not None}
    if not present:
        return None
    return int(_one_value(present, where, minimum=1.0)), next(iter(present))


def _claims(
    config: Mapping[str, object],
    blocks: Mapping[str, Mapping[str, object]],
    about: RopeContext,
    kind: str,
) -> ContextClaims:
    where = about.where
    max_position = whole(config, "max_position_embeddings", where)
    if max_position is None:
        raise RopeError(
            f"{where}: max_position_embeddings is missing", hint="Add it to the config."
        )
    original, original_key = None, ""
    if kind == "linear":
        original, original_key = _original(config, blocks, where) or (None, "")
    hint, hint_key = whole(config, "max_sequence_length", where), "max_sequence_length"
    if hint is None:
        hint, hint_key = whole(config, "model_max_length", where), "model_max_length"
    if hint is None:
        hint, hint_key = about.model_max_length, "model_max_length of the tokenizer"
    return ContextClaims(
        max_position=max_position,
        max_position_key="max_position_embeddings",
        original=original,
        original_key=original_key,
        hint=hint,
        hint_key=hint_key,
        override=about.original_context,
        override_key=about.original_context_key,
    )


def _read_record(
    config: Mapping[str, object],
    record: Mapping[str, object],
    blocks: Mapping[str, Mapping[str, object]],
    about: RopeContext,
) -> RopeParameters:
    """PI over llama3 from our own record, held against the longrope lists that runtimes read."""
    where = about.where
    nested = record["llama3"]
    if not isinstance(nested, Mapping):
        raise RopeError(f"{where}: {_RECORD}.llama3 is {shown(nested)}", hint="Expected an object.")
    llama3 = read_llama3(nested, f"{_RECORD}.llama3", where)
    factor = number(record.get("factor"), f"{_RECORD}.factor", where, minimum=1.0)
    theta, evidence = _theta(config, blocks, about)
    contexts = resolve_contexts(_recorded_claims(config, blocks, about), factor, where)
    rope = RopeParameters(
        theta=theta,
        rotary_dim=about.rotary_dim,
        original_context=contexts.original_context,
        context=contexts.context,
        factor=factor,
        llama3=llama3,
        evidence=(*evidence, *contexts.evidence),
    )
    _refuse_other_lists(blocks, rope, where)
    return rope


def _recorded_claims(
    config: Mapping[str, object], blocks: Mapping[str, Mapping[str, object]], about: RopeContext
) -> ContextClaims:
    """L and L', which both have to stand beside a record."""
    original = _original(config, blocks, about.where)
    context = whole(config, "max_position_embeddings", about.where)
    if original is None or context is None:
        raise RopeError(
            f"{about.where}: max_position_embeddings and {_ORIGINAL} are needed beside {_RECORD}",
            hint="Export the checkpoint again.",
        )
    return ContextClaims(
        max_position=context,
        max_position_key="max_position_embeddings",
        original=original[0],
        original_key=original[1],
        override=about.original_context,
        override_key=about.original_context_key,
    )


def _refuse_other_lists(
    blocks: Mapping[str, Mapping[str, object]], rope: RopeParameters, where: str
) -> None:
    """``RopeError`` where the longrope lists rotate by other frequencies than the record."""
    expected = _longrope_factors(rope)
    for name, block in blocks.items():
        _refuse_unknown(block, name, "longrope", where)
        for key in ("short_factor", "long_factor"):
            found = _float32_list(block.get(key), f"{name}.{key}", where)
            if found.shape != expected.shape or ulp_distance(expected, found) > _RECORD_ULP:
                raise RopeError(
                    f"{where}: {name}.{key} is not what {_RECORD} records"
                    f" (factor {rope.factor:g} over llama3)",
                    hint=f"One of them was edited; export again, or remove {_RECORD}.",
                )
        if block.get("attention_factor") is None:
            # transformers computes another one where it is missing.
            raise RopeError(f"{where}: {name}.attention_factor is missing", hint="Export again.")


def _float32_list(value: object, key: str, where: str) -> FloatArray:
    if not isinstance(value, list):
        raise RopeError(f"{where}: {key} is {shown(value)}", hint="Expected a list of numbers.")
    numbers = [number(v, f"{key}[{i}]", where) for i, v in enumerate(value)]
    if any(v > float(np.finfo(np.float32).max) for v in numbers):
        raise RopeError(f"{where}: {key} holds numbers beyond float32", hint="Export again.")
    return np.asarray(numbers, dtype=np.float32)


def number(value: object, key: str, where: str, *, minimum: float = 0.0) -> float:
    """``value`` as a float; ``RopeError`` unless it is finite and at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RopeError(f"{where}: {key} is {shown(value)}", hint="Expected a number.")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RopeError(f"{where}: {key} is too large", hint=f"Expected at most {MAX_INTEGER}.")
    if not isfinite(value) or value < minimum:
        raise RopeError(f"{where}: {key} is {shown(value)}", hint=f"Expected at least {minimum:g}.")
    return float(value)


def whole(config: Mapping[str, object], key: str, where: str, *, block: str = "") -> int | None:
    """``config[key]`` as a positive whole number, or None where it is absent or null.

    ``block`` is put before the key in messages.
    """
    value = config.get(key)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or abs(value) > MAX_INTEGER
        or not isfinite(value)
        or value != int(value)
        or value < 1
    ):
        raise RopeError(
            f"{where}: {block}{key} is {shown(value)}", hint="Expected a positive whole number."
        )
    return int(value)
