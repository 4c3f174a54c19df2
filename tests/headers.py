"""Small GGUF files of several architectures, written by gguf-py, right unless a test says else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Type

from converters.architectures import HParams, architectures

VOCABULARY = 40
HPARAMS = HParams(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
)
SIZES: dict[str, Any] = {
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
PLAIN: dict[str, Any] = {
    **SIZES,
    "context_length": 128,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
}
LINEAR: dict[str, Any] = {
    **PLAIN,
    "context_length": 1024,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 128,
}
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "Ċ", "ab", *(chr(97 + i) for i in range(26))]
    + [f"<x{i}>" for i in range(10)],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 38],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}
SPM: dict[str, Any] = {
    **TOKENIZER,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": None,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.scores": [-float(i) for i in range(VOCABULARY)],
}


def tensors_of(architecture: str) -> dict[str, np.ndarray]:
    """All tensors of a described architecture; a few names for any other."""
    random = np.random.default_rng(7)
    description = next((a for a in architectures() if a.gguf_name == architecture), None)
    if description is None:
        shapes = {"token_embd.weight": (VOCABULARY, 64)}
        shapes |= {f"blk.{i}.attn_q.weight": (64, 64) for i in range(2)}
    else:
        groups = {"untied", "bias"} if architecture == "qwen2" else {"untied"}
        shapes = {n: s for _, n, s, _ in description.expected_tensors(HPARAMS, groups)}
    return {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_header(
    path: Path,
    architecture: str = "llama",
    keys: Mapping[str, Any] = PLAIN,
    *,
    tokenizer: Mapping[str, Any] = TOKENIZER,
    general: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, Type] | None = None,
) -> Path:
    """A GGUF. ``keys`` are without prefix, ``tensors`` replace, add or (None) remove, ``types``
    store a key as another type; a value of None leaves its key out."""
    writer = gguf.GGUFWriter(path, architecture)
    scoped = {f"{architecture}.{key}": value for key, value in keys.items()}
    everything = {"general.file_type": 0, **(general or {}), **scoped, **tokenizer}
    for key, value in everything.items():
        if value is not None:
            writer.add_key_value(key, value, (types or {}).get(key, _type(value)), *_of(value))
    for name, data in {**tensors_of(architecture), **(tensors or {})}.items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value: Any) -> Type:
    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    return kinds.get(type(value), Type.ARRAY)


def _of(value: Any) -> tuple[Type, ...]:
    if not isinstance(value, list):
        return ()
    return ({str: Type.STRING, int: Type.INT32, float: Type.FLOAT32}[type(value[0])],)
