"""What may be chosen about a graph and about how its weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Storage = Literal["float", "int8", "int4"]  # float: the graph's own


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """``accuracy_level`` is MatMulNBits' (4: activations are rounded to int8).

    ``portable`` uses standard operators only (opset 23): floats, and a mask of new by all tokens.
    ``last_logits`` gives the logits of each row's last real token alone.
    """

    accuracy_level: int = 4
    last_logits: bool = False
    portable: bool = False


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """How the weights of a file of int8 or int4 are stored; other files have floats throughout.

    Blocks have ``block_size`` elements, and a zero point where ``asymmetric``. ``embedding`` and
    ``head`` are stored otherwise than the rest; None: as the precision has it. A tied head is the
    embedding. Blocks that a source has already are kept unless ``requantize``.
    """

    block_size: Literal[32, 128] = 32
    asymmetric: bool = False
    embedding: Storage | None = None
    head: Storage | None = None
    requantize: bool = False
