"""What may be chosen about a graph and about how its weights are stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """``accuracy_level`` is MatMulNBits' (4: activations are rounded to int8).

    ``portable`` uses standard operators only (opset 23): floats, and a mask of new by all tokens.
    ``last_logits`` gives the logits of each row's last real token alone.
    """

    accuracy_level: int = 4
    last_logits: bool = False
    portable: bool = False
