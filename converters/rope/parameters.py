"""The value that describes a model's RoPE, and the frequencies it gives.

Position Interpolation (PI, arXiv 2306.15595, section 3.2) feeds position m * L / L' to RoPE, which
is the same as dividing every frequency by the factor s = L' / L.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from converters.errors import RopeError
from converters.rope.contexts import Evidence, extended_context

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent scaling (transformers ``_compute_llama3_parameters``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens; belongs to the formula, not the L that PI extends


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """One model's RoPE: base frequencies, what scales them, and the contexts they are good for.

    ``factor`` is PI's s (1 where nothing is interpolated); it multiplies the wavelengths that
    ``llama3``, where there is one, has already stretched. ``original_context`` is L, ``context``
    is L', both in tokens.
    """

    theta: float
    rotary_dim: int
    original_context: int
    context: int
    factor: float = 1.0
    llama3: Llama3Scaling | None = None
    evidence: tuple[Evidence, ...] = ()  # how theta, L and L' were told

    @property
    def kind(self) -> str:
        """The field's name for it: default, linear, llama3 or ``linear over llama3``."""
        names = ["linear"] * (self.factor != 1.0) + ["llama3"] * (self.llama3 is not None)
        return " over ".join(names) or "default"

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by; 1 for every kind here."""
        return 1.0

    def interpolate(self, scale: float) -> RopeParameters:
        """The same RoPE with its context extended ``scale`` times; factors compose, L stays.

        Raises ``RopeError`` unless ``scale`` is finite and at least 1.
        """
        if not (math.isfinite(scale) and scale >= 1):
            raise RopeError(
                f"scale {scale} cannot extend a context",
                hint="Give a scale of 1 or more, such as 8.",
            )
        context = max(self.context, extended_context(self.context, scale))
        return dataclasses.replace(
            self, factor=decimal_product(self.factor, scale), context=context
        )

    def unscaled(self) -> RopeParameters:
        """The same RoPE without interpolation: factor 1, context L."""
        return dataclasses.replace(self, factor=1.0, context=self.original_context)

    def base_inv_freq(self) -> FloatArray:
        """theta^(-2i/d) for i < d/2, float32 (rotary_dim / 2,), in transformers' order.

        Checkpoints were trained with transformers' float32 arithmetic, so that is what is right. A
        float64 power rounded once is what torch's own comes to: 1 % of entries differ, by 1 ulp
        (numpy's float32 power: 18 %, by up to 2).
        """
        exponents = np.arange(0, self.rotary_dim, 2).astype(np.float32) / np.float32(
            self.rotary_dim
        )
        powers = np.power(np.float64(np.float32(self.theta)), exponents.astype(np.float64))
        frequencies: FloatArray = np.float32(1.0) / powers.astype(np.float32)
        return frequencies

    def inv_freq(self) -> FloatArray:
        """The inverse frequencies in radians a token, float32 (rotary_dim / 2,)."""
        frequencies = self.base_inv_freq()
        if self.llama3 is not None:
            frequencies = _llama3(frequencies, self.llama3)
        return frequencies / np.float32(self.factor)

    def frequency_divisors(self) -> FloatArray | None:
        """What llama3 divides each base frequency by, float32 (rotary_dim / 2,); None without it.

        This is GGUF's ``rope_freqs.weight``; PI's factor is not in it.
        """
        if self.llama3 is None:
            return None
        base = self.base_inv_freq()
        scaled = _llama3(base, self.llama3)
        return (base.astype(np.float64) / scaled).astype(np.float32)


def _llama3(frequencies: FloatArray, scaling: Llama3Scaling) -> FloatArray:
    # torch divides a scalar by a tensor as reciprocal times scalar; the smoothing below amplifies
    # last bits, so the order of operations is kept.
    one, factor = np.float32(1), np.float32(scaling.factor)
    low = np.float32(scaling.original_context / scaling.low_freq_factor)
    high = np.float32(scaling.original_context / scaling.high_freq_factor)
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    stretched = np.where(wavelengths > low, frequencies / factor, frequencies)
    turns = one / wavelengths * np.float32(scaling.original_context)
    smooth = (turns - np.float32(scaling.low_freq_factor)) / np.float32(
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (one - smooth) * stretched / factor + smooth * stretched
    medium = (wavelengths >= high) & (wavelengths <= low)
    return np.where(medium, smoothed, stretched).astype(np.float32)


def ulp_distance(expected: FloatArray, found: FloatArray) -> int:
    """The largest distance between two float32 arrays of one shape, in units of last place."""
    a = np.ascontiguousarray(expected, dtype=np.float32).view(np.int32).astype(np.int64)
    b = np.ascontiguousarray(found, dtype=np.float32).view(np.int32).astype(np.int64)
    return int(np.max(np.abs(a - b), initial=0))


def decimal_product(a: float, b: float) -> float:
    """The product of the decimals that a and b are written as: 8.8 times 1.5 is 13.2.

    Binary floats give 13.200000000000001, which would stand so in configs, file names and messages,
    and be another factor than the 13.2 that somebody gives to ``verify`` or writes by hand.
    """
    return float(Decimal(repr(float(a))) * Decimal(repr(float(b))))


def shortest_float32(value: float) -> float:
    """The decimal a person wrote: 2.2, not the 2.200000047683716 that float32 stores."""
    return float(str(np.float32(value)))


def uniform_ratio(expected: FloatArray, found: FloatArray, *, tolerance: float) -> float | None:
    """The one factor by which ``found`` frequencies are below ``expected``; None if there is none.

    ``tolerance`` bounds the relative spread of the ratios over all frequencies.
    """
    if not (np.all(np.isfinite(found)) and np.all(found > 0)):
        return None
    ratios = expected.astype(np.float64) / found.astype(np.float64)
    middle = float(np.median(ratios))
    spread = float(np.max(np.abs(ratios / middle - 1)))
    return middle if spread <= tolerance else None
