"""What rounding activations alone costs a model: the noise floor of a runtime, measured in torch.

ggml multiplies a weight with activations rounded to a type that goes with the weight's
(``vec_dot_type`` in ggml-cpu, 0.25): f16 and bf16 to the same, blocks of 32 to q8_0, blocks of 256
to q8_K. Its flash attention takes queries, keys and values in f16 and sums in f16. Doing the same
in torch, and nothing else, says how far a right file may be from torch; that differs a
thousandfold between models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converters.encodings import NBITS, Encoding

if TYPE_CHECKING:
    import torch

_ATTENDING = ("q_proj", "k_proj", "v_proj")
_ATTENDED = "o_proj"


@contextlib.contextmanager
def rounded_activations(model: Any, encodings: Mapping[str, Encoding]) -> Iterator[None]:
    """Inside, every linear layer's input is rounded as ggml rounds it for that weight's encoding.

    ``encodings`` is by weight name; a layer that is not among them shares the embedding's weight.
    """
    import torch

    embedding = encodings["model.embed_tokens.weight"]
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        rounding = _rounding(encodings.get(f"{name}.weight", embedding))
        leaf = name.rpartition(".")[2]
        if leaf == _ATTENDED and rounding is None:
            rounding = _half
        if rounding is not None:
            hooks.append(module.register_forward_pre_hook(_on_input(rounding)))
        if leaf in _ATTENDING:
            hooks.append(module.register_forward_hook(_on_output(_half)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Rounding = Callable[["torch.Tensor"], "torch.Tensor"]


def _rounding(encoding: Encoding) -> Rounding | None:
    if encoding.name in ("f32", "f64"):
        return None
    if encoding.name == "f16":
        return _half
    if encoding.name == "bf16":
        return _bfloat16
    # ONNX Runtime rounds them in blocks of the weight's size where accuracy_level is 4.
    own = encoding in NBITS or encoding.block_elements == 256
    block = encoding.block_elements if own else 32
    return lambda values: _int8(values, block)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def _bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def _int8(values: torch.Tensor, block: int) -> torch.Tensor:
    blocks = values.reshape(*values.shape[:-1], -1, block)
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(values.shape)


def _on_input(rounding: Rounding) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return hook


def _on_output(rounding: Rounding) -> Callable[..., torch.Tensor]:
    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return rounding(output)

    return hook
