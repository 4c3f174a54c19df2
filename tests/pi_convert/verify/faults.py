"""Faults to inject into a right export, each with parameters drawn from a seed.

A fault edits a file through gguf-py and says what it did. ``link`` is the link that has to fail,
``cause`` a regular expression that its cause has to match.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np

from tests.pi_convert.verify.gguf_tools import EditableGguf, StoredTensor

CONTEXT = "context_length"
FACTOR = "rope.scaling.factor"
TYPE = "rope.scaling.type"
THETA = "rope.freq_base"

Inject = Callable[[EditableGguf, random.Random], str]


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Inject
    link: str
    cause: str
    architectures: tuple[str, ...] = ("llama", "qwen2")
    ftypes: tuple[str, ...] = ("f16", "q4_k_m")
    head: str | None = None  # the model has to be "tied" or "untied"


def _factor(change: Callable[[float, random.Random], float], *, consistent: bool) -> Inject:
    def inject(file: EditableGguf, draw: random.Random) -> str:
        factor = float(np.float32(file.key(FACTOR)))
        wrong = change(factor, draw)
        file.set(FACTOR, wrong)
        if consistent:
            original = file.key("rope.scaling.original_context_length")
            file.set(CONTEXT, int(original * wrong))
            name = f"tiny-PI{wrong:g}"
            file.set_key("general.name", name)
        return f"factor {wrong:.6g} for {factor:g}"

    return inject


def _dropped(file: EditableGguf, draw: random.Random) -> str:
    if draw.random() < 0.5:
        file.remove(FACTOR)
        file.remove(TYPE)
        return "type and factor removed"
    file.set(FACTOR, 1.0)
    return "factor 1"


def _dropped_consistently(file: EditableGguf, draw: random.Random) -> str:
    file.set(CONTEXT, file.key("rope.scaling.original_context_length"))
    file.remove(FACTOR)
    file.set(TYPE, "none")
    return "an export without scaling, in all its keys"


def _type(kind: str) -> Inject:
    def inject(file: EditableGguf, draw: random.Random) -> str:
        file.set(TYPE, kind)
        return f"type {kind}, factor left"

    return inject


def _attention(file: EditableGguf, draw: random.Random) -> str:
    value = draw.uniform(0.7, 0.95)
    file.set("rope.scaling.attn_factor", value)
    return f"attn_factor {value:.3g}"


def _stray_factors(file: EditableGguf, draw: random.Random) -> str:
    count = file.key("rope.dimension_count") // 2
    values = np.array([draw.uniform(1, 4) for _ in range(count)], dtype=np.float32)
    raw = values.view(np.uint8).reshape(1, -1)
    stray = StoredTensor((count,), gguf.GGMLQuantizationType.F32, raw)
    file.tensors = {"rope_freqs.weight": stray, **file.tensors}
    return f"rope_freqs of {values.min():.3g} to {values.max():.3g}"


def _theta(file: EditableGguf, draw: random.Random) -> str:
    value = file.key(THETA) * draw.choice([0.1, 0.5, 2.0, 10.0])
    file.set(THETA, value)
    return f"theta {value:g}"


def _context(file: EditableGguf, draw: random.Random) -> str:
    right = file.key(CONTEXT)
    wrong = draw.choice([file.key("rope.scaling.original_context_length"), right * 2, right - 1])
    file.set(CONTEXT, wrong)
    return f"context_length {wrong} for {right}"


def _unknown_type(file: EditableGguf, draw: random.Random) -> str:
    kind = draw.choice(["ntk", "dynamic", "linaer"])
    file.set(TYPE, kind)
    return f"type {kind}"


def _reorder(tensor: StoredTensor, order: np.ndarray) -> StoredTensor:
    """Whole rows moved inside a matrix, elements inside a vector."""
    if len(tensor.shape) == 1:
        elements = tensor.raw.reshape(len(order), -1)
        return dataclasses.replace(tensor, raw=elements[order].reshape(tensor.raw.shape))
    return dataclasses.replace(tensor, raw=np.ascontiguousarray(tensor.raw[order]))


def _unpermuted(file: EditableGguf, draw: random.Random) -> str:
    """Query and key rows of the other pairing: what forgetting (or adding) the permutation does."""
    for name, tensor in file.tensors.items():
        heads = {
            "attn_q": file.key("attention.head_count"),
            "attn_k": file.key("attention.head_count_kv"),
        }.get(name.split(".")[-2], 0)
        if heads:
            rows = np.arange(tensor.shape[0]).reshape(heads, -1)
            half = rows.shape[1] // 2
            pairs = rows.reshape(heads, half, 2) if file.architecture == "llama" else None
            order = (
                pairs.swapaxes(1, 2)
                if pairs is not None
                else rows.reshape(heads, 2, half).swapaxes(1, 2)
            )
            file.tensors[name] = _reorder(tensor, order.reshape(-1))
    return "q and k rows in the other order"


def _layers_swapped(file: EditableGguf, draw: random.Random) -> str:
    a, b = draw.sample(range(file.key("block_count")), 2)
    for name in list(file.tensors):
        if name.startswith(f"blk.{a}."):
            other = name.replace(f"blk.{a}.", f"blk.{b}.", 1)
            file.tensors[name], file.tensors[other] = file.tensors[other], file.tensors[name]
    return f"layers {a} and {b} swapped"


def _heads_swapped(file: EditableGguf, draw: random.Random) -> str:
    layer = draw.randrange(file.key("block_count"))
    name = f"blk.{layer}.{draw.choice(['attn_k', 'attn_v'])}.weight"
    tensor = file.tensors[name]
    heads = file.key("attention.head_count_kv")
    rows = np.arange(tensor.shape[0]).reshape(heads, -1)
    order = list(range(heads))
    a, b = draw.sample(order, 2)
    order[a], order[b] = order[b], order[a]
    file.tensors[name] = _reorder(tensor, rows[order].reshape(-1))
    return f"kv heads {a} and {b} of {name} swapped"


def _key_and_value_swapped(file: EditableGguf, draw: random.Random) -> str:
    layer = draw.randrange(file.key("block_count"))
    k, v = f"blk.{layer}.attn_k.weight", f"blk.{layer}.attn_v.weight"
    file.tensors[k], file.tensors[v] = file.tensors[v], file.tensors[k]
    return f"k and v of layer {layer} swapped"


def _bit(file: EditableGguf, draw: random.Random) -> str:
    name = draw.choice([n for n, t in file.tensors.items() if len(t.shape) > 1])
    raw = file.tensors[name].raw.copy()
    at, bit = draw.randrange(raw.size), draw.randrange(8)
    raw.reshape(-1)[at] ^= 1 << bit
    file.tensors[name] = dataclasses.replace(file.tensors[name], raw=raw)
    return f"bit {bit} of byte {at} of {name}"


def _forget(file: EditableGguf) -> None:
    """What a file of another build says of its quantizer: nothing."""
    del file.keys["pi_convert.quantizer"]


def _zeroed_row(file: EditableGguf, draw: random.Random) -> str:
    name, tensor = _draw_k_quant(file, draw)
    raw, row = tensor.raw.copy(), draw.randrange(tensor.shape[0])
    raw[row] = 0
    file.tensors[name] = dataclasses.replace(tensor, raw=raw)
    _forget(file)
    return f"row {row} of {name} zeroed, fingerprint removed"


def _scale_bit(file: EditableGguf, draw: random.Random) -> str:
    name, tensor = _draw_k_quant(file, draw)
    raw, row, bit = tensor.raw.copy(), draw.randrange(tensor.shape[0]), draw.randrange(7)
    raw[row, 1] ^= 1 << bit  # the upper byte of a block's float16 scale
    file.tensors[name] = dataclasses.replace(tensor, raw=raw)
    _forget(file)
    return f"bit {bit + 8} of a scale in row {row} of {name}, fingerprint removed"


def _draw_k_quant(file: EditableGguf, draw: random.Random) -> tuple[str, StoredTensor]:
    q4_k = gguf.GGMLQuantizationType.Q4_K
    name = draw.choice([n for n, t in file.tensors.items() if t.type == q4_k])
    return name, file.tensors[name]


def _template_dropped(file: EditableGguf, draw: random.Random) -> str:
    del file.keys["tokenizer.chat_template"]
    return "chat template removed"


def _eot_injected(file: EditableGguf, draw: random.Random) -> str:
    token = draw.randrange(300, 500)
    file.set_key("tokenizer.ggml.eot_token_id", token)
    return f"EOT {token}"


def _zero(key: str) -> Inject:
    def inject(file: EditableGguf, draw: random.Random) -> str:
        file.set(key, 0.0)
        return f"{key} 0"

    return inject


def _head_lost(file: EditableGguf, draw: random.Random) -> str:
    del file.tensors["output.weight"]
    return "output.weight removed: llama.cpp ties the head"


def _head_added(file: EditableGguf, draw: random.Random) -> str:
    embedding = file.tensors["token_embd.weight"]
    order = np.random.default_rng(draw.randrange(1000)).permutation(embedding.shape[0])
    file.tensors["output.weight"] = _reorder(embedding, order)
    return "a head of its own beside tied embeddings"


def _norm_eps(file: EditableGguf, draw: random.Random) -> str:
    value = draw.choice([1e-6, 1e-4])
    file.set("attention.layer_norm_rms_epsilon", value)
    return f"norm epsilon {value:g}"


def _pre(file: EditableGguf, draw: random.Random) -> str:
    wrong = draw.choice(["llama-bpe", "qwen2", "deepseek-llm"])
    file.set_key("tokenizer.ggml.pre", wrong)
    return f"pre-tokenizer {wrong}"


def _bos(file: EditableGguf, draw: random.Random) -> str:
    right = file.keys["tokenizer.ggml.bos_token_id"][0]
    wrong = draw.choice([i for i in range(300) if i != right])
    file.set_key("tokenizer.ggml.bos_token_id", wrong)
    return f"BOS {wrong} for {right}"


def _token(file: EditableGguf, draw: random.Random) -> str:
    tokens, kind, sub = file.keys["tokenizer.ggml.tokens"]
    a, b = draw.sample(range(300, 500), 2)
    tokens = list(tokens)
    tokens[a], tokens[b] = tokens[b], tokens[a]
    file.keys["tokenizer.ggml.tokens"] = (tokens, kind, sub)
    return f"tokens {a} and {b} swapped"


def _half(factor: float, draw: random.Random) -> float:
    return max(1.1, factor * draw.uniform(0.4, 0.6)) if factor > 2 else factor * 2


def _near(factor: float, draw: random.Random) -> float:
    return factor * (1 + draw.choice([-1, 1]) * draw.uniform(1e-4, 3e-4))


FAULTS = (
    Fault("factor dropped", _dropped, "rope", r"factor is 1 \(dropped\), expected"),
    Fault("factor dropped, consistently", _dropped_consistently, "rope", "drops the factor"),
    Fault("half the factor", _factor(_half, consistent=False), "rope", "factor is .* expected"),
    Fault(
        "half the factor, consistently",
        _factor(_half, consistent=True),
        "rope",
        "factor is .* expected",
    ),
    Fault(
        "factor 0.01 to 0.03 % off",
        _factor(_near, consistent=False),
        "rope",
        "factor is .* expected",
    ),
    Fault(
        "factor 0.01 to 0.03 % off, consistently",
        _factor(_near, consistent=True),
        "rope",
        "factor is .* expected",
    ),
    Fault("type none, factor left", _type("none"), "rope", "type is none"),
    Fault("type yarn, factor left", _type("yarn"), "rope", "type is yarn"),
    Fault("type that llama.cpp aborts on", _unknown_type, "rope", "on which llama.cpp aborts"),
    Fault("attention factor", _attention, "rope", "attn_factor is"),
    Fault("stray rope_freqs", _stray_factors, "rope", "stray rope_freqs"),
    Fault("theta", _theta, "rope", "freq_base is .* expected"),
    Fault("theta 0", _zero(THETA), "rope", "freq_base is 0"),
    Fault("attention factor 0", _zero("rope.scaling.attn_factor"), "rope", "attn_factor is 0"),
    Fault("context_length", _context, "rope", "context_length is .* expected"),
    Fault(
        "q and k not permuted",
        _unpermuted,
        "weights",
        "not permuted for llama.cpp|must not be",
    ),
    Fault("two layers swapped", _layers_swapped, "weights", r"holds model\.layers"),
    Fault("two kv heads swapped", _heads_swapped, "weights", "heads in another order"),
    Fault("k and v swapped", _key_and_value_swapped, "weights", "holds model.layers.*[kv]_proj"),
    Fault("one bit of a weight", _bit, "weights", "differs in (one element|1 of)"),
    Fault(
        "one row zeroed, fingerprint removed",
        _zeroed_row,
        "weights",
        "row [0-9]+ has .* times the error",
        ftypes=("q4_k_m",),
    ),
    Fault(
        "one bit of a scale, fingerprint removed",
        _scale_bit,
        "weights",
        "row [0-9]+ has .* times the error",
        ftypes=("q4_k_m",),
    ),
    Fault("norm epsilon", _norm_eps, "weights", "norm_eps is"),
    Fault("untied head lost", _head_lost, "weights", "output.weight is missing", head="untied"),
    Fault("tied head lost", _head_added, "weights", "output.weight is not", head="tied"),
    Fault("tokenizer pre", _pre, "tokenizer", "tokenizer.ggml.pre is"),
    Fault("chat template dropped", _template_dropped, "tokenizer", "chat template is missing"),
    Fault("EOT injected", _eot_injected, "tokenizer", "the eot token is"),
    Fault("BOS", _bos, "tokenizer", "the bos token is"),
    Fault("two tokens swapped", _token, "tokenizer", "token [0-9]+ is"),
)
