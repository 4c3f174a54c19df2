"""Who makes which K-quant on this machine, why, and how fast both would be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from converters.encodings import ENCODINGS, Encoding
from converters.ggml import Floats, Quantizer, load_quantizer
from converters.ggml.checked_values import like_weights
from converters.ggml.kernels import KERNEL_TYPES

_ROWS = 256  # of 256: a tenth of a second for the slowest type


@dataclass(frozen=True, slots=True)
class QuantizerUse:
    """One type; rates are elements a second on one core, None for kernels that cannot run."""

    type_name: str
    maker: str  # ggml, or the kernels' instruction set
    reason: str
    kernel_rate: float | None
    ggml_rate: float


def survey_quantizers() -> tuple[QuantizerUse, ...]:
    """Every type that the kernels know, as ``export`` would make it now."""
    return tuple(_uses(load_quantizer()))


def _uses(quantizer: Quantizer) -> Iterator[QuantizerUse]:
    values = like_weights(_ROWS)
    for name in KERNEL_TYPES:
        encoding = ENCODINGS[name]
        ggml_rate = _rate(quantizer.ggml.quantize, encoding, values)
        kernels = quantizer.kernels
        if kernels is None:
            yield QuantizerUse(name, "ggml", quantizer.unavailable or "", None, ggml_rate)
            continue
        rate = _rate(kernels.quantize, encoding, values)
        if quantizer.kernels_of(encoding) is not None:
            yield QuantizerUse(name, kernels.instruction_set, "ggml's bytes", rate, ggml_rate)
        else:
            reason = "the kernels make other bytes than this build of ggml"
            yield QuantizerUse(name, "ggml", reason, rate, ggml_rate)


def _rate(
    quantize: Callable[[Encoding, Floats], object], encoding: Encoding, values: Floats
) -> float:
    quantize(encoding, values[:8])
    started = time.perf_counter()
    quantize(encoding, values)
    return values.size / (time.perf_counter() - started)
