"""What has to change in a GGUF's keys for llama.cpp to rotate by a wanted factor.

Of any architecture: only keys under ``{architecture}.`` are touched, and what keys cannot put right
is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.containers.gguf import GgufFile
from converters.errors import RopeError, UnsupportedError
from converters.rope import Evidence
from converters.rope import gguf as spelling
from converters.rope.contexts import extended_context, unscaled_context
from pi_convert.audit import llamacpp
from pi_convert.audit.header import Header, short

if TYPE_CHECKING:
    from converters.targets.gguf.rewrite import KeyValue

# Keys of other kinds of scaling, which would act beside a linear factor or contradict it.
_OTHER_KINDS = (
    spelling.LEGACY_FACTOR_KEY,
    spelling.ATTENTION_KEY,
    "rope.scaling.alpha",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


@dataclass(frozen=True, slots=True)
class Repair:
    """New values for full key names (None removes), with L and L' in tokens and how L was told."""

    factor: float
    original_context: int
    context: int
    evidence: tuple[Evidence, ...]
    changes: Mapping[str, KeyValue | None]
    notes: tuple[str, ...]


def plan_repair(file: GgufFile, factor: float, original_context: int | None) -> Repair:
    """The keys that make ``factor`` the file's own, whatever it says now.

    Raises ``UnsupportedError`` where keys alone cannot do that, and ``RopeError`` where L is not
    known or contradictory.
    """
    header = Header.of(file)
    where = file.path.name
    _refuse(header, where)
    original, told = _original_context(header, original_context, where)
    context = extended_context(original, factor, where)
    keys: dict[str, KeyValue | None] = {
        spelling.CONTEXT_KEY: context,
        spelling.TYPE_KEY: "none" if factor == 1.0 else "linear",
        spelling.FACTOR_KEY: None if factor == 1.0 else factor,
        spelling.ORIGINAL_KEY: original,
        **dict.fromkeys(_OTHER_KINDS),
    }
    if header.architecture in llamacpp.FINETUNED_SWITCHES_ROPE:
        keys[spelling.FINETUNED_KEY] = True
    keys |= _retyped(header)
    changes = {
        header.full(key): value
        for key, value in keys.items()
        if value is not None or key in header.keys
    }
    extended = Evidence("L'", f"L x {factor:g}")
    return Repair(factor, original, context, (told, extended), changes, tuple(_notes(header)))


def _retyped(header: Header) -> dict[str, KeyValue | None]:
    """Theta and width in the type that llama.cpp loads, where they are numbers of another."""
    keys: dict[str, KeyValue | None] = {}
    for key, convert in ((spelling.THETA_KEY, float), (spelling.DIMENSION_KEY, int)):
        value = header.number(key)
        stored = header.file.key_types.get(header.full(key))
        if value is not None and stored != llamacpp.LOADED_TYPES[key]:
            keys[key] = convert(value)
    return keys


def _refuse(header: Header, where: str) -> None:
    architecture = header.architecture
    reason = ""
    if architecture in llamacpp.WITHOUT_ROPE:
        reason = f"llama.cpp's {architecture} has no RoPE, so no factor can extend it"
    elif header.has_longrope_tensors:
        reason = "its longrope factor tensors would be applied beside a linear factor"
    elif header.has_factor_tensor and architecture not in llamacpp.LOADS_ROPE_FREQS:
        reason = f"llama.cpp's {architecture} refuses a file with {spelling.DIVISORS_TENSOR}"
    elif header.has_factor_tensor and architecture in llamacpp.IGNORES_ROPE_FREQS:
        reason = f"llama.cpp's {architecture} ignores {spelling.DIVISORS_TENSOR}"
    elif (
        header.keys.get(spelling.FINETUNED_KEY) is False
        and architecture in llamacpp.PUBLISHED_WITHOUT_ROPE
    ):
        reason = f"{header.full(spelling.FINETUNED_KEY)} = false: this model is made without RoPE"
    if reason:
        raise UnsupportedError(
            f"{where}: {reason}",
            hint="Keys alone cannot repair this; export from the original checkpoint.",
        )


def _original_context(header: Header, override: int | None, where: str) -> tuple[int, Evidence]:
    """L and how it was told: the option, the file's own key, else context_length."""
    if override is not None:
        return override, Evidence("L", "--original-context")
    context = header.whole(spelling.CONTEXT_KEY)
    original = header.whole(spelling.ORIGINAL_KEY)
    if original is not None:
        if context is not None and context < original:
            raise RopeError(
                f"{where}: {header.shown(spelling.ORIGINAL_KEY, spelling.CONTEXT_KEY)}",
                hint="Give --original-context N, the context the model was trained with.",
            )
        return original, Evidence("L", header.full(spelling.ORIGINAL_KEY))
    if context is None:
        raise RopeError(
            f"{where}: {header.shown(spelling.CONTEXT_KEY)}",
            hint="Give --original-context N, the context the model was trained with.",
        )
    stored = header.stored_factor
    if stored is not None and stored > 1:
        # context_length may be L or L'; a context is never over-claimed.
        value = unscaled_context(context, short(stored))
        return value, Evidence(
            "L",
            f"{header.full(spelling.CONTEXT_KEY)} / {short(stored):g}, assuming that it is L';"
            f" if it is L, give --original-context {context}",
            assumed=True,
        )
    return context, Evidence("L", header.full(spelling.CONTEXT_KEY))


def _notes(header: Header) -> list[str]:
    notes = []
    architecture = header.architecture
    if architecture in llamacpp.WINDOW_LAYERS_UNSCALED and header.whole(llamacpp.WINDOW_KEY):
        notes.append(
            f"llama.cpp's {architecture} rotates layers with a sliding window unscaled: the factor"
            " acts on the others only."
        )
    if header.has_factor_tensor:
        notes.append(
            f"{spelling.DIVISORS_TENSOR} stays: llama.cpp divides frequencies by it and by the"
            " factor."
        )
    if header.scaling_type in ("yarn", "longrope"):
        notes.append(f"{header.scaling_type} scaling is replaced by linear.")
    if spelling.THETA_KEY not in header.keys:
        notes.append(
            f"{header.full(spelling.THETA_KEY)} is missing: llama.cpp takes 10000; fix leaves it."
        )
    return notes
