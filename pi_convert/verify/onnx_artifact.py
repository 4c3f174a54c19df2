"""An ONNX file opened for verification: its tables, and its weights under the source's names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from converters.architectures import HParams
from converters.checkpoint import Checkpoint
from converters.containers.onnx import OnnxFile, OnnxNode, read_onnx_file
from converters.errors import SourceError
from converters.rope import RopeParameters
from converters.tensor import Tensor
from pi_convert.runtimes.llamacpp import cores
from pi_convert.runtimes.onnx_tables import Tables, right_tables, stored_tables
from pi_convert.runtimes.ort import RUNTIME_PACKAGE, OrtModel, OrtOptions
from pi_convert.verify.artifact import Artifact
from pi_convert.verify.onnx_builder import built_weight
from pi_convert.verify.onnx_weights import is_second_copy, parts_of, stored_weight

_NORMS = {
    "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxArtifact(Artifact):
    """An ONNX file. ``tables`` None: ``rope_problem`` says why there are none."""

    file: OnnxFile
    tables: Tables | None
    options: OrtOptions

    runtime_name: ClassVar[str] = "ONNX Runtime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", RUNTIME_PACKAGE)
    keeps_row_order: ClassVar[bool] = True

    @property
    def claimed_factor(self) -> float | None:
        """The factor that the file records."""
        factor = stored_rope(self).get("factor")
        return float(factor) if isinstance(factor, int | float) and factor >= 1 else None

    @property
    def on_gpu(self) -> bool:
        """Whether ONNX Runtime uses a GPU."""
        return self.options.device != "cpu"

    def load(self, imposed: RopeParameters | None = None) -> OrtModel:
        """The file in ONNX Runtime, as it is or with the tables of a RoPE imposed."""
        if imposed is None or self.tables is None:
            return self.load_with(None)
        cos, sin = right_tables(self.tables, imposed.inv_freq(), imposed.attention_factor)
        return self.load_with(Tables(self.tables.cos_name, self.tables.sin_name, cos, sin))

    def load_with(self, imposed: Tables | None) -> OrtModel:
        """The file in ONNX Runtime, with other tables imposed."""
        return OrtModel(self.file, self.options, self.tables, imposed)

    def load_problem(self) -> str | None:
        """Why ONNX Runtime cannot load it."""
        try:
            self.load().close()
        except SourceError as error:
            return error.message
        return None

    def size_findings(self, expected: HParams) -> Iterator[str]:
        """Where attributes of attention and of norms are not the source's; the first of each."""
        found: dict[tuple[str, str], str] = {}
        for node in self.file.nodes:
            for key, value in expected_attributes(node, expected).items():
                stored = node.attributes.get(key, _DEFAULTS.get(key))
                if not _equal(stored, value):
                    text = f"{node.name}: {key} is {_number(stored)}, expected {_number(value)}"
                    found.setdefault((node.operator, key), text)
        yield from found.values()

    def environment(self) -> dict[str, str]:
        """ONNX Runtime's settings."""
        return {
            "ONNX Runtime device": self.options.device,
            "threads": str(self.options.threads or cores()),
        }


# What an attribute means where it is left out: the operators' own defaults.
_DEFAULTS: Mapping[str, float] = {
    "epsilon": 1e-5,
    "scale": 0.0,
    "softcap": 0.0,
    "local_window_size": -1,
    "rotary_interleaved": 0,
    "interleaved": 0,
    "is_causal": 0,
}


def expected_attributes(node: OnnxNode, sizes: HParams) -> dict[str, float]:
    """What a node that attends, rotates or normalises has to say for a model of ``sizes``."""
    scale = sizes.head_dim**-0.5
    match node.operator:
        case "GroupQueryAttention":
            heads = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads}
            plain = {"softcap": 0.0, "local_window_size": -1, "rotary_interleaved": 0}
            return {**heads, **plain, **_scale(node, scale)}
        case "Attention":
            heads = {"q_num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads}
            return {**heads, "softcap": 0.0, **_scale(node, scale)}
        case "RotaryEmbedding":
            return {"interleaved": 0}
        case operator if operator in _NORMS:
            return {"epsilon": sizes.norm_eps}
    return {}


def _scale(node: OnnxNode, expected: float) -> dict[str, float]:
    """Left out or 0, the runtime takes 1 / sqrt(head_dim) itself."""
    return {"scale": expected} if node.attributes.get("scale") else {}


def _equal(stored: object, value: float) -> bool:
    if not isinstance(stored, int | float):
        return False
    return bool(np.float32(stored) == np.float32(value))


def _number(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def open_onnx_artifact(path: Path, source: Checkpoint, options: OrtOptions) -> OnnxArtifact:
    """Reads the graph. Raises ``SourceError`` where it is no whole ONNX model."""
    file = read_onnx_file(path)
    tables, problem = None, None
    try:
        tables = stored_tables(file)
    except SourceError as error:
        problem = error.message
    tensors: dict[str, Tensor] = {}
    missing, misshapen = [], []
    used: set[str] = set()
    expected = list(source.architecture.expected_tensors(source.hparams, source.groups))
    for name, _, shape, _ in expected:
        parts = parts_of(name, file.tensors)
        used.update(part.name for part in parts.values())
        tensor = stored_weight(name, shape, parts)
        built = None if parts else built_weight(name, shape, file.tensors, source.hparams)
        if built is not None:
            tensors[name] = built[0]
            used.add(built[1])
        elif not parts:
            missing.append(name)
        elif tensor is None:
            stored = ", ".join(f"{p.dtype.name} {list(p.shape)}" for p in parts.values())
            misshapen.append(f"{name} is {stored}, expected {list(shape)}")
        else:
            tensors[name] = tensor
    return OnnxArtifact(
        path=path,
        architecture=_architecture(file, source),
        record=dict(file.properties),
        rope_problem=problem,
        tensors=tensors,
        missing=tuple(missing),
        unexpected=tuple(_unexpected(file, used, tables)),
        misshapen=tuple(misshapen),
        file=file,
        tables=tables,
        options=replace(options, cache_heads=(source.hparams.kv_heads, source.hparams.head_dim)),
    )


def stored_rope(artifact: OnnxArtifact) -> Mapping[str, object]:
    """What the file's own record says of its RoPE, {} where it says nothing."""
    try:
        record = json.loads(str(artifact.record.get("pi_convert.rope", "{}")))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _architecture(file: OnnxFile, source: Checkpoint) -> str:
    """The recorded one; a file without a record is held against the source's tensors alone."""
    recorded = file.properties.get("pi_convert.architecture")
    return source.architecture.gguf_name if recorded is None else recorded


def _unexpected(file: OnnxFile, used: set[str], tables: Tables | None) -> Iterator[str]:
    """Large initializers that are no weight of the source; small ones are the graph's own."""
    known = used | ({tables.cos_name, tables.sin_name} if tables else set())
    places = {(t.file, t.offset) for n, t in file.tensors.items() if n in known and t.file}
    for name, tensor in file.tensors.items():
        # The embedding's bytes may be named twice, for the gather and for the head.
        again = tensor.file is not None and (tensor.file, tensor.offset) in places
        if tensor.file is None or name in known or again:
            continue
        if not is_second_copy(name, file.tensors):
            yield name
