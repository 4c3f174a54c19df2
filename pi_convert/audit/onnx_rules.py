"""The audit of an ONNX folder: graphs, weights, tables, and what each client goes by.

What each client reads was tried with onnxruntime-genai 0.18, optimum-onnx 0.1.0 and transformers.js
4.3.1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters.containers.onnx import OnnxFile
from converters.errors import ConvertError
from converters.files import sha256_file
from converters.rope import RopeParameters
from pi_convert.audit.findings import Audit, Finding, Severity, note, wrong
from pi_convert.audit.onnx_export import (
    CONFIG,
    GENAI,
    Graph,
    OnnxExport,
    agree,
    factor_of,
    open_export,
)
from pi_convert.runtimes.onnx_tables import Tables, tolerance

_AGAIN = "pi-convert export MODEL --to onnx --scale S"
_TOKENIZER = "tokenizer.json"
# A graph that knows a row's padding looks for its first or counts its real columns.
_PADDING_OPERATORS = ("ArgMax", "CumSum")


@dataclass(frozen=True, slots=True)
class OnnxRule:
    """``check`` yields what is not right of one graph; else ``right`` says what is."""

    id: str
    check: Callable[[OnnxExport, Graph, OnnxFile], Iterator[Finding]]
    right: Callable[[OnnxExport, Graph, OnnxFile], str]


def audit_onnx(path: Path) -> Audit:
    """Every finding about an ONNX file or folder; data is hashed where a hash is recorded."""
    export = open_export(path)
    findings = [*_unreadable(export), *_folder(export)]
    for graph in export.graphs:
        found = list(_of_graph(export, graph))
        findings += [_named(finding, graph) for finding in found] if export.graphs[1:] else found
    findings += _disagreement(export)
    return Audit(str(path), _architecture(export), tuple(findings))


def _architecture(export: OnnxExport) -> str:
    recorded = next((r for g in export.graphs if (r := g.record().get("architecture"))), None)
    return recorded or (export.architecture.name if export.architecture else "")


def _named(finding: Finding, graph: Graph) -> Finding:
    return replace(finding, found=f"{graph.path.name}: {finding.found}")


def _unreadable(export: OnnxExport) -> Iterator[Finding]:
    for name, error in export.problems.items():
        yield wrong(
            "folder.readable", error.message, f"a {name} that every client can read", error.hint
        )


def _of_graph(export: OnnxExport, graph: Graph) -> Iterator[Finding]:
    if graph.file is None:
        problem = graph.problem or ConvertError("it cannot be read", hint=_AGAIN)
        yield wrong("file.readable", problem.message, "a whole graph and its weights", problem.hint)
        return
    for rule in RULES:
        findings = list(rule.check(export, graph, graph.file))
        yield from findings
        if not findings and (sentence := rule.right(export, graph, graph.file)):
            yield Finding(rule.id, Severity.RIGHT, sentence)


def _checker(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(graph.path))
    except onnx.checker.ValidationError as error:
        line = str(error).strip().splitlines()[0]
        if "No Op registered" in line:
            # Such as SimplifiedLayerNormalization, which ONNX Runtime has under ai.onnx's name.
            yield note(
                "graph.operators",
                f"onnx's checker: {line}",
                "standard operators, or com.microsoft's: only ONNX Runtime can run the graph",
            )
            return
        yield wrong("graph.valid", f"onnx's checker: {line}", "a valid graph", _AGAIN)


def _data_files(file: OnnxFile) -> dict[Path, int]:
    """Each data file and how many bytes the graph uses of it."""
    ends: dict[Path, int] = {}
    for tensor in file.tensors.values():
        if tensor.file is not None:
            size = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + size)
    return ends


def _data(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    recorded = graph.record().get("data.sha256")
    for path, end in _data_files(file).items():
        found = sha256_file(path) if recorded else None
        if found != recorded:
            yield wrong(
                "data.swapped",
                f"{path.name} has SHA-256 {(found or '')[:12]}…, the graph records {recorded[:12]}…"
                if recorded
                else path.name,
                "the weights that were written with this graph",
                "Copy the .onnx file together with its .onnx_data file, or export again.",
            )
        elif recorded is None:
            yield note(
                "data.unseen",
                f"{path.name}: the graph records no hash of it",
                "its weights, which only their source can show",
                "pi-convert verify FILE --against SOURCE --scale S",
            )
        if path.stat().st_size > end + _ALIGNMENT:
            more = path.stat().st_size - end
            yield note("data.longer", f"{path.name} has {more:,} bytes that the graph does not use",
                       "a data file of this graph alone")  # fmt: skip


_ALIGNMENT = 1 << 20  # padding after the last weight that a writer may leave


def _tables(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    if not isinstance(graph.tables, Tables):
        yield note(
            "rope.tables.unseen",
            graph.tables.message,
            "cos and sin tables, by which the factor can be told",
            "pi-convert verify FILE --against SOURCE --scale S",
        )
        return
    tables = graph.tables
    square = tables.cos.astype(np.float64) ** 2 + tables.sin.astype(np.float64) ** 2
    off = float(np.abs(square - tables.amplitude() ** 2).max())
    if off > 4 * tolerance(tables):
        yield wrong("rope.tables.circle", f"cos^2 + sin^2 is off by up to {off:.2g}",
                    "the cosine and sine of the same angles", _AGAIN)  # fmt: skip


def _rope(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    """The tables against config.json and against the graph's own record."""
    tables, stated = graph.tables, export.stated_rope
    if not isinstance(tables, Tables):
        return
    if isinstance(stated, ConvertError):
        yield wrong("rope.config", stated.message, f"a RoPE in {CONFIG}", stated.hint)
        return
    if stated is None:
        yield note("rope.config.missing", f"no {CONFIG} beside the graph",
                   "the RoPE that clients and fine-tuning go by")  # fmt: skip
        return
    if not agree(tables, stated.inv_freq()):
        yield _other_factor(tables, stated)
    if tables.rows < stated.context:
        yield wrong(
            "rope.tables.short",
            f"the tables have {tables.rows:,} positions",
            f"{stated.context:,} ({CONFIG}'s context): running past the tables is an error",
            _AGAIN,
        )
    recorded = graph.recorded_rope()
    for key, value in (
        ("factor", stated.factor),
        ("theta", stated.theta),
        ("context", stated.context),
    ):
        if key in recorded and recorded[key] != value:
            yield wrong("rope.record", f"the graph records {key} {recorded[key]}",
                        f"{value:g} as {CONFIG} says", _AGAIN)  # fmt: skip


def _other_factor(tables: Tables, stated: RopeParameters) -> Finding:
    factor = factor_of(tables, replace(stated, factor=1.0).inv_freq())
    what = "other frequencies" if factor is None else f"factor {factor:.6g}"
    if factor is not None and abs(factor - 1) < 1e-3:
        what = "factor 1: the scaling was dropped"
    return wrong(
        "rope.tables.config",
        f"the tables are of {what}",
        f"{stated.kind}, factor {stated.factor:g}, theta {stated.theta:g}, as {CONFIG} says",
        _AGAIN,
    )


def _rope_right(export: OnnxExport, graph: Graph, file: OnnxFile) -> str:
    tables, stated = graph.tables, export.stated_rope
    if not isinstance(tables, Tables) or not isinstance(stated, RopeParameters):
        return ""
    return (
        f"tables of {tables.rows:,} positions are {stated.kind}, factor {stated.factor:g}, theta"
        f" {stated.theta:g}, as {CONFIG} says"
    )


def _padding(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    if file.nodes_of("GroupQueryAttention") and not file.nodes_of(*_PADDING_OPERATORS):
        yield note(
            "padding.left",
            "GroupQueryAttention takes a row's length, and the graph does not look where its"
            " padding is",
            "batches padded on the right: rows padded on the left are attended to wrongly, without"
            " an error",
            _AGAIN,
        )


def _interface(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    for name, shape in file.inputs.items():
        if name.startswith("past_key_values.") and not isinstance(shape[-1], int):
            yield note(
                "clients.head-dim",
                f"{name} has head_dim {shape[-1]!r}",
                "a number: transformers.js takes a name for 0 and fails",
                _AGAIN,
            )
            break
    if (sizes := _optimum_takes(export, file)) is not None:
        yield note("clients.optimum", f"optimum-onnx takes {sizes[0]} for the head size",
                   f"{sizes[1]}, as the cache has it: it cannot load this model")  # fmt: skip
    logits = next(iter(file.outputs.values()), ())
    if len(logits) == 3 and logits[1] == 1:
        yield note(
            "logits.last",
            "logits of the last token alone, for generation",
            "logits of every token, which scoring and `pi-convert verify` need",
            "For those export without --last-logits; the data file is the same.",
        )
    missing = [name for name in ("input_ids", "attention_mask") if name not in file.inputs]
    if missing:
        yield note("clients.inputs", f"no input {', '.join(missing)}",
                   "the inputs that optimum and transformers.js feed", _AGAIN)  # fmt: skip


def _optimum_takes(export: OnnxExport, file: OnnxFile) -> tuple[int, int] | None:
    """The head size that optimum-onnx 0.1 computes and the graph's own, where they differ."""
    hidden, heads = ((export.config or {}).get(k) for k in ("hidden_size", "num_attention_heads"))
    head_dim = next((s[-1] for n, s in file.inputs.items() if n.startswith("past_key_")), None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    return None if heads < 1 or hidden // heads == head_dim else (hidden // heads, head_dim)


def _data_name(export: OnnxExport, graph: Graph, file: OnnxFile) -> Iterator[Finding]:
    """transformers.js fetches ``<graph>_data``, and only where config.json announces it."""
    data = list(_data_files(file))
    if not data:
        return
    expected = f"{graph.path.name}_data"
    others = sorted(path.name for path in data if path.name != expected)
    if others:
        yield note("clients.data-name", f"weights in {', '.join(others)}",
                   f"{expected}, which transformers.js looks for")  # fmt: skip
    settings = (export.config or {}).get("transformers.js_config")
    known = settings.get("use_external_data_format") if isinstance(settings, Mapping) else None
    if export.config is not None and not (isinstance(known, Mapping) and graph.path.name in known):
        yield note(
            "clients.transformers-js",
            f"{CONFIG} does not announce {expected}",
            "transformers.js_config.use_external_data_format with the graph's name, which browsers"
            " need",
            _AGAIN,
        )


def _folder(export: OnnxExport) -> Iterator[Finding]:
    """The files beside the graphs."""
    if not (export.folder / _TOKENIZER).is_file():
        yield note("clients.tokenizer", f"no {_TOKENIZER} in {export.folder.name or '.'}",
                   "the tokenizer that optimum and transformers.js load")  # fmt: skip
    if export.genai is not None:
        yield from _genai(export, export.genai)


def _genai(export: OnnxExport, genai: Mapping[str, object]) -> Iterator[Finding]:
    model = genai.get("model")
    decoder = model.get("decoder") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(decoder, Mapping):
        yield wrong(
            "clients.genai", f"{GENAI} has no model.decoder", "what onnxruntime-genai reads"
        )
        return
    stated = export.stated_rope
    context = model.get("context_length")
    if isinstance(stated, RopeParameters) and context != stated.context:
        yield wrong("clients.genai.context", f"{GENAI}: context_length {context}",
                    f"{stated.context} (L'), where onnxruntime-genai stops", _AGAIN)  # fmt: skip
    name = decoder.get("filename")
    graph = next((g for g in export.graphs if g.path == export.folder / str(name)), None)
    if not isinstance(name, str) or not (export.folder / name).is_file():
        yield wrong("clients.genai.file", f"{GENAI}: decoder.filename {name!r}",
                    "a graph of this folder", _AGAIN)  # fmt: skip
    elif graph is not None and graph.file is not None:
        yield from _genai_inputs(decoder, graph.file)


def _genai_inputs(decoder: Mapping[str, object], file: OnnxFile) -> Iterator[Finding]:
    for kind, there in (("inputs", tuple(file.inputs)), ("outputs", tuple(file.outputs))):
        names = decoder.get(kind)
        for key, name in (names if isinstance(names, Mapping) else {}).items():
            if str(name).replace("%d", "0") not in there:
                yield wrong("clients.genai.names", f"{GENAI}: {key} is {name!r}",
                            f"one of the graph's {kind}", _AGAIN)  # fmt: skip
    shape = next((s for n, s in file.inputs.items() if n.startswith("past_key_values.")), None)
    if shape is None:
        return
    for key, value in (("num_key_value_heads", shape[1]), ("head_size", shape[3])):
        if isinstance(value, int) and decoder.get(key) != value:
            yield wrong("clients.genai.sizes", f"{GENAI}: {key} {decoder.get(key)}",
                        f"{value}, as the graph's cache has it", _AGAIN)  # fmt: skip


def _disagreement(export: OnnxExport) -> Iterator[Finding]:
    """Graphs of one folder have to be one model."""
    readable = [g for g in export.graphs if isinstance(g.tables, Tables)]
    for graph in readable[1:]:
        first = readable[0]
        a, b = first.tables, graph.tables
        if not isinstance(a, Tables) or not isinstance(b, Tables):
            continue
        coarser = "float16" if "float16" in (a.cos.dtype.name, b.cos.dtype.name) else "float32"
        rows = min(a.rows, b.rows)
        limit = 2 * {"float32": 1.5e-7, "float16": 5e-4}[coarser]
        apart = a.cos.shape[1] != b.cos.shape[1] or a.rows != b.rows
        if apart or np.abs(a.cos[:rows].astype(np.float32) - b.cos[:rows]).max() > limit:
            found = f"{graph.path.name} rotates otherwise than {first.path.name}"
            yield wrong("folder.one-model", found, "one RoPE in all graphs of a folder", _AGAIN)


def _nothing(export: OnnxExport, graph: Graph, file: OnnxFile) -> str:
    return ""


RULES: tuple[OnnxRule, ...] = (
    OnnxRule("graph.valid", _checker, lambda e, g, f: "onnx's checker accepts the graph"),
    OnnxRule(
        "data.whole", _data, lambda e, g, f: "the weights are those that were written with it"
    ),
    OnnxRule("rope.tables", _tables, lambda e, g, f: "cos and sin are of the same angles"),
    OnnxRule("rope.scaling", _rope, _rope_right),
    OnnxRule("padding", _padding, lambda e, g, f: "padding is looked for"),
    OnnxRule("clients.interface", _interface, lambda e, g, f: "inputs that every client feeds"),
    OnnxRule("clients.data", _data_name, _nothing),
)
