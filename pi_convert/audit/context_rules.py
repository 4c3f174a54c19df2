"""Rules about L and L': what context_length claims against the factor."""

from __future__ import annotations

import re
from collections.abc import Iterator

from converters.rope import gguf as spelling
from converters.rope.contexts import MAX_CONTEXT, scaled_context
from pi_convert.audit import llamacpp
from pi_convert.audit.findings import Finding, note, wrong
from pi_convert.audit.header import Header
from pi_convert.audit.rope_rules import FIX

_NAME_KEYS = ("general.name", "general.basename", "general.finetune", "general.size_label")


def contexts(header: Header) -> Iterator[Finding]:
    """context_length is L x factor, and original_context_length says what L is."""
    context = header.whole(spelling.CONTEXT_KEY)
    if context is None:
        yield wrong(
            "context.missing",
            header.shown(spelling.CONTEXT_KEY),
            "a positive whole number; without a key llama.cpp refuses the file, with 0 it takes any"
            " context for too long",
            FIX,
        )
        return
    if context > MAX_CONTEXT:
        yield wrong(
            "context.out-of-range",
            header.shown(spelling.CONTEXT_KEY),
            f"at most {MAX_CONTEXT}: positions are signed 32-bit numbers, and llama.cpp tells"
            f" programs {context - 2**32} for it",
            FIX,
        )
        return
    original, factor = header.whole(spelling.ORIGINAL_KEY), header.applied_factor
    if factor == 1.0:
        yield from _unscaled(header, context, original)
    elif original is None:
        if header.scaling_type == "linear":
            yield _without_original(header, context, factor)
    else:
        yield from _scaled(header, context, original, factor)


def _unscaled(header: Header, context: int, original: int | None) -> Iterator[Finding]:
    if original is None or original == context or header.has_longrope_tensors:
        return
    shown = header.shown(spelling.ORIGINAL_KEY, spelling.CONTEXT_KEY)
    if original > context:
        yield wrong("context.below-original", shown, f"{original} or more", FIX)
    elif header.scaling_type != "longrope" and not header.has_factor_tensor:
        yield wrong(
            "rope.factor.dropped",
            f"{shown}, and no factor is applied",
            f"a factor of {context / original:g}: the file claims a context that nothing extends",
            f"pi-convert fix FILE --scale {context / original:g} --out NEW",
        )


def _without_original(header: Header, context: int, factor: float) -> Finding:
    legacy = spelling.FACTOR_KEY not in header.keys and spelling.LEGACY_FACTOR_KEY in header.keys
    factor_key = spelling.LEGACY_FACTOR_KEY if legacy else spelling.FACTOR_KEY
    shown = header.shown(spelling.CONTEXT_KEY, factor_key, spelling.ORIGINAL_KEY)
    full = scaled_context(context, factor)
    name = _name_saying(header, full)
    if name:
        return wrong(
            "context.not-extended",
            f"{shown}; {name}",
            f"context_length {full}: llama-server clamps its slots to what is written",
            f"pi-convert fix FILE --scale {factor:g} --original-context {context} --out NEW",
        )
    return note(
        "context.original-missing",
        shown,
        f"L stated: it is {context / factor:g} if context_length is L' and {context} if it is L,"
        " and then llama-server clamps slots to L",
        f"pi-convert fix FILE --scale {factor:g} --original-context L --out NEW",
    )


def _name_saying(header: Header, full: int) -> str:
    """The metadata's own name for the extended context, such as vicuna-7b-16k; "" without one."""
    for key in _NAME_KEYS:
        value = header.file.keys.get(key)
        if isinstance(value, str):
            for thousands in re.findall(r"(?<![\w.])(\d+)k(?![a-z])", value, re.IGNORECASE):
                if int(thousands) * 1024 == full:
                    return f"{key} = {value}"
    return ""


def _scaled(header: Header, context: int, original: int, factor: float) -> Iterator[Finding]:
    full = scaled_context(original, factor)
    if context == full:
        return
    shown = header.shown(spelling.CONTEXT_KEY, spelling.ORIGINAL_KEY, spelling.FACTOR_KEY)
    repair = f"pi-convert fix FILE --scale {factor:g} --out NEW"
    if context < original:
        yield wrong("context.below-original", shown, f"{full} (L x factor)", repair)
    elif context == original:
        yield wrong(
            "context.not-extended",
            shown,
            f"{full} (L x factor): llama-server clamps its slots to what is written",
            repair,
        )
    elif context < full:
        yield note("context.below-full", shown, f"up to {full} (L x factor)", repair)
    else:
        published = header.scaling_type != "linear"
        yield (note if published else wrong)(
            "context.over-claimed",
            shown,
            f"at most {full} (L x factor); more was not trained"
            + (", though published yarn models claim it" if published else ""),
            "" if published else repair,
        )


def window(header: Header) -> Iterator[Finding]:
    """No attention window is written that llama.cpp leaves out within the context."""
    size = header.whole(llamacpp.WINDOW_KEY)
    context = header.whole(spelling.CONTEXT_KEY)
    ignored = header.architecture in llamacpp.WINDOW_IGNORED
    if size and context and ignored and context > size:
        yield note(
            "attention.window-ignored",
            header.shown(llamacpp.WINDOW_KEY, spelling.CONTEXT_KEY),
            f"llama.cpp's {header.architecture} attends to everything: beyond {size} tokens it"
            " differs from the model as trained",
        )
