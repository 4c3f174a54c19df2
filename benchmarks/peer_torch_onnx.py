"""torch.onnx.export(dynamo=True) of a folder's model with its cache.

usage: python peer_torch_onnx.py MODEL OUT    # needs torch, transformers and onnxscript
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class WithFlatCache(torch.nn.Module):
    """Past keys and values as plain tensors, as ONNX has them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, past: list[Any]) -> tuple[Any, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        present = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return (out.logits, *present)


def main(model: str, out: str) -> None:
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = source.config
    shape = (1, config.num_key_value_heads, 8, config.hidden_size // config.num_attention_heads)
    past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
    ids = torch.zeros((1, 4), dtype=torch.int64)
    mask = torch.ones((1, 12), dtype=torch.int64)
    new, before, total = (torch.export.Dim(n) for n in ("new", "before", "total"))
    shapes = {
        "input_ids": {1: new},
        "attention_mask": {1: total},
        "past": [{2: before}] * len(past),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.onnx.export(
            WithFlatCache(source), (ids, mask, past), dynamo=True, dynamic_shapes=shapes,
            external_data=True,
        )  # fmt: skip
    program.save(str(Path(out) / "model.onnx"), external_data=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
