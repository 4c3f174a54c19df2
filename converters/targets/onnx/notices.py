"""What a user should know of a file before it is written; none of it is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from converters.checkpoint import Checkpoint
from converters.encodings import F16
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.plan import OnnxPlan
from converters.targets.onnx.weights import BITS, CARRIED

_ROUNDING_LEVEL = 4  # MatMulNBits' accuracy_level that rounds activations to int8


def notices(checkpoint: Checkpoint, plan: OnnxPlan, options: GraphOptions) -> Iterator[str]:
    """Sentences about what ``plan`` keeps, quantizes again, rounds and cannot hold.

    Figures are of ONNX Runtime 1.31's CPU provider, benchmarks/onnx_blocks.py.
    """
    name = plan.precision.name
    if plan.precision.activations is F16:
        yield (
            f"{name}: a GPU computes layers in float16: an activation past 65,504 makes the logits"
            " NaN, which `pi-convert verify --device cuda` finds (a CPU computes most in float32)"
        )
    if not plan.precision.has_blocks:
        return
    if kept := _counts(checkpoint, plan, kept=True):
        yield f"{name}: {kept}: the source's own blocks, not quantized again"
    if again := _counts(checkpoint, plan, kept=False):
        yield f"{name}: {again}: quantized already in the source, and quantized again"
    stored = {encoding for encoding in plan.encodings.values() if encoding in BITS}
    if options.accuracy_level == _ROUNDING_LEVEL:
        yield (
            f"{name}: products round activations to 8 bits (accuracy level 4), an error of about"
            " 0.5 % in each; --accuracy-level 0 leaves them"
        )
    elif any(BITS[encoding] == 8 for encoding in stored):
        yield (
            f"{name}: without accuracy level 4 a product of one token with 8-bit weights takes tens"
            " of times as long"
        )


def _counts(checkpoint: Checkpoint, plan: OnnxPlan, *, kept: bool) -> str:
    """How many quantized matrices of the source are ``kept`` as they are, or put into blocks."""
    found: Counter[str] = Counter()
    for name, encoding in plan.encodings.items():
        source = checkpoint.tensors[name].encoding
        if source.is_float or encoding not in BITS:
            continue
        same = source is encoding and source in CARRIED
        if same and kept:
            found[source.name] += 1
        elif not same and not kept:
            found[f"{source.name} -> {encoding.name}"] += 1
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())
