"""What an ONNX file will hold: each weight's encoding, and where each initializer's bytes stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import Checkpoint
from converters.encodings import F16, F32, Encoding
from converters.errors import UnsupportedError
from converters.targets.onnx.weights import BLOCK, CARRIED, Q4_0, Q8_0, Part, parts_of

ALIGNMENT = 4096  # a memory page, so that a runtime can map what it reads
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COS, SIN = "cos_cache", "sin_cache"


@dataclass(frozen=True, slots=True)
class Precision:
    """One of the files of a folder, named as transformers.js names them."""

    name: str
    stem: str
    matrices: Encoding  # of a float source
    embedding: Encoding
    activations: Encoding

    @property
    def file_name(self) -> str:
        """The graph's file."""
        return f"{self.stem}.onnx"

    @property
    def data_name(self) -> str:
        """The file of its weights."""
        return f"{self.stem}.onnx_data"


PRECISIONS: Mapping[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", "model", F32, F32, F32),
        Precision("fp16", "model_fp16", F16, F16, F16),
        Precision("int8", "model_quantized", Q8_0, Q8_0, F32),
        Precision("int4", "model_q4", Q4_0, Q8_0, F32),
    )
}


@dataclass(frozen=True, slots=True)
class Place:
    """An initializer of the data file: its name, what it holds and where."""

    name: str
    part: Part
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is, of one row of the weight or one position of a table."""
        rows = self.part.shape[0] if len(self.part.shape) > 1 else 1
        return self.part.size_bytes // rows


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """One graph and its data file. ``fallbacks`` are weights whose rows fit no block."""

    precision: Precision
    encodings: Mapping[str, Encoding]  # by Hugging Face name
    places: Mapping[str, tuple[Place, ...]]  # by weight, and the two tables
    data_bytes: int
    table_rows: int
    fallbacks: tuple[str, ...]


def plan_onnx(checkpoint: Checkpoint, precision: str) -> OnnxPlan:
    """The file of ``precision`` (a key of ``PRECISIONS``) for ``checkpoint``.

    Raises ``UnsupportedError`` for what no graph here can hold.
    """
    if checkpoint.hparams.sliding_window is not None:
        raise UnsupportedError(
            f"{checkpoint.origin.label}: a sliding window of"
            f" {checkpoint.hparams.sliding_window} tokens",
            hint="The ONNX graph attends to the whole context; only full attention is supported.",
        )
    chosen = PRECISIONS[precision]
    encodings, fallbacks = {}, []
    for name, tensor in checkpoint.tensors.items():
        wanted = _wanted(name, tensor.encoding, chosen, vector=len(tensor.shape) == 1)
        if wanted in CARRIED and tensor.row_elements % BLOCK:
            fallbacks.append(name)
            wanted = chosen.activations
        encodings[name] = wanted
    rows = checkpoint.rope.context
    places, size = _place(checkpoint, encodings, rows, chosen)
    return OnnxPlan(chosen, encodings, places, size, rows, tuple(fallbacks))


def _wanted(name: str, source: Encoding, precision: Precision, *, vector: bool) -> Encoding:
    if vector:
        return precision.activations
    wanted = precision.embedding if name in (EMBEDDING, HEAD) else precision.matrices
    if wanted in CARRIED and source in CARRIED and not (name == EMBEDDING and source is not Q8_0):
        return source  # as it is: quantizing again would only lose
    return wanted


def _place(
    checkpoint: Checkpoint, encodings: Mapping[str, Encoding], rows: int, precision: Precision
) -> tuple[dict[str, tuple[Place, ...]], int]:
    stored = {name: parts_of(t.shape, encodings[name]) for name, t in checkpoint.tensors.items()}
    dtype = np.dtype("f4" if precision.activations is F32 else "f2")
    for table in (COS, SIN):
        stored[table] = (Part("", dtype, (rows, checkpoint.rope.rotary_dim // 2)),)
    places, offset = {}, 0
    for name, parts in stored.items():
        placed = []
        for part in parts:
            placed.append(Place(f"{name}{part.suffix}", part, offset))
            offset += -(-part.size_bytes // ALIGNMENT) * ALIGNMENT
        places[name] = tuple(placed)
    return places, offset
