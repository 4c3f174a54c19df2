"""Tiny GGUF files written by gguf-py from a tiny folder; rows permuted by arithmetic of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from converters.architectures import architectures


def write_tiny_gguf(
    path: Path,
    folder: Path,
    *,
    keys: dict[str, Any] | None = None,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    leave_out: tuple[str, ...] = (),
    permute: bool = True,
) -> Path:
    """``folder`` (one safetensors file, made by ``write_tiny``) as a GGUF.

    ``keys`` replace or add keys, written as gguf-py types them; None removes one. Matrices are
    stored as ``quantization``, vectors as f32.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = next(
        a for a in architectures() if a.huggingface[0].model_type == config["model_type"]
    )
    writer = gguf.GGUFWriter(path, architecture.gguf_name)
    for key, value in (_keys(config, architecture.gguf_name, folder) | (keys or {})).items():
        _add(writer, key, value)
    heads = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"]}
    names = {
        spec.name.format(i=layer): (spec.gguf.format(i=layer), spec.rope)
        for spec in architecture.tensors
        for layer in range(config["num_hidden_layers"])
    }
    for name, tensor in load_file(folder / "model.safetensors").items():
        gguf_name, rope = names[name]
        if gguf_name in leave_out:
            continue
        values = tensor.float().numpy()
        if rope and permute and architecture.rope_pairing == "interleaved":
            # Halves (first, second) to neighbours, head by head, as llama.cpp wants them.
            halves = values.reshape(heads[rope], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(
                gguf_name, gguf.quantize(values, quantization), raw_dtype=quantization
            )
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(config: dict[str, Any], prefix: str, folder: Path) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    specials = {token["id"] for token in tokenizer["added_tokens"]}
    return {
        f"{prefix}.context_length": config["max_position_embeddings"],
        f"{prefix}.embedding_length": config["hidden_size"],
        f"{prefix}.block_count": config["num_hidden_layers"],
        f"{prefix}.feed_forward_length": config["intermediate_size"],
        f"{prefix}.attention.head_count": config["num_attention_heads"],
        f"{prefix}.attention.head_count_kv": config["num_key_value_heads"],
        f"{prefix}.attention.key_length": config["head_dim"],
        f"{prefix}.attention.value_length": config["head_dim"],
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{prefix}.rope.freq_base": float(config["rope_theta"]),
        f"{prefix}.rope.dimension_count": config["head_dim"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [text for text, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if i in specials else 1 for _, i in vocabulary],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
             str: writer.add_string, list: writer.add_array}  # fmt: skip
    kinds[type(value)](key, value)
