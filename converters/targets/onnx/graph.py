"""The decoder as an ONNX graph, from the architecture's description alone: nothing is traced.

Hidden states are (batch * sequence, hidden); attention sees (batch, sequence, heads * head_dim).
In a float16 graph the sum that runs through all layers is float32, and so are its norms: it is the
sum that outgrows float16 in real models.
Inputs are input_ids, attention_mask and the past keys and values; positions follow from the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from converters.checkpoint import Checkpoint
from converters.encodings import F16, F32
from converters.targets.onnx.attention import (
    Attention,
    GroupedAttention,
    StandardAttention,
    States,
)
from converters.targets.onnx.linear import Weights
from converters.targets.onnx.masking import mask_rows
from converters.targets.onnx.ops import MICROSOFT, Ops
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.padding import turn_rows
from converters.targets.onnx.plan import COS, EMBEDDING, HEAD, SIN, OnnxPlan
from converters.targets.onnx.rows import Rows

OPSET, IR_VERSION = 23, 11  # RMSNormalization, RotaryEmbedding and Attention are of 23
_FLOATS = {F32: ir.DataType.FLOAT, F16: ir.DataType.FLOAT16}
_KINDS = ("key", "value")


def build_graph(
    checkpoint: Checkpoint, plan: OnnxPlan, options: GraphOptions, properties: Mapping[str, str]
) -> ir.Model:
    """The model of ``plan``; its weights stand in ``plan.precision.data_name``."""
    return _Decoder(checkpoint, plan, options).build(properties)


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, plan: OnnxPlan, options: GraphOptions) -> None:
        self._name = checkpoint.artifact_name
        self._sizes = checkpoint.hparams
        self._options = options
        self._float = _FLOATS[plan.precision.activations]
        self._ops = Ops(self._float)
        self._weights = Weights(self._ops, plan, options.accuracy_level)

    def build(self, properties: Mapping[str, str]) -> ir.Model:
        ids = _input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = _input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        rows, attention = self._rows_and_attention(ids, mask)
        inputs, outputs = [ids, mask], []
        hidden = self._embedding(rows.ids)
        normed = self._norm("/model/layers.0/input_layernorm", _norm_weight(0, "input"), hidden)
        for layer in range(self._sizes.layers):
            past = [self._cache("past_key_values", "past", layer, kind) for kind in _KINDS]
            inputs += past
            states = self._projected(layer, normed, rows, past)
            attended, present = attention(f"/model/layers.{layer}/attn", states)
            outputs += present
            normed, hidden = self._after_attention(layer, attended, hidden)
            normed, hidden = self._after_mlp(layer, self._mlp(layer, normed), hidden)
        logits = self._logits(normed, rows)
        graph = ir.Graph(
            inputs,
            [logits, *outputs],
            nodes=self._ops.nodes,
            initializers=self._ops.initializers,
            opset_imports={"": OPSET} if self._options.portable else {"": OPSET, MICROSOFT: 1},
            name=self._name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="pi-convert",
            metadata_props=dict(properties),
        )

    def _rows_and_attention(self, ids: ir.Value, mask: ir.Value) -> tuple[Rows, Attention]:
        ops, sizes = self._ops, self._sizes
        tables = self._weights.value(COS), self._weights.value(SIN)
        if self._options.portable:
            masked = mask_rows(ops, ids, mask)
            return masked, StandardAttention(ops, sizes, masked, tables)
        turned = turn_rows(ops, ids, mask)
        return turned, GroupedAttention(ops, sizes, turned, tables)

    def _embedding(self, ids: ir.Value) -> ir.Value:
        name = "/model/embed_tokens"
        found = self._weights.embedding(name, ids)
        flat = self._ops.reshape(f"{name}/Reshape", found, [-1, self._sizes.hidden_size])
        return self._widened(name, flat)

    def _projected(
        self, layer: int, normed: ir.Value, rows: Rows, past: Sequence[ir.Value]
    ) -> States:
        ops, sizes = self._ops, self._sizes

        def project(name: str, size: int) -> ir.Value:
            place = f"/model/layers.{layer}/attn/{name}"
            flat = self._weights.linear(place, f"model.layers.{layer}.self_attn.{name}", normed)
            return ops.reshape(f"{place}/Reshape", flat, rows.sizes.shape(ops, size))

        return States(
            query=project("q_proj", sizes.query_size),
            key=project("k_proj", sizes.kv_size),
            value=project("v_proj", sizes.kv_size),
            past=past,
            present=[self._cache("present", "total", layer, kind) for kind in _KINDS],
        )

    def _after_attention(
        self, layer: int, attended: ir.Value, hidden: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        name = f"/model/layers.{layer}"
        flat = self._ops.reshape(f"{name}/attn/Reshape", attended, [-1, self._sizes.query_size])
        output = self._weights.linear(
            f"{name}/attn/o_proj", f"model.layers.{layer}.self_attn.o_proj", flat
        )
        weight = _norm_weight(layer, "post_attention")
        return self._add_norm(f"{name}/post_attention_layernorm", weight, output, hidden)

    def _mlp(self, layer: int, normed: ir.Value) -> ir.Value:
        ops, prefix, source = self._ops, f"/model/layers.{layer}/mlp", f"model.layers.{layer}.mlp"
        gate = self._weights.linear(f"{prefix}/gate_proj", f"{source}.gate_proj", normed)
        up = self._weights.linear(f"{prefix}/up_proj", f"{source}.up_proj", normed)
        sigmoid = ops(f"{prefix}/act_fn/Sigmoid", "Sigmoid", gate)
        silu = ops(f"{prefix}/act_fn/Mul", "Mul", gate, sigmoid)
        product = ops(f"{prefix}/Mul", "Mul", silu, up)
        return self._weights.linear(f"{prefix}/down_proj", f"{source}.down_proj", product)

    def _after_mlp(self, layer: int, fed: ir.Value, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
        following = layer + 1
        if following == self._sizes.layers:
            return self._add_norm("/model/norm", "model.norm.weight", fed, hidden)
        name = f"/model/layers.{following}/input_layernorm"
        return self._add_norm(name, _norm_weight(following, "input"), fed, hidden)

    def _logits(self, normed: ir.Value, rows: Rows) -> ir.Value:
        """Rows in the caller's order again, through the head: (batch, sequence, vocabulary)."""
        ops, last = self._ops, self._options.last_logits
        states = rows.restored(ops, normed, last=last)
        head = EMBEDDING if self._sizes.tied_embeddings else HEAD
        flat = self._weights.linear("/lm_head", head.removesuffix(".weight"), states)
        flat = self._widened("/lm_head", flat)
        shape = rows.sizes.logits_shape(ops, self._sizes.vocab_size, last=last)
        logits = ops("/lm_head/Reshape", "Reshape", flat, shape, outputs=["logits"])
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        columns = 1 if last else "sequence_length"
        logits.shape = ir.Shape(["batch_size", columns, self._sizes.vocab_size])
        return logits

    def _norm(self, name: str, weight: str, states: ir.Value) -> ir.Value:
        normed = self._ops(
            f"{name}/LayerNorm", "RMSNormalization", states, self._weights.value(weight),
            axis=-1, epsilon=self._sizes.norm_eps,
        )  # fmt: skip
        return self._narrowed(name, normed)

    def _add_norm(
        self, name: str, weight: str, states: ir.Value, hidden: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum).

        In one operator for a GPU alone: the CPU provider takes twice as long for it as for two
        (benchmarks/onnx_norms.py).
        """
        states = self._widened(name, states)
        if self._options.portable or self._ops.is_float32:
            total = self._ops(f"{name}/Add", "Add", states, hidden)
            return self._norm(name, weight, total), total
        name = f"{name}/SkipLayerNorm"
        normed, _, _, total = self._ops.all(
            name, "SkipSimplifiedLayerNormalization",
            states, hidden, self._weights.value(weight),
            domain=MICROSOFT, epsilon=self._sizes.norm_eps,
            outputs=[f"{name}/output_0", "", "", f"{name}/output_3"],
        )  # fmt: skip
        return self._narrowed(name, normed), total

    def _widened(self, name: str, states: ir.Value) -> ir.Value:
        """Activations as float32."""
        if self._ops.is_float32:
            return states
        return self._ops.cast(f"{name}/Widen", states, ir.DataType.FLOAT)

    def _narrowed(self, name: str, states: ir.Value) -> ir.Value:
        """Float32 states as activations."""
        if self._ops.is_float32:
            return states
        return self._ops.cast(f"{name}/Narrow", states, self._float)

    def _cache(self, prefix: str, length: str, layer: int, kind: str) -> ir.Value:
        sizes = self._sizes
        columns = f"{length}_sequence_length"
        shape: list[int | str] = ["batch_size", sizes.kv_heads, columns, sizes.head_dim]
        return _input(f"{prefix}.{layer}.{kind}", self._float, shape)


def _norm_weight(layer: int, norm: str) -> str:
    return f"model.layers.{layer}.{norm}_layernorm.weight"


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
