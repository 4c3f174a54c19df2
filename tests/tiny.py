"""Tiny seeded checkpoints of real architectures, as Hugging Face folders.

Head counts, head_dim and widths are distinct, so that swapped axes show; query and key weights are
strong, since with default initialisation attention is flat and RoPE errors hide.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from converters.architectures import HParams, architectures
from converters.architectures.hparams import write_config_hparams
from converters.checkpoint import Checkpoint

VOCABULARY = 512
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QK_GAIN = 3.0  # standard deviation of q and k entries after projection of a normalised input


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model; L is ``context``."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 128


ODD = Shape(hidden=144, intermediate=160, layers=2, heads=6, kv_heads=2, head_dim=24)
ODD4 = Shape(hidden=192, intermediate=160, layers=2, heads=8, kv_heads=2, head_dim=24)
# 8 heads of 24 are more than the hidden size
APART = Shape(hidden=96, intermediate=160, layers=2, heads=8, kv_heads=2, head_dim=24)
WIDE = Shape(hidden=512, intermediate=256, layers=16, heads=8, kv_heads=2, head_dim=64)
WIDE3 = Shape(hidden=768, intermediate=256, layers=16, heads=6, kv_heads=2, head_dim=128)


def write_tiny(
    folder: Path,
    *,
    architecture: str = "llama",
    shape: Shape = ODD,
    rope: dict[str, Any] | None = None,
    tied: bool = False,
    dtype: str = "f32",
    shards: int = 1,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    pre: str = "smollm",
) -> Path:
    """A checkpoint folder. ``rope`` and ``config`` are merged into config.json (None removes)."""
    folder.mkdir(parents=True, exist_ok=True)
    hparams = tiny_hparams(shape, tied=tied)
    description = next(a for a in architectures() if a.name == architecture)
    keys: dict[str, Any] = {
        "architectures": [description.huggingface[0].class_name],
        "model_type": description.huggingface[0].model_type,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype],
        **write_config_hparams(hparams),
        "max_position_embeddings": shape.context,
        "rope_theta": 10000.0,
        **(rope or {}),
        **(config or {}),
    }
    keys = {key: value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys, indent=2))
    groups = {group for flag, group in description.flags.items() if keys.get(flag)}
    _write_weights(folder, tiny_weights(architecture, hparams, groups, dtype, seed), shards)
    for name, text in tiny_tokenizer(pre).items():
        (folder / name).write_text(text)
    return folder


def tiny_hparams(shape: Shape, *, tied: bool = False) -> HParams:
    return HParams(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        tied_embeddings=tied,
    )


def tiny_weights(
    architecture: str, hparams: HParams, groups: set[str], dtype: str, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    description = next(a for a in architectures() if a.name == architecture)
    weights = {}
    for name, _, shape, spec in description.expected_tensors(hparams, groups):
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values = 0.1 * values
        elif name in {"model.embed_tokens.weight", "lm_head.weight"}:
            values = values * (2.0 / shape[-1] ** 0.5)
        else:
            gain = QK_GAIN**0.5 if spec.rope else 1.0
            values = values * (gain / shape[-1] ** 0.5)
        weights[name] = values.to(DTYPES[dtype]).contiguous()
    return weights


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@functools.cache
def tiny_tokenizer(pre: str = "smollm") -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE of 512 tokens, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = sorted(pydoc_data.topics.topics.items())
    tokenizer.train_from_iterator([text for _, text in topics[:40]], trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[1],
        "eos_token": specials[2],
        "unk_token": specials[0],
        "add_bos_token": False,
        "model_max_length": 10**30,
        "chat_template": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}",
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def write_tiny_onnx(checkpoint: Checkpoint, folder: Path, precision: str = "fp32") -> Path:
    """The graph of an ONNX folder of ``checkpoint``."""
    from converters.targets.onnx import plan_onnx, write_onnx

    write_onnx(checkpoint, [plan_onnx(checkpoint, precision)], folder)
    (graph,) = folder.glob("**/*.onnx")
    return graph


def with_context(shape: Shape, context: int) -> Shape:
    return dataclasses.replace(shape, context=context)
