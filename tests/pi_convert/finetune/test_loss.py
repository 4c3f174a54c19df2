"""The loss: right, and without the logits of all tokens; in float32 on whatever device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from converters.rope import RopeParameters
from pi_convert.finetune.model import load_model, next_token_loss
from pi_convert.finetune.recipe import Recipe


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that was made under it."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple) else (made,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return made


def test_the_loss_makes_no_tensor_of_tokens_by_vocabulary() -> None:
    tokens, vocabulary = 1024, 4096
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, 64, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 64, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    with Sizes() as sizes:
        loss = next_token_loss(states, weight, targets)
        loss.backward()
    assert sizes.largest < tokens * vocabulary
    expected = torch.nn.functional.cross_entropy(states @ weight.T, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with Sizes() as sizes:  # the control: without options all logits are made
        torch.nn.functional.linear_cross_entropy(states, weight, targets)
    assert sizes.largest >= tokens * vocabulary


def test_nor_do_the_whole_models_passes(tmp_path: Path) -> None:
    tokens, vocabulary = 1024, 8192
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokens,
    )  # fmt: skip
    plain = LlamaForCausalLM(config)
    plain.save_pretrained(tmp_path)
    rope = RopeParameters(10000.0, 16, original_context=tokens, context=tokens)
    model = load_model(tmp_path, rope, Recipe("quick", 1, tokens, 1, 1, 1e-5))
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with Sizes() as trained:
        loss = model(input_ids=ids)["loss"]
        loss.backward()
    with Sizes() as held_out, torch.no_grad():
        losses = model(input_ids=ids, per_token=True)["loss"]
    assert max(trained.largest, held_out.largest) < (tokens - 1) * vocabulary
    with Sizes() as control, torch.no_grad():
        expected = plain(input_ids=ids, labels=ids).loss
    assert control.largest >= (tokens - 1) * vocabulary
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


def many_states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(states, weight, targets) of 32 chunks of the loss."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(32 * 512, 32, generator=generator)
    weight = torch.randn(1024, 32, generator=generator)
    return states, weight, torch.randint(1024, (len(states),), generator=generator)


def test_the_loss_in_bfloat16_training_is_of_float32() -> None:
    """The control: in bfloat16 torch sums the chunks' losses in bfloat16."""
    states, weight, targets = many_states()
    expected = torch.nn.functional.cross_entropy(states @ weight.T, targets).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = next_token_loss(states, weight, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    rounded = torch.nn.functional.linear_cross_entropy(
        states.bfloat16(),
        weight.bfloat16(),
        targets,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512),
    )
    assert rounded.item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
def test_the_loss_on_a_gpu_is_that_of_the_cpu_and_leaves_float32_as_it_was() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    states, weight, targets = many_states()
    expected = torch.nn.functional.cross_entropy(states @ weight.T, targets).item()
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cuda", torch.bfloat16):
        found = next_token_loss(states.cuda(), weight.cuda(), targets.cuda())
    assert found.item() == pytest.approx(expected, rel=1e-3)
    assert torch.backends.cuda.matmul.fp32_precision == before
