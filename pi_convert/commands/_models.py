"""The models that the measuring commands name, opened for whichever runtime runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pi_convert.commands._measuring import RunOptions

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.containers.gguf import GgufFile
    from converters.containers.onnx import OnnxFile
    from converters.progress import Progress
    from converters.tokenizers import Vocabulary
    from pi_convert.evaluate.models import Model, Sizes
    from pi_convert.runtimes.base import Runtime

_TORCH_BYTES = 4  # float32, weights and cache
_CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_F16_BYTES = 2  # what descriptions count a cache in
_ORT_CACHES = 2  # the past and the present stand beside each other
_ORT_ELEMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Opening:
    """How a reference becomes a model."""

    options: RunOptions
    scale: float | None = None
    runtime: str | None = None
    revision: str | None = None
    original_context: int | None = None


def open_models(named: Sequence[tuple[str | None, Opening]]) -> tuple[Model, ...]:
    """The models named, None the default one; each is announced on stderr.

    Raises ``UsageError`` where a scale was asked for and none of them is run by torch.
    """
    from pi_convert.defaults import resolve_model
    from pi_convert.evaluate.statistics import limit_threads

    limit_threads(named[0][1].options.threads)
    models, references, runtimes_of = [], [], {}
    for reference, opening in named:
        resolved = resolve_model(reference)
        click.echo(resolved.announcement, err=True)
        models.append(open_model(resolved.reference, opening))
        references.append(resolved.reference)
        if opening.runtime is not None:
            runtimes_of[resolved.reference] = opening.runtime
    _require_used(named[0][1].options, models, runtimes_of)
    scaled = any(opening.scale is not None for _, opening in named)
    if scaled and all(model.runtime != "torch" for model in models):
        raise click.UsageError(
            "--scale is for models that torch runs; GGUF and ONNX files have their own factor."
            " For a GGUF, --runtime pytorch takes its weights."
        )
    return _told_apart(models, references)


def _told_apart(models: Sequence[Model], references: Sequence[str]) -> tuple[Model, ...]:
    """The models; those that share a name get their references behind their labels."""
    given: dict[str, set[str]] = {}
    for model, reference in zip(models, references, strict=True):
        given.setdefault(model.name, set()).add(reference)
    return tuple(
        model if len(given[model.name]) == 1 else replace(model, label=f"{model.label} ({name})")
        for model, name in zip(models, references, strict=True)
    )


def record(
    models: Sequence[Model], opening: Opening, settings: Mapping[str, object]
) -> dict[str, str]:
    """What models ran on, how they were opened, and ``settings``: what repeats a measurement."""
    from pi_convert.report.provenance import environment

    runtimes = {model.runtime for model in models}
    opened = {
        "scale": opening.scale,
        "revision": opening.revision,
        "original_context": opening.original_context,
    }
    return environment(runtimes, {**opening.options.settings(runtimes), **opened, **settings})


def _require_used(
    options: RunOptions, models: Sequence[Model], runtimes_of: Mapping[str, str]
) -> None:
    """Raises ``UsageError`` for an option that touches none of the models."""
    if options.given and all(model.runtime != "llama.cpp" for model in models):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in options.given)
        verb = "are" if options.given[1:] else "is"
        raise click.UsageError(f"{flags} {verb} of llama.cpp, which runs none of these models.")
    if runtimes_of and not any(name.lower().endswith(".gguf") for name in runtimes_of):
        raise click.UsageError("a runtime is chosen for GGUF files, and none of these is one.")


def require_contexts(
    models: Sequence[Model], context: int, *, extrapolate: bool, at_once: bool = False
) -> None:
    """Refuses a context that a model or this machine's free memory does not hold.

    ``at_once``: all models are in memory together.
    """
    from pi_convert.evaluate.models import require_context, require_memory
    from pi_convert.report.runlines import available_memory_bytes

    free = available_memory_bytes()
    for model in models:
        require_context(model, context, free_bytes=free, beyond=extrapolate)
    if at_once:
        require_memory(models, context, free_bytes=free)


def open_model(reference: str, opening: Opening) -> Model:
    """The model that ``reference`` names, without its weights.

    A GGUF file goes to llama.cpp unless the runtime says otherwise, an ONNX file or folder to ONNX
    Runtime, everything else to torch, which alone can apply a scale. Raises ``SourceError`` for
    what cannot be read.
    """
    from converters.containers.onnx import graph_files

    path = Path(reference)
    if path.is_file() and path.suffix.lower() == ".gguf" and opening.runtime != "pytorch":
        return _in_llamacpp(path, opening)
    graphs = [graph for graph in graph_files(path) if graph.suffix == ".onnx"]
    if graphs:
        return _in_onnxruntime(_one_graph(path, graphs), opening)
    checkpoint = open_scaled(reference, opening)
    return torch_model(checkpoint, opening.options)


def open_scaled(reference: str, opening: Opening) -> Checkpoint:
    """The checkpoint with ``opening.scale`` applied."""
    from converters.sources import open_checkpoint
    from pi_convert.commands._scale import (
        note_second_factor,
        require_known_factor,
        require_no_second_factor,
    )

    checkpoint = open_checkpoint(
        reference, revision=opening.revision, original_context=opening.original_context
    )
    require_known_factor(opening.scale, checkpoint)
    require_no_second_factor(opening.scale, checkpoint)
    note_second_factor(opening.scale, checkpoint)
    return checkpoint if opening.scale is None else checkpoint.interpolate(opening.scale)


def _one_graph(path: Path, graphs: Sequence[Path]) -> Path:
    from converters.errors import SourceError

    if graphs[1:]:
        names = ", ".join(str(graph) for graph in graphs)
        raise SourceError(f"{path} holds several graphs", hint=f"Give one of them: {names}.")
    return graphs[0]


def torch_model(checkpoint: Checkpoint, options: RunOptions) -> Model:
    """A checkpoint in torch, float32."""
    from pi_convert.evaluate.models import Model, Sizes

    sizes, rope = checkpoint.hparams, checkpoint.rope

    def load(tell: Progress) -> Runtime:
        from pi_convert.runtimes.pytorch import TorchModel, limit_threads

        if options.threads is not None:
            limit_threads(options.threads)
        return TorchModel(checkpoint, device=options.device, progress=tell)

    encoder = _Encoder(checkpoint.vocabulary)
    scaled = "" if rope.factor == 1.0 else f", factor {rope.factor:g}"
    return Model(
        label=f"{checkpoint.origin.label}{scaled}",
        runtime="torch",
        original_context=rope.original_context,
        context=rope.context,
        held_context=None,
        encode=encoder.encode,
        bos=encoder.bos,
        sizes=Sizes(
            parameters=sum(t.elements for n, t in checkpoint.tensors.items() if ".layers." in n),
            attention_width=sizes.layers * sizes.query_size,
            weight_bytes=_TORCH_BYTES * checkpoint.parameters,
            cache_bytes=sizes.kv_cache_bytes(1, _TORCH_BYTES),
        ),
        load=load,
    )


class _Encoder:
    """A vocabulary in the library that reads it, and the BOS it puts before a prompt."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from converters.tokenizers.tokenizer_json import adds
        from pi_convert.verify.tokenizer_reference import reference_encoder

        self._reference = reference_encoder(vocabulary)
        ids = vocabulary.special_ids
        self.bos = (ids["bos"],) if adds(vocabulary, "bos") and "bos" in ids else ()

    def encode(self, text: str) -> list[int]:
        return self._reference.encode(text, add_special=False, parse_special=False)


def _in_llamacpp(path: Path, opening: Opening) -> Model:
    from converters.containers.gguf import read_gguf_file
    from converters.errors import SourceError
    from pi_convert.audit.description import describe_gguf
    from pi_convert.evaluate.models import Model
    from pi_convert.runtimes.llamacpp import (
        LlamaCppModel,
        LlamaCppOptions,
        LlamaCppTokenizer,
        load_in_child,
        require_device,
    )

    file, options = read_gguf_file(path), opening.options
    settings = LlamaCppOptions(
        threads=options.threads,
        ubatch=options.ubatch,
        flash_attention=options.flash_attention,
        kv_cache_type=options.kv_cache_type,
        device=options.device,
        n_gpu_layers=options.n_gpu_layers,
    )
    require_device(settings)
    if (problem := load_in_child(path)) is not None:  # llama.cpp may abort the process it is in
        raise SourceError(
            f"{path}: llama.cpp cannot load it: {problem}",
            hint="`pi-convert check` tells what is wrong with the file.",
        )
    rope = describe_gguf(file, original_context=opening.original_context).rope
    tokenizer = LlamaCppTokenizer(path)  # open for as long as the process lives

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    return Model(
        label=path.name,
        runtime="llama.cpp",
        original_context=rope.original_context if rope else None,
        context=rope.context if rope else None,
        held_context=None,
        encode=encode,
        bos=(tokenizer.special_ids["bos"],) if tokenizer.add_bos else (),
        sizes=_gguf_sizes(file, options.kv_cache_type),
        load=lambda _: LlamaCppModel(path, file.architecture, settings),
    )


def _gguf_sizes(file: GgufFile, cache_type: str) -> Sizes:
    """From the keys; what they do not say counts as nothing."""
    from pi_convert.audit.description import describe_gguf
    from pi_convert.evaluate.models import Sizes

    caches = describe_gguf(file).kv_cache_bytes
    cache = next((size / tokens for tokens, size in caches.items()), 0.0)
    keys = file.scoped_keys()
    layers, heads, head = (
        _whole(keys, key) for key in ("block_count", "attention.head_count", "attention.key_length")
    )
    head = head or _whole(keys, "embedding_length") // max(1, heads)
    return Sizes(
        parameters=sum(prod(t.shape) for n, t in file.tensors.items() if n.startswith("blk.")),
        attention_width=layers * heads * head,
        weight_bytes=file.size_bytes,
        cache_bytes=int(cache / _F16_BYTES * _CACHE_BYTES[cache_type]),
    )


def _whole(keys: Mapping[str, object], key: str) -> int:
    value = keys.get(key)
    return value if isinstance(value, int) else 0


def _in_onnxruntime(path: Path, opening: Opening) -> Model:
    from converters.containers.onnx import companion_folder, read_onnx_file
    from pi_convert.evaluate.models import Model
    from pi_convert.runtimes.ort import OrtModel, OrtOptions, require_provider

    file, options = read_onnx_file(path), opening.options
    settings = OrtOptions(device=options.device, threads=options.threads)
    require_provider(settings)
    config, encoder = _beside(path)
    record = json.loads(file.properties.get("pi_convert.rope", "{}"))
    context = record.get("context", config.get("max_position_embeddings"))
    original = opening.original_context or record.get("original_context", context)
    return Model(
        label=f"{companion_folder(path.resolve()).name}/{path.name}",
        runtime="ONNX Runtime",
        original_context=original,
        context=context,
        held_context=_table_rows(file),
        encode=encoder.encode,
        bos=encoder.bos,
        sizes=_onnx_sizes(file),
        load=lambda _: OrtModel(file, settings, tables=None),
    )


def _beside(path: Path) -> tuple[Mapping[str, object], _Encoder]:
    """The config and the tokenizer that lie with a graph."""
    from converters.containers.onnx import companion_folder
    from converters.containers.strict_json import read_json_object
    from converters.errors import SourceError
    from converters.tokenizers.huggingface import read_tokenizer

    folder = companion_folder(path.resolve())
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{path}: there is no config.json in {folder}",
            hint="Keep the graph in the folder that was exported, with config.json and tokenizer.",
        )
    config = read_json_object(folder / "config.json")
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        raise SourceError(
            f"{folder / 'config.json'}: vocab_size is {rows!r}",
            hint="Expected the number of tokens; export the folder again.",
        )
    return config, _Encoder(read_tokenizer(folder, rows, config=config))


def _table_rows(file: OnnxFile) -> int | None:
    """Positions of the cos and sin tables; None where a graph computes them."""
    from converters.errors import SourceError
    from pi_convert.runtimes.onnx_tables import stored_tables

    try:
        return stored_tables(file).rows
    except SourceError:
        return None


def _onnx_sizes(file: OnnxFile) -> Sizes:
    from pi_convert.evaluate.models import Sizes

    heads = [
        int(node.attributes.get("num_heads", 0))  # type: ignore[call-overload]
        for node in file.nodes_of("GroupQueryAttention")
    ]
    caches = [shape for name, shape in file.inputs.items() if name.startswith("past_")]
    elements = sum(s[1] * s[3] for s in caches if isinstance(s[1], int) and isinstance(s[3], int))
    head = next((s[3] for s in caches if isinstance(s[3], int)), 0)
    weights = [t for n, t in file.tensors.items() if ".layers." in n and len(t.shape) > 1]
    return Sizes(
        parameters=sum(prod(t.shape) for t in weights),
        attention_width=sum(heads) * head,
        weight_bytes=file.size_bytes,
        cache_bytes=_ORT_CACHES * _ORT_ELEMENT_BYTES * elements,
    )
