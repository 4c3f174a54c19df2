"""Rules about RoPE scaling: type, factor, theta, width, and what multiplies them."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import numpy as np

from converters.containers.gguf import ValueType
from converters.errors import SourceError, UnsupportedError
from converters.rope import RopeParameters
from converters.rope import gguf as spelling
from pi_convert.audit import llamacpp
from pi_convert.audit.findings import Finding, note, wrong
from pi_convert.audit.header import Header, plain

FIX = "pi-convert fix FILE --scale S --original-context L --out NEW"
EXPORT = "Export again from the original checkpoint with pi-convert export."


def key_types(header: Header) -> Iterator[Finding]:
    """Every key that llama.cpp loads has the value type it demands; numbers are finite."""
    demanded = {header.full(key): kind for key, kind in llamacpp.LOADED_TYPES.items()}
    for key, expected in {**demanded, **llamacpp.TOKENIZER_TYPES}.items():
        number = header.file.key_types.get(key)
        if number is None or number == expected:
            continue
        found = ValueType(number).name.lower()
        yield wrong(
            "keys.type",
            f"{key} = {plain(header.file.keys[key])} is stored as {found}",
            f"{expected.name.lower()}; llama.cpp refuses to load another type",
            FIX if key in demanded else EXPORT,
        )
    for key, value in header.keys.items():
        judged = key in llamacpp.LOADED_TYPES  # by the rules below, with what follows from it
        if isinstance(value, float) and not isfinite(value) and not judged:
            yield wrong("keys.not-finite", header.shown(key), "a finite number", EXPORT)


def scaling(header: Header) -> Iterator[Finding]:
    """Type and factor agree, and are what llama.cpp reads as intended."""
    kind, factor = header.scaling_type, header.stored_factor
    shown = header.shown(spelling.TYPE_KEY, spelling.FACTOR_KEY)
    if kind not in spelling.KNOWN_TYPES:
        yield wrong(
            "rope.type.unknown",
            header.shown(spelling.TYPE_KEY),
            f"one of {', '.join(spelling.KNOWN_TYPES)}; llama.cpp aborts on any other",
            FIX,
        )
    elif kind == "none" and factor not in (None, 0.0, 1.0):
        yield wrong(
            "rope.type.none-with-factor",
            shown,
            "type linear: with none llama.cpp ignores the factor and runs unscaled",
            FIX,
        )
    elif spelling.TYPE_KEY not in header.keys and header.applied_factor != 1.0:
        yield note(
            "rope.type.missing",
            shown,
            "type linear written out: llama.cpp assumes it, other readers need not",
            FIX,
        )
    if kind in ("yarn", "longrope") and header.whole(spelling.ORIGINAL_KEY) is None:
        yield wrong(
            f"rope.{kind}.no-original-context",
            header.shown(spelling.TYPE_KEY, spelling.ORIGINAL_KEY),
            f"the trained context; llama.cpp takes context_length for it, which changes {kind}",
            EXPORT,
        )
    yield from _factor(header)


def _factor(header: Header) -> Iterator[Finding]:
    stated = [
        key for key in (spelling.FACTOR_KEY, spelling.LEGACY_FACTOR_KEY) if key in header.keys
    ]
    for key in stated:
        yield from _factor_value(header, key)
    if not stated and header.keys.get(spelling.TYPE_KEY) in ("linear", "yarn"):
        yield wrong(
            "rope.factor.missing",
            header.shown(spelling.TYPE_KEY, spelling.FACTOR_KEY),
            "a factor; without one llama.cpp runs unscaled",
            FIX,
        )
    if len(stated) == 2 and header.number(stated[0]) != header.number(stated[1]):
        yield wrong(
            "rope.factor.contradictory",
            header.shown(*stated),
            "one factor; llama.cpp reads the first, old readers the second",
            FIX,
        )
    elif stated == [spelling.LEGACY_FACTOR_KEY]:
        yield note(
            "rope.factor.legacy-key",
            header.shown(spelling.LEGACY_FACTOR_KEY),
            f"{spelling.FACTOR_KEY}: only llama.cpp still reads the old key",
            FIX,
        )


def _factor_value(header: Header, key: str) -> Iterator[Finding]:
    """The factor under one of its keys is a number of 1 or more."""
    value = header.keys[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return  # keys.type has said so
    if not isfinite(value):
        yield wrong("rope.factor.not-finite", header.shown(key), "a number of 1 or more", FIX)
    elif value == 0:
        yield wrong(
            "rope.factor.zero",
            header.shown(key),
            "a number of 1 or more; llama.cpp takes 0 as not set and runs unscaled",
            FIX,
        )
    elif value < 1:
        yield wrong(
            "rope.factor.below-one",
            header.shown(key),
            "1 or more (L'/L): positions are divided by it, so less than 1 spreads them out",
            FIX,
        )


def theta(header: Header) -> Iterator[Finding]:
    """The base of the frequencies is stated and positive."""
    value = header.keys.get(spelling.THETA_KEY)
    if header.architecture in llamacpp.WITHOUT_ROPE:
        return
    if value is None:
        never = header.architecture in llamacpp.THETA_NEVER_DEFAULT
        yield (wrong if never else note)(
            "rope.theta.missing",
            header.shown(spelling.THETA_KEY),
            "the base stated; llama.cpp takes 10000"
            + (f", which no published {header.architecture} model has" if never else ""),
            EXPORT,
        )
    elif isinstance(value, float) and not (isfinite(value) and value > 1):
        yield wrong(
            "rope.theta.out-of-range",
            header.shown(spelling.THETA_KEY),
            "a finite number above 1",
            EXPORT,
        )


def dimensions(header: Header) -> Iterator[Finding]:
    """The rotated width fits the head."""
    width, head = header.keys.get(spelling.DIMENSION_KEY), header.head_dim
    architecture = header.architecture
    if isinstance(width, bool) or not isinstance(width, int):
        return  # missing, or keys.type has said so
    if architecture in llamacpp.WITHOUT_ROPE:
        return
    shown = f"{header.shown(spelling.DIMENSION_KEY)}, head size {head or 'not stated'}"
    expected = ""
    if architecture in llamacpp.WHOLE_HEAD_ROTATED and width != head and head:
        expected = f"{head}: llama.cpp refuses a {architecture} file with another value"
    elif architecture in llamacpp.WHOLE_HEAD_ASSERTED and width != head and head:
        expected = f"{head}: llama.cpp aborts when it runs a {architecture} file with another value"
    elif width < 1:
        expected = "a number above 0: llama.cpp refuses, aborts or hangs, by architecture"
    elif head is not None and (width > head or width % 2):
        expected = f"an even number up to {head}"
    if expected:
        yield wrong("rope.dimensions.mismatch", shown, expected, EXPORT)


def attention_factor(header: Header) -> Iterator[Finding]:
    """Nothing scales cos and sin where the kind of RoPE has no attention factor."""
    value = header.keys.get(spelling.ATTENTION_KEY)
    if not isinstance(value, float) or value == 1.0:
        return
    shown = header.shown(spelling.TYPE_KEY, spelling.ATTENTION_KEY)
    if not (isfinite(value) and value > 0):
        yield wrong("rope.attention-factor.out-of-range", shown, "a positive number", FIX)
    elif header.scaling_type in ("linear", "none") and not header.has_longrope_tensors:
        yield wrong(
            "rope.attention-factor.not-yarn",
            shown,
            "1 or no key: llama.cpp multiplies cos and sin by it whatever the type, and linear"
            " RoPE has no such factor",
            FIX,
        )


def factor_tensor(header: Header) -> Iterator[Finding]:
    """``rope_freqs.weight`` is loaded, applied, well formed, and not scaled by accident."""
    if not header.has_factor_tensor:
        return
    name, architecture = spelling.DIVISORS_TENSOR, header.architecture
    if architecture not in llamacpp.LOADS_ROPE_FREQS:
        yield wrong(
            "rope.factors.not-loaded",
            f"{name} in a {architecture} file",
            f"no such tensor: llama.cpp's {architecture} does not create it and refuses the file"
            " (wrong number of tensors)",
            EXPORT,
        )
        return
    if architecture in llamacpp.IGNORES_ROPE_FREQS:
        yield wrong(
            "rope.factors.ignored",
            f"{name} in a {architecture} file",
            "no frequency factors: llama.cpp loads them and rotates without them",
            EXPORT,
        )
        return
    divisors = header.divisors()
    if divisors is None:
        return
    width = header.whole(spelling.DIMENSION_KEY) or header.head_dim
    if width is not None and len(divisors) != width // 2:
        found = f"{name} has {len(divisors)} values"
        yield wrong("rope.factors.size", found, f"{width // 2}, one for each frequency", EXPORT)
    elif not (np.all(np.isfinite(divisors)) and np.all(divisors > 0)):
        yield wrong(
            "rope.factors.not-positive", f"{name} has zero, negative or non-finite values",
            "positive divisors of the frequencies", EXPORT,
        )  # fmt: skip
    else:
        yield from _factors_meaning(header, name)


def _factors_meaning(header: Header, name: str) -> Iterator[Finding]:
    divisors = header.divisors()
    if (problem := _record_problem(header)) is not None:
        yield wrong(
            "rope.factors.record",
            problem,
            "a record that gives the tensor's values; llama.cpp reads the tensor alone",
            EXPORT,
        )
        return
    rope = llama3_of(header)
    if divisors is not None and np.all(divisors == 1):
        yield note("rope.factors.ones", f"{name} is all ones", "no tensor: it changes nothing")
    elif rope is None:
        yield note(
            "rope.factors.unknown",
            f"{name} holds values that no published llama3 setting gives, and none is recorded",
            "the source's own scaling, which a header cannot show",
            "pi-convert verify FILE --against SOURCE --scale S",
        )
    if header.applied_factor != 1.0:
        yield _factor_beside(header, f"{header.shown(spelling.FACTOR_KEY)} and {name}", rope)


def _factor_beside(header: Header, shown: str, rope: RopeParameters | None) -> Finding:
    """A factor and frequency factors in one file: PI over llama3, or scaling twice."""
    if _explained_over_llama3(header, rope):
        return note(
            "rope.factors.interpolated",
            shown,
            "PI over llama3 scaling: llama.cpp applies both, and the contexts agree with that",
        )
    return wrong(
        "rope.factors.scaled-twice",
        shown,
        "one of them, or both with original_context_length saying what the factor extends:"
        " llama.cpp divides the frequencies by both",
        FIX,
    )


def llama3_of(header: Header) -> RopeParameters | None:
    """The llama3 setting behind ``rope_freqs.weight``: recorded or published, None for another."""
    try:
        rope = _read_llama3(header)
    except (SourceError, UnsupportedError):
        return None
    return rope if rope is not None and rope.llama3 is not None else None


def _record_problem(header: Header) -> str | None:
    """What our record of llama3 contradicts; None where there is none or it holds."""
    try:
        _read_llama3(header)
    except SourceError as error:
        return error.message
    except UnsupportedError:  # no record, and no published setting
        return None
    return None


def _read_llama3(header: Header) -> RopeParameters | None:
    divisors = header.divisors()
    if divisors is None:
        return None
    keys = {
        spelling.CONTEXT_KEY: 1,
        spelling.THETA_KEY: header.number(spelling.THETA_KEY) or spelling.LLAMA_CPP_DEFAULT_THETA,
    }
    return spelling.read_gguf(
        keys,
        divisors,
        rotary_dim=2 * len(divisors),
        original_context=None,
        where=spelling.DIVISORS_TENSOR,
        file_keys=header.file.keys,
    )


def _explained_over_llama3(header: Header, rope: RopeParameters | None) -> bool:
    """Whether L is stated and longer than the context llama3's own formula starts from."""
    original = header.whole(spelling.ORIGINAL_KEY)
    if rope is None or rope.llama3 is None or original is None:
        return False
    return original > rope.llama3.original_context


def use(header: Header) -> Iterator[Finding]:
    """The architecture applies the factor, in every layer, and RoPE is switched on."""
    architecture, factor = header.architecture, header.applied_factor
    if architecture in llamacpp.WITHOUT_ROPE:
        if factor != 1.0:
            yield wrong(
                "rope.not-used",
                header.shown(spelling.FACTOR_KEY),
                f"no factor: llama.cpp's {architecture} has no RoPE, so nothing is extended",
            )
        return
    windowed = architecture in llamacpp.WINDOW_LAYERS_UNSCALED and header.whole(llamacpp.WINDOW_KEY)
    if windowed and factor != 1.0:
        yield note(
            "rope.window-layers-unscaled",
            header.shown(spelling.FACTOR_KEY, llamacpp.WINDOW_KEY),
            f"llama.cpp's {architecture} applies the factor to layers without a window only;"
            " right where the model was trained so",
        )
    switched_off = header.keys.get(spelling.FINETUNED_KEY) is False
    if switched_off and architecture in llamacpp.FINETUNED_SWITCHES_ROPE:
        deliberate = architecture in llamacpp.PUBLISHED_WITHOUT_ROPE and factor == 1.0
        yield (note if deliberate else wrong)(
            "rope.switched-off",
            header.shown(spelling.FINETUNED_KEY),
            f"true: false switches RoPE off in llama.cpp's {architecture}"
            + (" (models without RoPE say so)" if deliberate else ""),
            "" if deliberate else FIX,
        )
