"""What an ONNX file records of itself in ``metadata_props``."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version

from converters import nbits
from converters.checkpoint import Checkpoint
from converters.encodings import NBITS
from converters.rope.gguf import RECORD_PREFIX
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.plan import OnnxPlan

ARCHITECTURE = "architecture"
ROPE = "rope"
SOURCE_NAME, SOURCE_HASH = "source.name", "source.sha256"
PRECISION, VERSION = "precision", "version"
DATA_HASH = "data.sha256"  # of the file of weights: a graph finds its own by it
GRAPH, WEIGHTS = "graph", "weights"


def record(
    checkpoint: Checkpoint,
    plan: OnnxPlan,
    options: GraphOptions,
    *,
    source_hash: str,
    data_hash: str,
    quantizer: str,
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
        GRAPH: json.dumps(dataclasses.asdict(options)),
        ROPE: json.dumps(scaling),
        SOURCE_NAME: checkpoint.origin.label,
        SOURCE_HASH: source_hash,
        DATA_HASH: data_hash,
        "quantizer": quantizer,
        VERSION: version("pi-convert"),
    }
    if plan.precision.has_blocks:
        values[WEIGHTS] = json.dumps(dataclasses.asdict(plan.options))
    if any(encoding in NBITS for encoding in plan.encodings.values()):
        values[nbits.FINGERPRINT_KEY] = nbits.fingerprint()
    return {f"{RECORD_PREFIX}{key}": value for key, value in values.items()}
