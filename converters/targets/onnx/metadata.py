"""What an ONNX file records of itself in ``metadata_props``."""

from __future__ import annotations

import json
from importlib.metadata import version

from converters.checkpoint import Checkpoint
from converters.rope.gguf import RECORD_PREFIX
from converters.targets.onnx.plan import OnnxPlan

ARCHITECTURE = "architecture"
ROPE = "rope"
SOURCE_NAME, SOURCE_HASH = "source.name", "source.sha256"
PRECISION, VERSION = "precision", "version"


def record(
    checkpoint: Checkpoint, plan: OnnxPlan, source_hash: str, quantizer: str
) -> dict[str, str]:
    """Key to value, as GGUF's keys of the same names; no local path."""
    rope = checkpoint.rope
    scaling = {
        "kind": rope.kind,
        "theta": rope.theta,
        "factor": rope.factor,
        "original_context": rope.original_context,
        "context": rope.context,
    }
    values = {
        ARCHITECTURE: checkpoint.architecture.name,
        PRECISION: plan.precision.name,
        ROPE: json.dumps(scaling),
        SOURCE_NAME: checkpoint.origin.label,
        SOURCE_HASH: source_hash,
        "quantizer": quantizer,
        VERSION: version("pi-convert"),
    }
    return {f"{RECORD_PREFIX}{key}": value for key, value in values.items()}
