"""The model that is trained: RoPE right before it is built, and a loss that makes no logits.

transformers ignores a RoPE config that is changed after the model was built, without a word; so
the interpolated folder is written first, loaded, and its frequencies are held against
``converters.rope`` after load, after training and after saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from converters.errors import ConvertError, EnvironmentNotReadyError
from converters.install import install_line
from converters.rope import RopeParameters
from converters.rope.parameters import ulp_distance
from pi_convert.finetune.recipe import TRAINED_BESIDE_ADAPTERS, Recipe

# float32: numpy's and torch's pow differ by one unit, the division by the factor adds one;
# longrope's lists (PI over llama3) round once more each way.
FREQUENCY_ULP = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Tokens whose logits exist at once; 512 x 151,936 x 4 B = 297 MiB. The loss of SmolLM2 and its
# gradient, one core of an EPYC, torch 2.13: 0.7 s for 256 tokens and 4.1 s for 2,048; with torch's
# own choice 7.6 and 7.7 s, with all logits at once 0.7 and 4.8 s.
_LOGITS_TOKENS = 512


def load_model(folder: Path, rope: RopeParameters, recipe: Recipe) -> Any:
    """The model in ``folder``, float32, that returns its loss; adapters are put in for LoRA.

    Raises ``ConvertError`` where transformers builds other frequencies than ``rope`` has.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model.config.use_cache = False
    require_frequencies(model, rope, "after loading")
    if recipe.lora_rank:
        _add_adapters(model, recipe)
    model.forward = _LossForward(model)
    return model


def require_frequencies(model: Any, rope: RopeParameters, when: str) -> None:
    """Raises ``ConvertError`` unless the model's own rotary module holds ``rope``'s frequencies."""
    rotary = model.model.rotary_emb
    _compare(rotary.inv_freq.float().cpu().numpy(), float(rotary.attention_scaling), rope, when)


def require_saved_frequencies(folder: Path, model: Any, rope: RopeParameters) -> None:
    """The same for what transformers makes of the config that was saved in ``folder``."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    rotary = type(model.model.rotary_emb)(config)
    _compare(rotary.inv_freq.numpy(), float(rotary.attention_scaling), rope, "after saving")


def _compare(found: Any, attention: float, rope: RopeParameters, when: str) -> None:
    expected = rope.inv_freq()
    same_shape = found.shape == expected.shape and attention == rope.attention_factor
    if same_shape and ulp_distance(expected, found) <= FREQUENCY_ULP:
        return
    raise ConvertError(
        f"{when} the model's frequencies are not those of {rope.kind} RoPE with factor"
        f" {rope.factor:g} and theta {rope.theta:g}",
        hint="This version of transformers reads the config otherwise; please report it.",
    )


class _LossForward:
    """Takes the place of ``model.forward``: windows in, their mean loss out.

    A method of no module, so that DDP's and FSDP's hooks around ``model(...)`` still run.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: torch.Tensor, per_token: bool = False) -> dict[str, torch.Tensor]:
        """``loss`` over all next tokens, or with ``per_token`` (windows, tokens - 1) of them.

        Positions are 0, 1, ... over the whole window and never reset at a document's start.
        """
        hidden = self._model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        states, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        weight = self._model.lm_head.weight
        if per_token:
            losses = [
                functional.cross_entropy(functional.linear(s, weight).float(), t, reduction="none")
                for s, t in zip(
                    torch.split(states, _LOGITS_TOKENS),
                    torch.split(targets, _LOGITS_TOKENS),
                    strict=True,
                )
            ]
            return {"loss": torch.cat(losses).view(input_ids.shape[0], -1)}
        return {"loss": next_token_loss(states, weight, targets)}


def next_token_loss(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of (tokens, hidden) states; logits are made of 512 tokens at a time."""
    # Without options the function falls back to making all logits.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_LOGITS_TOKENS)
    with torch.autocast(states.device.type, enabled=False), _tf32(states.device):
        return functional.linear_cross_entropy(
            states.float(), weight.float(), targets, options=options
        )


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in TF32 on a GPU, for as long as the loss takes.

    In bfloat16 the function sums its chunks' losses in bfloat16 (torch 2.13): with 32 chunks the
    mean is 0.2 nats off. Never for the whole run: transformers' rotary modules multiply positions
    with frequencies by a matrix product, and TF32 keeps 11 bits of a position.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _add_adapters(model: Any, recipe: Recipe) -> None:
    try:
        import peft
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"preset lora needs peft: {error}", hint=f"Install: {install_line('finetune')}"
        ) from error
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(ATTENTION),
    )
    torch.manual_seed(recipe.seed)  # the adapters' first weights are drawn
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if any(part in name for part in TRAINED_BESIDE_ADAPTERS):
            parameter.requires_grad_(True)


def merged_weights(state: Mapping[str, torch.Tensor], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Weights by their plain names, adapters merged as PEFT does: W + B A * alpha / rank."""
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        prefix, layer, rest = name.partition(".base_layer.")
        merged[f"{prefix}.{rest}" if layer else name] = value
        if layer and rest == "weight":
            a = state[f"{prefix}.lora_A.default.weight"]
            b = state[f"{prefix}.lora_B.default.weight"]
            merged[f"{prefix}.weight"] = value + (b @ a) * (recipe.lora_alpha / recipe.lora_rank)
    return merged
