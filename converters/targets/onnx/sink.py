"""An ONNX data file that takes rows from a stream and stores the parts of each weight."""

from __future__ import annotations

import numpy as np

from converters.checkpoint import Checkpoint
from converters.encodings import F32, Encoding
from converters.ggml import Raw
from converters.targets.onnx.plan import COS, SIN, OnnxPlan
from converters.targets.onnx.tables import table_chunks
from converters.targets.onnx.weights import split_parts
from converters.targets.stream import Chunk, write_all


class OnnxSink:
    """An open data file of ``plan``."""

    def __init__(self, descriptor: int, plan: OnnxPlan) -> None:
        self._descriptor = descriptor
        self._plan = plan

    def encoding_of(self, name: str) -> Encoding | None:
        """What the weight ``name`` is stored in."""
        return self._plan.encodings.get(name)

    def put(self, chunk: Chunk, rows: Raw) -> None:
        """Writes the rows' parts, each at its place."""
        name = chunk.tensor.source.name
        parts = split_parts(rows, self._plan.encodings[name])
        for place, part in zip(self._plan.places[name], parts, strict=True):
            write_all(self._descriptor, part, place.offset + chunk.start * part.shape[1])

    def write_tables(self, checkpoint: Checkpoint) -> None:
        """Writes the cos and sin tables."""
        plan = self._plan
        dtype = np.dtype("f4" if plan.precision.activations is F32 else "f2")
        places = plan.places[COS][0], plan.places[SIN][0]
        for start, *tables in table_chunks(checkpoint.rope, plan.table_rows, dtype):
            for place, table in zip(places, tables, strict=True):
                raw = table.view(np.uint8).reshape(table.shape[0], -1)
                write_all(self._descriptor, raw, place.offset + start * raw.shape[1])
