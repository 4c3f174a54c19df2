"""A tiny model exported to ONNX, and the logits that transformers gives for the same source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from converters.checkpoint import Checkpoint
from converters.sources import open_checkpoint
from converters.targets.onnx import PRECISIONS, GraphOptions, plan_onnx, write_onnx
from tests.tiny import Shape, write_tiny

Array = npt.NDArray[Any]

KL_LIMIT = 1e-6  # mean, float32 on CPU; measured 3e-12 to 5e-10 on these models
KL_LIMIT_FP16 = 1e-4  # mean, fp16 activations on CPU; measured up to 3e-6
KL_WRONG = 1e-2  # a wrong RoPE past L gives 0.1 to 10
CONTEXT = 64  # L
SHAPE = Shape(96, 160, 2, heads=8, kv_heads=2, head_dim=24, context=CONTEXT)  # rotated apart
FUSED = Shape(96, 160, 2, heads=6, kv_heads=2, head_dim=32, context=CONTEXT)  # rotated inside
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 2,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@dataclass(frozen=True)
class Kind:
    """A kind of RoPE: what config.json says, and the factor of PI on top."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("default"),
    Kind("pi", scale=4.0),
    Kind("pi-odd", scale=2.2),
    Kind("linear", {"rope_scaling": LINEAR, "max_position_embeddings": 2 * CONTEXT}),
    Kind("pi-over-linear", {"rope_scaling": LINEAR}, scale=2.0),
    Kind("llama3", {"rope_scaling": LLAMA3, "max_position_embeddings": 2 * CONTEXT}),
    Kind("pi-over-llama3", {"rope_scaling": LLAMA3}, scale=4.0),
)
PI = KINDS[1]


def tiny(folder: Path, kind: Kind = PI, **options: Any) -> Checkpoint:
    """A checkpoint of ``write_tiny`` with the kind's RoPE."""
    options = {"shape": SHAPE, "rope": {"rope_theta": 1000.0, **kind.config}, **options}
    return open_checkpoint(str(write_tiny(folder, **options))).interpolate(kind.scale)


def export(checkpoint: Checkpoint, out: Path, precision: str = "fp32", **options: Any) -> Path:
    """The graph's file in a new folder ``out``."""
    plan = plan_onnx(checkpoint, precision)
    write_onnx(checkpoint, [plan], out, options=GraphOptions(**options), threads=2)
    return out / "onnx" / PRECISIONS[precision].file_name


def reference(folder: Path, scale: float = 1.0) -> Any:
    """transformers' model of the source ``folder``; PI divides the frequencies it made itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.torch_dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / scale
    return model.eval()


def expected(model: Any, tokens: Array) -> Array:
    """transformers' logits of one row of tokens, (tokens, vocabulary)."""
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    return logits


def kl(right: Array, found: Array) -> float:
    """The mean over positions of KL(right || found), in nats; NaN counts as infinite."""
    p = torch.log_softmax(torch.from_numpy(right).double(), -1)
    q = torch.log_softmax(torch.from_numpy(np.asarray(found)).double(), -1)
    mean = (p.exp() * (p - q)).sum(-1).mean().item()
    return float("inf") if np.isnan(mean) else mean


def some_tokens(count: int, seed: int = 1) -> Array:
    """Ids below the tiny models' 512."""
    return np.random.default_rng(seed).integers(0, 512, count)


class Decoder:
    """A session and the cache of the rows it was fed."""

    def __init__(self, path: Path) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = 1  # more would spin while torch computes the other side
        self._session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        self._past: list[Array] = []

    def feed(self, ids: Array, mask: Array | None = None) -> Array:
        """Logits of (batch, new) ``ids`` after those fed before; no mask: nothing is padding."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        caches = [value for name, value in inputs.items() if name.startswith("past_")]
        if not self._past:
            kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
            self._past = [
                np.zeros((len(ids), c.shape[1], 0, c.shape[3]), kinds[c.type]) for c in caches
            ]
        total = self._past[0].shape[2] + ids.shape[1]
        mask = np.ones((len(ids), total), np.int64) if mask is None else mask
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        feeds |= {cache.name: past for cache, past in zip(caches, self._past, strict=True)}
        logits, *self._past = self._session.run(None, feeds)
        result: Array = logits
        return result

    def restart(self) -> Decoder:
        """The same session with nothing fed."""
        self._past = []
        return self


def in_chunks(decoder: Decoder, tokens: Array, sizes: Sequence[int]) -> Array:
    """Logits of one row fed in chunks of ``sizes``; the last size is repeated to the end."""
    found = []
    for part in _split(tokens, sizes):
        found.append(decoder.feed(part[None])[0])
    return np.concatenate(found)


def _split(tokens: Array, sizes: Sequence[int]) -> Iterator[Array]:
    start, left = 0, list(sizes)
    while start < len(tokens):
        size = left.pop(0) if len(left) > 1 else left[0]
        yield tokens[start : start + size]
        start += size


@dataclass(frozen=True)
class Batch:
    """Rows of different lengths side by side, padded on one side with other ids than 0."""

    ids: Array
    mask: Array
    columns: tuple[slice, ...]  # where each row's tokens stand


def padded(rows: Sequence[Array], side: str) -> Batch:
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 7), np.zeros((len(rows), width), np.int64)
    columns = []
    for row, tokens in enumerate(rows):
        start = width - len(tokens) if side == "left" else 0
        columns.append(slice(start, start + len(tokens)))
        ids[row, columns[-1]], mask[row, columns[-1]] = tokens, 1
    return Batch(ids, mask, tuple(columns))


def with_rope(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """The same model under another RoPE, as a faulty exporter would write it."""
    return dataclasses.replace(checkpoint, rope=dataclasses.replace(checkpoint.rope, **changes))
