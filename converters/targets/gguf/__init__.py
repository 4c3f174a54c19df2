"""The GGUF target: one pass from source tensors to the quantized file.

``plan_gguf`` says what will be written and refuses what would be wrong; ``write_gguf`` does it.
``types`` asks llama.cpp for the type of each tensor, ``ggml`` quantizes, ``metadata`` names the
keys, ``sink`` takes the rows, ``readback`` checks the result.
"""

from converters.targets.gguf.plan import (
    GgufPlan,
    QuantizationOption,
    plan_gguf,
    quantization_types,
)
from converters.targets.gguf.write import GgufArtifact, GgufTarget, write_gguf

__all__ = [
    "GgufArtifact",
    "GgufPlan",
    "GgufTarget",
    "QuantizationOption",
    "plan_gguf",
    "quantization_types",
    "write_gguf",
]
