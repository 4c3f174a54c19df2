"""What an ONNX file will hold: each weight's encoding, and where each initializer's bytes stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import Checkpoint
from converters.encodings import F16, F32, Encoding, NBits, nbits_encoding
from converters.errors import UnsupportedError
from converters.targets.onnx.options import Storage, WeightOptions
from converters.targets.onnx.weights import (
    BITS,
    CARRIED,
    Q4_0,
    Q8_0,
    FloatType,
    Part,
    parts_of,
)
from converters.tensor import Tensor

ALIGNMENT = 4096  # a memory page, so that a runtime can map what it reads
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NORM = "norm.weight"  # of every norm: float32 in any graph
COS, SIN = "cos_cache", "sin_cache"
BLOCK = 32  # the smallest: what rows fall back to


@dataclass(frozen=True, slots=True)
class Precision:
    """One of the files of a folder, named as transformers.js names them where it does."""

    name: str
    stem: str
    weights: Storage
    ends: Storage  # the embedding and the head
    activations: Encoding  # F32 or F16: of hidden states, the cache, scales and floats

    @property
    def file_name(self) -> str:
        """The graph's file."""
        return f"{self.stem}.onnx"

    @property
    def data_name(self) -> str:
        """The file of its weights."""
        return f"{self.stem}.onnx_data"

    @property
    def has_blocks(self) -> bool:
        """Whether weights are quantized."""
        return self.weights != "float"

    @property
    def floats(self) -> FloatType:
        """The activations' type in numpy."""
        return np.dtype("f4" if self.activations is F32 else "f2")


PRECISIONS: Mapping[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", "model", "float", "float", F32),
        Precision("fp16", "model_fp16", "float", "float", F16),
        Precision("int8", "model_quantized", "int8", "int8", F32),
        Precision("int4", "model_q4", "int4", "int8", F32),
        Precision("int8f16", "model_q8f16", "int8", "int8", F16),
        Precision("int4f16", "model_q4f16", "int4", "int8", F16),
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
    """One graph and its data file. ``fallbacks``: "name: wanted -> what its rows fit"."""

    precision: Precision
    options: WeightOptions
    encodings: Mapping[str, Encoding]  # by Hugging Face name
    places: Mapping[str, tuple[Place, ...]]  # by weight, and the two tables
    data_bytes: int
    table_rows: int
    fallbacks: tuple[str, ...]


def plan_onnx(
    checkpoint: Checkpoint, precision: str, options: WeightOptions | None = None
) -> OnnxPlan:
    """The file of ``precision`` (a key of ``PRECISIONS``) for ``checkpoint``.

    Raises ``UnsupportedError`` for what no graph here can hold, for quantized weights that would be
    quantized again to fewer bits without ``requantize``, and for one tensor that is asked for in
    two forms.
    """
    if checkpoint.hparams.sliding_window is not None:
        raise UnsupportedError(
            f"{checkpoint.origin.label}: a sliding window of"
            f" {checkpoint.hparams.sliding_window} tokens",
            hint="The ONNX graph attends to the whole context; only full attention is supported.",
        )
    chosen, options = PRECISIONS[precision], options or WeightOptions()
    storage = _Storing(checkpoint, chosen, options)
    encodings, fallbacks = {}, []
    for name, tensor in checkpoint.tensors.items():
        wanted = storage.wanted(tensor)
        encodings[name] = storage.fitting(tensor, wanted)
        if encodings[name] is not wanted:
            fallbacks.append(f"{name}: {wanted.name} -> {encodings[name].name}")
    storage.refuse_losses(encodings)
    rows = checkpoint.rope.context
    places, size = _place(checkpoint, encodings, rows, chosen)
    return OnnxPlan(chosen, options, encodings, places, size, rows, tuple(fallbacks))


@dataclass(frozen=True, slots=True)
class _Storing:
    """What each tensor of a checkpoint is stored in."""

    checkpoint: Checkpoint
    precision: Precision
    options: WeightOptions

    def wanted(self, tensor: Tensor) -> Encoding:
        """Whatever its rows fit."""
        if tensor.name.endswith(_NORM):
            return F32
        storage = self._storage(tensor.name)
        if len(tensor.shape) == 1 or storage == "float":
            return self.precision.activations
        if tensor.encoding in CARRIED and not self.options.requantize:
            return tensor.encoding  # as it is: quantizing again would only lose
        return self._blocks(4 if storage == "int4" else 8, self.options.block_size)

    def fitting(self, tensor: Tensor, wanted: Encoding) -> Encoding:
        """``wanted``, or where no row divides into its blocks, blocks of 32, or floats."""
        if tensor.row_elements % wanted.block_elements == 0:
            return wanted
        if tensor.row_elements % BLOCK == 0:
            return self._blocks(BITS[wanted], BLOCK)
        return self.precision.activations

    def refuse_losses(self, encodings: Mapping[str, Encoding]) -> None:
        """Raises ``UnsupportedError`` where quantized weights would be so again, to 4 bits."""
        lost = sorted(
            {
                tensor.encoding.name
                for name, tensor in self.checkpoint.tensors.items()
                if encodings[name] is not tensor.encoding
                and not tensor.encoding.is_float
                and BITS.get(encodings[name]) == 4
            }
        )
        if lost and not self.options.requantize:
            raise UnsupportedError(
                f"{self.checkpoint.origin.label} is quantized already ({', '.join(lost)}), in"
                " blocks that ONNX Runtime has not",
                hint="Give --precision int8, which adds little to their error, or"
                " --allow-requantize to lose precision twice.",
            )

    def _storage(self, name: str) -> Storage:
        precision, options = self.precision, self.options
        if not precision.has_blocks or name not in (EMBEDDING, HEAD):
            return precision.weights
        asked = {EMBEDDING: options.embedding, HEAD: options.head}
        if self.checkpoint.hparams.tied_embeddings:
            both = {storage for storage in asked.values() if storage is not None}
            if len(both) > 1:
                raise UnsupportedError(
                    f"{self.checkpoint.origin.label}: the head is the embedding, and cannot be"
                    f" stored as {options.head} beside {options.embedding}",
                    hint="Give --embedding or --head alone: it is for both.",
                )
            return both.pop() if both else precision.ends
        return asked[name] or precision.ends

    def _blocks(self, bits: int, block_size: int) -> Encoding:
        kind = NBits(bits, self.options.asymmetric, self.precision.floats)
        symmetric = Q4_0 if bits == 4 else Q8_0  # of ggml, where blocks are of 32
        return nbits_encoding(block_size, kind) or symmetric


def _place(
    checkpoint: Checkpoint, encodings: Mapping[str, Encoding], rows: int, precision: Precision
) -> tuple[dict[str, tuple[Place, ...]], int]:
    dtype = precision.floats
    stored = {
        name: parts_of(tensor.shape, encodings[name], dtype)
        for name, tensor in checkpoint.tensors.items()
    }
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
