"""An ONNX data file that takes rows from a stream and stores the parts of each weight."""

from __future__ import annotations

import numpy as np

from converters.checkpoint import Checkpoint
from converters.encodings import F32, NBITS, Encoding
from converters.errors import TensorError
from converters.ggml import Floats, Raw
from converters.nbits import has_finite_scales, quantize_nbits
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
        """What the stream gives the rows of ``name`` in; ONNX Runtime's blocks are made here."""
        stored = self._plan.encodings.get(name)
        return F32 if stored in NBITS else stored

    def put(self, chunk: Chunk, rows: Raw) -> None:
        """Writes the rows' parts, each at its place."""
        name = chunk.tensor.source.name
        encoding = self._plan.encodings[name]
        if encoding in NBITS:
            rows = _quantized(name, rows.view(np.float32), encoding)
        parts = split_parts(rows, encoding, self._plan.precision.floats)
        for place, part in zip(self._plan.places[name], parts, strict=True):
            write_all(self._descriptor, part, place.offset + chunk.start * part.shape[1])

    def write_tables(self, checkpoint: Checkpoint) -> None:
        """Writes the cos and sin tables."""
        plan = self._plan
        dtype = plan.precision.floats
        places = plan.places[COS][0], plan.places[SIN][0]
        for start, *tables in table_chunks(checkpoint.rope, plan.table_rows, dtype):
            for place, table in zip(places, tables, strict=True):
                raw = table.view(np.uint8).reshape(table.shape[0], -1)
                write_all(self._descriptor, raw, place.offset + start * raw.shape[1])


def _quantized(name: str, values: Floats, encoding: Encoding) -> Raw:
    raw = quantize_nbits(values, encoding)
    if not has_finite_scales(raw, encoding):
        raise TensorError(
            f"{name} holds {float(np.abs(values).max()):g}, which {encoding.name} cannot hold",
            hint="bf16 and f32 hold the largest values.",
        )
    return raw
