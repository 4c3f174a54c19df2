"""Faults to inject into a right ONNX export, each with parameters drawn from a seed.

As ``faults`` for GGUF: a fault edits the folder through the onnx library and says what it did.
``link`` is the link that has to fail, ``cause`` a regular expression that its cause has to match.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import numpy_helper

from tests.pi_convert.verify.onnx_tools import COS, SIN, EditableOnnx, frequencies

Inject = Callable[[EditableOnnx, random.Random], str]


@dataclass(frozen=True)
class OnnxFault:
    name: str
    inject: Inject
    link: str
    cause: str
    precisions: tuple[str, ...] = ("fp32", "fp16", "int4")
    head: str | None = None  # the model has to be "tied" or "untied"
    whole_heads: bool = False  # the model has to have as many kv heads as query heads


def _factor(change: Callable[[float, random.Random], float], *, consistent: bool) -> Inject:
    """Tables of another factor; consistently: every file beside them and the record say so too."""

    def inject(file: EditableOnnx, draw: random.Random) -> str:
        record = file.record()
        factor, theta, original = record["factor"], record["theta"], record["original_context"]
        wrong = change(factor, draw)
        context = int(original * wrong) if consistent else record["context"]
        columns = file.get(COS).shape[1]
        file.set_tables(frequencies(theta, wrong, columns), rows=context)
        if consistent:
            _say(file, wrong, context)
        return f"tables of factor {wrong:.6g} for {factor:g}"

    return inject


def _say(file: EditableOnnx, factor: float, context: int) -> None:
    file.set_record(factor=factor, context=context, kind="linear" if factor > 1 else "default")
    config = file.files["config.json"]
    config["max_position_embeddings"] = context
    block = {"rope_type": "linear", "type": "linear", "factor": factor}
    if factor == 1:
        block = {"rope_type": "default", "type": "default"}
        config.pop("rope_scaling", None)
    else:
        config["rope_scaling"] = block
    config["rope_parameters"] = {**block, "rope_theta": config["rope_theta"]}
    file.files["genai_config.json"]["model"]["context_length"] = context


def _theta(file: EditableOnnx, draw: random.Random) -> str:
    record = file.record()
    theta = record["theta"] * draw.choice([0.1, 0.5, 2.0, 10.0])
    file.set_tables(frequencies(theta, record["factor"], file.get(COS).shape[1]))
    return f"tables of theta {theta:g} for {record['theta']:g}"


def _truncated(file: EditableOnnx, draw: random.Random) -> str:
    rows = len(file.get(COS))
    kept = draw.choice([file.record()["original_context"], rows - 1, rows // 2])
    for name in (COS, SIN):
        file.set(name, file.get(name)[:kept])
    return f"{kept} of {rows} rows of both tables"


def _amplitude(file: EditableOnnx, draw: random.Random) -> str:
    by = draw.uniform(0.7, 0.95)
    for name in (COS, SIN):
        table = file.get(name)
        file.set(name, (table * by).astype(table.dtype))
    return f"tables times {by:.3g}"


def _past_original(file: EditableOnnx, draw: random.Random) -> str:
    """Rows beyond L are another factor's: short texts cannot tell."""
    record = file.record()
    cos, sin = file.get(COS), file.get(SIN)
    first = record["original_context"] + draw.randrange(10)
    file.set_tables(frequencies(record["theta"], record["factor"] / 2, cos.shape[1]))
    for name, old in ((COS, cos), (SIN, sin)):
        new = file.get(name)
        new[:first] = old[:first]
        file.set(name, new)
    return f"tables of half the factor from row {first}"


def _config(file: EditableOnnx, draw: random.Random) -> str:
    config = file.files["config.json"]
    for key in ("rope_scaling", "rope_parameters"):
        config.pop(key, None)
    return "config.json without its scaling"


def _context(file: EditableOnnx, draw: random.Random) -> str:
    right = file.record()["context"]
    wrong = draw.choice([right * 2, right - 1, file.record()["original_context"]])
    file.files["genai_config.json"]["model"]["context_length"] = wrong
    return f"genai_config.json: context_length {wrong} for {right}"


def _parts(file: EditableOnnx, weight: str) -> list[str]:
    """The initializers of a weight: one, or codes, scales and offsets."""
    return [n for n in file.names() if n == weight or n.startswith(f"{weight}_")]


def _layers(file: EditableOnnx) -> int:
    return 1 + max(int(n.split(".")[2]) for n in file.names() if n.startswith("model.layers."))


def _swap(file: EditableOnnx, a: str, b: str) -> None:
    pairs = list(zip(_parts(file, a), _parts(file, b), strict=True))
    assert pairs, (a, b)
    for first, second in pairs:
        values = file.get(first), file.get(second)
        file.set(first, values[1])
        file.set(second, values[0])


MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def _layers_swapped(file: EditableOnnx, draw: random.Random) -> str:
    a, b = draw.sample(range(_layers(file)), 2)
    for part in MATRICES:
        _swap(file, f"model.layers.{a}.{part}.weight", f"model.layers.{b}.{part}.weight")
    return f"layers {a} and {b} swapped"


def _one_layer_of_another(file: EditableOnnx, draw: random.Random) -> str:
    a, b = draw.sample(range(_layers(file)), 2)
    part = draw.choice(MATRICES)
    names = [f"model.layers.{layer}.{part}.weight" for layer in (a, b)]
    for to, found in zip(_parts(file, names[0]), _parts(file, names[1]), strict=True):
        file.set(to, file.get(found))
    return f"{part} of layer {a} points to layer {b}'s data"


def _kv_swapped(file: EditableOnnx, draw: random.Random) -> str:
    layer = draw.randrange(_layers(file))
    prefix = f"model.layers.{layer}.self_attn"
    _swap(file, f"{prefix}.k_proj.weight", f"{prefix}.v_proj.weight")
    return f"k and v of layer {layer} swapped"


def _qk_swapped(file: EditableOnnx, draw: random.Random) -> str:
    """Queries where keys belong, in a model with as many of either."""
    layer = draw.randrange(_layers(file))
    prefix = f"model.layers.{layer}.self_attn"
    _swap(file, f"{prefix}.q_proj.weight", f"{prefix}.k_proj.weight")
    return f"q and k of layer {layer} swapped"


def _interleaved(file: EditableOnnx, draw: random.Random) -> str:
    """Query and key rows in llama.cpp's order."""
    half = file.get(COS).shape[1]
    for layer in range(_layers(file)):
        for part in ("q_proj", "k_proj"):
            for name in _parts(file, f"model.layers.{layer}.self_attn.{part}.weight"):
                rows = file.get(name)
                heads = rows.reshape(-1, 2, half, *rows.shape[1:])
                file.set(name, heads.swapaxes(1, 2).reshape(rows.shape))
    return "q and k rows in the other order"


def _heads_swapped(file: EditableOnnx, draw: random.Random) -> str:
    layer = draw.randrange(_layers(file))
    width = 2 * file.get(COS).shape[1]
    for name in _parts(file, f"model.layers.{layer}.self_attn.v_proj.weight"):
        rows = file.get(name)
        order = np.arange(len(rows)).reshape(-1, width)
        file.set(name, rows[order[[1, 0, *range(2, len(order))]].reshape(-1)])
    return f"kv heads 0 and 1 of v_proj of layer {layer} swapped"


def _one_bit(file: EditableOnnx, draw: random.Random) -> str:
    layer, part = draw.randrange(_layers(file)), draw.choice(MATRICES)
    name = _parts(file, f"model.layers.{layer}.{part}.weight")[0]
    values = file.get(name)
    raw = values.view(np.uint8).reshape(-1)
    at, bit = draw.randrange(raw.size), draw.randrange(8)
    raw[at] ^= 1 << bit
    file.set(name, values)
    return f"bit {bit} of byte {at} of {name}"


def _epsilon(file: EditableOnnx, draw: random.Random) -> str:
    wrong = draw.choice([1e-6, 1e-3])
    for operator in ("SkipSimplifiedLayerNormalization", "RMSNormalization"):
        for node in file.nodes(operator):
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = wrong
    return f"norm epsilon {wrong:g}"


def _attention_scale(file: EditableOnnx, draw: random.Random) -> str:
    """A scale of attention that is not 1 / sqrt(head_dim)."""
    by = draw.choice([0.5, 2.0])
    for node in file.nodes("GroupQueryAttention"):
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= by
    return f"attention scale times {by:g}"


def _overflow(file: EditableOnnx, draw: random.Random) -> str:
    """What a weight past 65,504 becomes."""
    layer = draw.randrange(_layers(file))
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    values = file.get(name)
    row, column = (draw.randrange(size) for size in values.shape)
    values[row, column] = np.inf
    file.set(name, values)
    return f"{name} infinite in row {row}, column {column}"


def _other_head(file: EditableOnnx, draw: random.Random) -> str:
    """The head multiplies by another matrix than the token embedding it is tied to."""
    name = next(n for n in file.names() if n.startswith("model.embed_tokens.weight"))
    other = "other_head" + name.removeprefix("model.embed_tokens.weight")
    values = file.get(name)
    flipped = np.ascontiguousarray(values[::-1])
    file.model.graph.initializer.append(numpy_helper.from_array(flipped, other))
    node = next(n for n in file.model.graph.node if n.name == "/lm_head/MatMul")
    node.input[1] = other
    return "a head of its own beside tied embeddings"


def _bos(file: EditableOnnx, draw: random.Random) -> str:
    wrong = draw.randrange(10, 400)
    for name in ("config.json", "generation_config.json"):
        file.files[name]["bos_token_id"] = wrong
    return f"BOS {wrong} for 1"


def _template(file: EditableOnnx, draw: random.Random) -> str:
    del file.files["tokenizer_config.json"]["chat_template"]
    return "chat template removed"


HALF = _factor(lambda factor, draw: factor * draw.uniform(0.4, 0.6), consistent=False)
FAULTS = (
    OnnxFault("factor dropped", _factor(lambda f, d: 1.0, consistent=False), "rope",
              r"factor 1\b.*\(dropped\), expected"),
    OnnxFault("factor dropped, consistently", _factor(lambda f, d: 1.0, consistent=True), "rope",
              r"positions, L' is|factor 1\b.*\(dropped\)"),
    OnnxFault("half the factor", HALF, "rope", r"tables are of factor .*, expected"),
    OnnxFault("half the factor, consistently",
              _factor(lambda f, d: f * d.uniform(0.45, 0.6), consistent=True), "rope",
              r"positions, L' is|tables are of factor .*, expected"),
    OnnxFault("twice the factor", _factor(lambda f, d: f * d.uniform(1.7, 2.3), consistent=False),
              "rope", r"tables are of factor .*, expected"),
    OnnxFault("factor 0.01 to 0.03 % off",
              _factor(lambda f, d: f * (1 + d.choice([-1, 1]) * d.uniform(1e-4, 3e-4)),
                      consistent=False),
              "rope", r"tables are of factor .*, expected", ("fp32", "int4")),
    OnnxFault("theta", _theta, "rope", r"tables are of theta .*, expected"),
    OnnxFault("a truncated table", _truncated, "rope", r"the tables have .* positions, L' is"),
    OnnxFault("tables of half the factor past L", _past_original, "rope", "columns are not of"),
    OnnxFault("attention factor", _amplitude, "rope", r"the tables are multiplied by 0\."),
    OnnxFault("config.json lost its scaling", _config, "rope", "config.json gives transformers"),
    OnnxFault("context_length", _context, "rope", "genai_config.json says context_length"),
    OnnxFault("q and k interleaved", _interleaved, "weights", "has its rows interleaved"),
    OnnxFault("two layers swapped", _layers_swapped, "weights", r"holds model\.layers"),
    OnnxFault("a layer's data is another's", _one_layer_of_another, "weights",
              r"holds model\.layers"),
    OnnxFault("k and v swapped", _kv_swapped, "weights", r"holds model\.layers"),
    OnnxFault("q and k swapped", _qk_swapped, "weights", r"holds model\.layers",
              whole_heads=True),
    OnnxFault("two kv heads swapped", _heads_swapped, "weights", "heads in another order"),
    OnnxFault("one bit of a weight", _one_bit, "weights", r"differs in"),
    OnnxFault("fp16 overflow", _overflow, "weights", r"not finite.*float16", ("fp16",)),
    OnnxFault("norm epsilon", _epsilon, "weights", r"Norm: epsilon is"),
    OnnxFault("attention scale", _attention_scale, "weights", r"Attention: scale is"),
    OnnxFault("tied head lost", _other_head, "weights", "head", head="tied"),
    OnnxFault("chat template dropped", _template, "tokenizer", "the chat template is missing"),
    OnnxFault("BOS", _bos, "tokenizer", r"bos_token_id is \d+, the source's is 1"),
)  # fmt: skip
