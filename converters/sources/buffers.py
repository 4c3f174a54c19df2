"""Stored ``rotary_emb.inv_freq`` buffers, held against what the config says.

transformers 5 and llama.cpp ignore these buffers, so PI that stands in them alone would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from converters.errors import RopeError
from converters.rope import RopeParameters
from converters.rope.parameters import FloatArray, uniform_ratio
from converters.tensor import Tensor

_NAME = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")

# How far a stored frequency may be off: relative, and absolute where the type has subnormals.
# f32: theta^(2i/d) computed as a power, as exp(log) or in float64 first differs by at most 3 ulp
# (3.6e-7). f16 and bf16: one unit of the last place, twice what rounding costs.
_TOLERANCE: Mapping[str, tuple[float, float]] = {
    "f32": (1e-6, 0.0),
    "f16": (2.0**-10, 2.0**-24),
    "bf16": (2.0**-7, 0.0),
}


def is_frequency_buffer(name: str) -> bool:
    """Whether ``name`` is that of a stored ``inv_freq``."""
    return _NAME.fullmatch(name) is not None


def check_frequency_buffers(
    buffers: Mapping[str, Tensor], rope: RopeParameters, where: str
) -> None:
    """Raises ``RopeError`` unless every buffer holds the frequencies that ``rope`` gives.

    Unscaled buffers beside a linear factor are right too: transformers before 4.33 stored them so
    and scaled the positions.
    """
    expected = rope.inv_freq()
    for name, tensor in buffers.items():
        stored = tensor.read_f32(0, tensor.rows).reshape(-1)
        if stored.shape != expected.shape:
            raise RopeError(
                f"{where}: {name} holds {stored.size} frequencies, expected {expected.size}",
                hint="Check that the config belongs to these weights.",
            )
        tolerance = _tolerance(tensor.encoding.name, expected)
        if np.all(np.abs(stored - expected) <= tolerance):
            continue
        unscaled = rope.unscaled().inv_freq()
        if np.all(np.abs(stored - unscaled) <= _tolerance(tensor.encoding.name, unscaled)):
            continue
        raise _explain(name, tensor, stored, rope, where)


def _tolerance(encoding: str, expected: FloatArray) -> npt.NDArray[np.float64]:
    relative, absolute = _TOLERANCE[encoding]
    return expected.astype(np.float64) * relative + absolute


def _explain(
    name: str, tensor: Tensor, stored: FloatArray, rope: RopeParameters, where: str
) -> RopeError:
    relative, absolute = _TOLERANCE[tensor.encoding.name]
    # Below this an f16 holds too few bits of a frequency to tell a ratio by.
    legible = stored * relative >= absolute
    ratio = None
    if np.count_nonzero(legible) > 1:
        ratio = uniform_ratio(rope.inv_freq()[legible], stored[legible], tolerance=2 * relative)
    if ratio is None:
        return RopeError(
            f"{where}: the frequencies in {name} are not those of the config"
            f" (theta {rope.theta:g}, {rope.kind}), and no one factor explains them",
            hint="Correct rope_theta and the scaling in config.json, or remove the buffers.",
        )
    factor = _roundest(rope.factor * ratio, relative / 2)
    return RopeError(
        f"{where}: {name} holds the frequencies of factor {factor:.6g}, the config says"
        f" {rope.factor:g}",
        hint="If the weights were trained with the buffers, state it in config.json:"
        f' "rope_scaling": {{"rope_type": "linear", "factor": {factor:.6g}}}.'
        " If not, remove the buffers.",
    )


def _roundest(value: float, tolerance: float) -> float:
    """The number with the fewest decimals within ``tolerance`` of ``value``, as people write it."""
    for decimals in range(4):
        rounded = round(value, decimals)
        if abs(rounded / value - 1) <= tolerance:
            return rounded
    return value
