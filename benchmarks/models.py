"""Seeded checkpoints of real shapes to export: deterministic, removed by the caller.

usage: python benchmarks/models.py SHAPE FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.sdist import mistral_common_data

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelShape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    tied: bool = False


TINYLLAMA = ModelShape("1.1B", 2048, 5632, 22, 32, 4)
GROWTH = (  # of one make, so that time can be laid against parameters
    ModelShape("0.1B", 768, 2048, 8, 12, 4),
    ModelShape("0.4B", 1024, 2816, 24, 16, 4),
    TINYLLAMA,
    ModelShape("3B", 3072, 8192, 26, 24, 8),
)
LLAMA7B = ModelShape("7B", 4096, 11008, 32, 32, 32)
SHAPES = {shape.name: shape for shape in (*GROWTH, LLAMA7B)}
LAYERS_PER_SHARD = 6


def write_seeded(folder: Path, shape: ModelShape, seed: int = 0) -> Path:
    """A sharded bf16 LLaMA folder with a real SentencePiece vocabulary of 32,000 pieces."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    head_dim = shape.hidden // shape.heads
    shards = -(-shape.layers // LAYERS_PER_SHARD) + 1
    weight_map: dict[str, str] = {}
    total = 0

    def save(index: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    ends = {
        "model.embed_tokens.weight": weight(shape.vocabulary, shape.hidden),
        "model.norm.weight": norm(),
    }
    if not shape.tied:
        ends["lm_head.weight"] = weight(shape.vocabulary, shape.hidden)
    save(0, ends)
    for shard in range(1, shards):
        tensors = {}
        first = (shard - 1) * LAYERS_PER_SHARD
        for layer in range(first, min(first + LAYERS_PER_SHARD, shape.layers)):
            prefix = f"model.layers.{layer}."
            kv = shape.kv_heads * head_dim
            tensors |= {
                f"{prefix}input_layernorm.weight": norm(),
                f"{prefix}post_attention_layernorm.weight": norm(),
                f"{prefix}self_attn.q_proj.weight": weight(shape.hidden, shape.hidden),
                f"{prefix}self_attn.k_proj.weight": weight(kv, shape.hidden),
                f"{prefix}self_attn.v_proj.weight": weight(kv, shape.hidden),
                f"{prefix}self_attn.o_proj.weight": weight(shape.hidden, shape.hidden),
                f"{prefix}mlp.gate_proj.weight": weight(shape.intermediate, shape.hidden),
                f"{prefix}mlp.up_proj.weight": weight(shape.intermediate, shape.hidden),
                f"{prefix}mlp.down_proj.weight": weight(shape.hidden, shape.intermediate),
            }
        save(shard, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(folder, shape, head_dim)
    _write_tokenizer(folder)
    return folder


def _write_config(folder: Path, shape: ModelShape, head_dim: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(
        (mistral_common_data() / "tokenizer.model.v1").read_bytes()
    )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    name, target = sys.argv[1:]
    write_seeded(Path(target), SHAPES[name])
