"""What an ONNX folder or file is: the value behind ``inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from converters.containers.onnx import OnnxFile, OnnxTensor
from converters.containers.strict_json import read_json_object
from converters.errors import ConvertError, SourceError
from converters.rope import Evidence, RopeParameters
from converters.rope.gguf import RECORD_PREFIX
from converters.targets.onnx.weights import CODES, OFFSETS, SCALES, ZERO_POINTS
from converters.tokenizers import read_tokenizer
from pi_convert.audit.description import (
    Description,
    RopeSummary,
    TensorGroup,
    TokenizerSummary,
    tokenizer_summary,
)
from pi_convert.audit.onnx_export import (
    CONFIG,
    Graph,
    OnnxExport,
    agree,
    factor_of,
    open_export,
)
from pi_convert.runtimes.onnx_tables import Tables, recovered_frequencies

_BLOCK_NODES = ("MatMulNBits", "GatherBlockQuantized")
_PARTS = (ZERO_POINTS, OFFSETS)
_BLOCK_ELEMENTS = (32, 128)  # of a block of 8 bits so many bytes, of one of 4 bits half as many
_PAST = "past_key_values."
_CACHE_BYTES = {"float16": 2, "float32": 4}


def describe_onnx(path: Path) -> Description:
    """The description of an ONNX file or folder, of its first graph; the others are notes.

    Raises ``SourceError`` where no graph can be read.
    """
    export = open_export(path)
    readable = [graph for graph in export.graphs if graph.file is not None]
    if not readable:
        raise export.graphs[0].problem or SourceError(
            f"{path}: no graph can be read", hint="`pi-convert check` tells why."
        )
    graph, file = readable[0], readable[0].file
    assert file is not None  # noqa: S101
    groups = tuple(_groups(graph, file))
    rope, notes = _rope(export, graph)
    if isinstance(graph.tables, Tables):
        tables = graph.tables.cos.nbytes + graph.tables.sin.nbytes
        notes.append(
            f"cos and sin tables of {graph.tables.rows:,} positions: {tables / 2**20:.1f} MiB"
        )
    return Description(
        label=path.name or str(path),
        container="onnx",
        architecture=graph.record().get("architecture", _stated_architecture(export)),
        name=_text(export.config, "_name_or_path") or None,
        license=None,
        size_bytes=sum(group.size_bytes for group in groups),
        file_bytes=file.size_bytes,
        rope=rope,
        tensors=groups,
        tokenizer=_tokenizer(export),
        kv_cache_bytes=_cache(file, rope),
        sliding_window=None,
        record={k: v for k, v in file.properties.items() if k.startswith(RECORD_PREFIX)},
        notes=(*notes, *_logits(file), *_other_graphs(export, graph)),
        cache_type=next((t for n, t in file.input_types.items() if n.startswith(_PAST)), "float32"),
    )


def _stated_architecture(export: OnnxExport) -> str:
    return _text(export.config, "model_type") or "not told"


def _text(config: object, key: str) -> str:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, str) else ""


def _rope(export: OnnxExport, graph: Graph) -> tuple[RopeSummary | None, list[str]]:
    """RoPE as the tables apply it; what config.json says otherwise is a note."""
    tables, stated = graph.tables, export.stated_rope
    if not isinstance(tables, Tables):
        return None, [tables.message]
    notes = [stated.message] if isinstance(stated, ConvertError) else []
    if not isinstance(stated, RopeParameters):
        return _from_tables(tables), [*notes, "theta and the factor are read from the tables alone"]
    found = factor_of(tables, replace(stated, factor=1.0).inv_freq())
    right = agree(tables, stated.inv_freq())
    if not right:
        notes.append(f"the tables are not what {CONFIG} says: `pi-convert check` tells more")
    factor = stated.factor if right else found
    source = f"the tables of {graph.path.name}"
    return RopeSummary(
        kind=stated.kind if right else "as the tables have it",
        factor=float("nan") if factor is None else factor,
        theta=stated.theta,
        rotary_dim=tables.rotary_dim,
        original_context=stated.original_context,
        context=min(stated.context, tables.rows),
        attention_factor=round(tables.amplitude(), 6),
        evidence=(Evidence("effective factor", source), *stated.evidence),
    ), notes


def _from_tables(tables: Tables) -> RopeSummary:
    """Theta by the ratio of the columns, which no factor changes; the factor by the first."""
    found = recovered_frequencies(tables)
    theta = float((found[0] / found[-1]) ** (len(found) / (len(found) - 1)))
    return RopeSummary(
        kind="as the tables have it",
        factor=float(1 / found[0]),
        theta=float(f"{theta:.4g}"),
        rotary_dim=tables.rotary_dim,
        original_context=None,
        context=tables.rows,
        attention_factor=round(tables.amplitude(), 6),
        evidence=(Evidence("L'", "the number of positions in the tables"),),
    )


def _groups(graph: Graph, file: OnnxFile) -> Iterator[TensorGroup]:
    """Weights by type: blocks as their nodes name them, the rest by the initializers' own types."""
    found: dict[str, list[tuple[int, int]]] = {}
    used = set(graph.tables.as_mapping()) if isinstance(graph.tables, Tables) else set()
    seen: set[object] = set()
    for node in file.nodes_of(*_BLOCK_NODES):
        parts = [file.tensors[name] for name in node.inputs if name in file.tensors]
        used.update(part.name for part in parts)
        codes = parts[0] if parts else None
        place = codes and (codes.file, codes.offset)
        if codes is None or place in seen:
            continue
        seen.add(place)
        bits = int(str(node.attributes.get("bits", 4)))
        block = int(str(node.attributes.get("block_size", 32)))
        elements = prod(codes.shape) * 8 // bits
        size = sum(map(_bytes, parts[:4]))
        found.setdefault(f"int{bits} in blocks of {block}", []).append((elements, size))
    for name, codes in file.tensors.items():
        # Rows of an embedding are gathered from a weight's parts (converters.targets.onnx.blocks).
        scales = file.tensors.get(f"{name.removesuffix(CODES)}{SCALES}")
        if name in used or not name.endswith(CODES) or scales is None:
            continue
        others = [file.tensors.get(f"{name.removesuffix(CODES)}{part}") for part in _PARTS]
        parts = [codes, scales, *(part for part in others if part is not None)]
        used.update(part.name for part in parts)
        block_bytes = prod(codes.shape) // prod(scales.shape)
        bits = 8 if block_bytes in _BLOCK_ELEMENTS else 4
        size = sum(map(_bytes, parts))
        kind = f"int{bits} in blocks of {block_bytes * 8 // bits}"
        found.setdefault(kind, []).append((prod(codes.shape) * 8 // bits, size))
    for name, tensor in file.tensors.items():
        if name not in used and tensor.file is not None:
            # Offsets belong to blocks: they add bytes and no parameters.
            elements = 0 if name.endswith("_offsets") else prod(tensor.shape)
            entry = (elements, _bytes(tensor))
            found.setdefault(tensor.dtype.name, []).append(entry)
    for kind, entries in sorted(found.items(), key=lambda item: -sum(e[1] for e in item[1])):
        elements, size = (sum(column) for column in zip(*entries, strict=True))
        yield TensorGroup(kind, len(entries), elements, size)


def _bytes(tensor: OnnxTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _cache(file: OnnxFile, rope: RopeSummary | None) -> dict[int, int]:
    """KV cache in the graph's own type, by context."""
    past = {n: s for n, s in file.inputs.items() if n.startswith(_PAST)}
    if rope is None or not past:
        return {}
    token_bytes = 0
    for name, shape in past.items():
        heads, head_dim = shape[1], shape[3]
        if not isinstance(heads, int) or not isinstance(head_dim, int):
            return {}
        token_bytes += heads * head_dim * _CACHE_BYTES.get(file.input_types[name], 4)
    contexts = {c for c in (rope.original_context, rope.context) if c}
    return {context: token_bytes * context for context in sorted(contexts)}


def _tokenizer(export: OnnxExport) -> TokenizerSummary | None:
    if export.config is None:
        return None
    rows = export.config.get("vocab_size")
    try:
        config = read_json_object(export.folder / CONFIG)
        vocabulary = read_tokenizer(export.folder, int(str(rows)), config=config)
    except (ConvertError, ValueError):
        return None
    return tokenizer_summary(vocabulary)


def _logits(file: OnnxFile) -> Iterator[str]:
    shape = next(iter(file.outputs.values()), ())
    if len(shape) == 3:
        yield f"logits of {'the last token alone' if shape[1] == 1 else 'every token'}"


def _other_graphs(export: OnnxExport, shown: Graph) -> Iterator[str]:
    for graph in export.graphs:
        if graph is shown:
            continue
        if graph.file is None:
            reason = graph.problem.message if graph.problem else "unknown"
            yield f"{graph.path.name} cannot be read: {reason}"
            continue
        kinds = ", ".join(f"{g.encoding} {g.count}" for g in _groups(graph, graph.file))
        size = graph.file.size_bytes / 2**20
        yield f"also here: {graph.path.name}, {size:,.1f} MiB ({kinds})"
