"""What a model is: the value behind ``inspect``, for checkpoints and for any GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.gguf import GgufFile, read_gguf_file
from converters.containers.strict_json import parse_json_object
from converters.encodings import Encoding
from converters.errors import ConvertError
from converters.rope import Evidence
from converters.rope import gguf as spelling
from converters.rope.contexts import unscaled_context
from converters.rope.gguf import RECORD_PREFIX
from converters.sources import checkpoint_of_gguf, open_checkpoint
from converters.sources.huggingface import FINETUNE_RECORD
from converters.tokenizers import Vocabulary
from pi_convert.audit import llamacpp
from pi_convert.audit import tokenizer_keys as keys
from pi_convert.audit.header import Header, short
from pi_convert.audit.stripped import unrecorded_scaling
from pi_convert.audit.tokenizer_rules import length

_CACHE_ELEMENT_BYTES = 2  # float16, llama.cpp's default
_SPECIAL = ("bos", "eos", "unknown", "padding")
_KINDS: Mapping[object, str] = {
    **dict.fromkeys(llamacpp.BPE_MODELS, "BPE"),
    llamacpp.SPM_MODEL: "SentencePiece",
}


@dataclass(frozen=True, slots=True)
class RopeSummary:
    """RoPE as it acts. ``original_context`` is L, ``context`` L', in tokens; None: not told."""

    kind: str
    factor: float  # as applied
    theta: float
    rotary_dim: int | None
    original_context: int | None
    context: int | None
    attention_factor: float
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """All tensors of one storage type."""

    encoding: str
    count: int
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TokenizerSummary:
    """The tokenizer; None where the source does not say."""

    kind: str
    pre: str | None
    size: int
    special_ids: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Description:
    """A model without its weights. ``kv_cache_bytes`` is by context in tokens."""

    label: str
    container: str  # folder, gguf or hub
    architecture: str
    name: str | None
    license: str | None
    size_bytes: int  # of all tensors as stored
    file_bytes: int | None
    rope: RopeSummary | None
    tensors: tuple[TensorGroup, ...]
    tokenizer: TokenizerSummary | None
    kv_cache_bytes: Mapping[int, int]
    sliding_window: int | None
    record: Mapping[str, object]  # what our own files say of where they came from
    notes: tuple[str, ...] = ()
    cache_type: str = "float16"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(group.elements for group in self.tensors)


def describe(
    reference: str, *, revision: str | None = None, original_context: int | None = None
) -> Description:
    """The description of a folder, a hub id or any GGUF.

    A GGUF whose architecture or RoPE cannot be exported is described from its keys, with the reason
    as a note. Raises ``SourceError`` for what cannot be read at all.
    """
    path = Path(reference)
    if path.is_file() and path.suffix.lower() == ".gguf" and revision is None:
        return describe_gguf(read_gguf_file(path), original_context=original_context)
    return describe_checkpoint(
        open_checkpoint(reference, revision=revision, original_context=original_context)
    )


def describe_checkpoint(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint that can be exported."""
    rope, hparams, vocabulary = checkpoint.rope, checkpoint.hparams, checkpoint.vocabulary
    tensors = _groups((t.encoding, t.elements, t.size_bytes) for t in checkpoint.tensors.values())
    note = unrecorded_scaling(checkpoint) or _tuned_otherwise(checkpoint)
    return Description(
        label=checkpoint.origin.label,
        container=checkpoint.origin.kind,
        architecture=checkpoint.architecture.name,
        name=checkpoint.card.name,
        license=checkpoint.card.license,
        size_bytes=sum(group.size_bytes for group in tensors),
        file_bytes=None,
        rope=RopeSummary(
            kind=rope.kind,
            factor=rope.factor,
            theta=rope.theta,
            rotary_dim=rope.rotary_dim,
            original_context=rope.original_context,
            context=rope.context,
            attention_factor=rope.attention_factor,
            evidence=rope.evidence,
        ),
        tensors=tensors,
        tokenizer=tokenizer_summary(vocabulary),
        kv_cache_bytes={
            context: hparams.kv_cache_bytes(context, _CACHE_ELEMENT_BYTES)
            for context in (rope.original_context, rope.context)
        },
        sliding_window=hparams.sliding_window,
        record=_finetuning(checkpoint),
        notes=(note,) if note else (),
    )


def tokenizer_summary(vocabulary: Vocabulary) -> TokenizerSummary:
    """A vocabulary without its tokens."""
    return TokenizerSummary(
        kind=vocabulary.kind.name,
        pre=vocabulary.pre,
        size=vocabulary.size,
        special_ids=dict(vocabulary.special_ids),
        add_bos=vocabulary.add_bos,
        add_eos=vocabulary.add_eos,
        has_chat_template=bool(vocabulary.chat_template),
    )


def _tuned_otherwise(checkpoint: Checkpoint) -> str | None:
    """What is said where the weights were tuned with another factor than the RoPE has."""
    factor = _finetuning(checkpoint).get("finetune.factor")
    if not isinstance(factor, int | float) or factor == checkpoint.rope.factor:
        return None
    return (
        f"the weights were tuned with factor {factor:g}, as the record says; the RoPE has"
        f" {checkpoint.rope.factor:g} and was changed since, without tuning"
    )


def _finetuning(checkpoint: Checkpoint) -> dict[str, object]:
    """What ``pi-convert finetune`` recorded beside the weights, flat; {} for other checkpoints."""
    data = checkpoint.side_files.get(FINETUNE_RECORD)
    if data is None:
        return {}
    record = parse_json_object(data, FINETUNE_RECORD)
    recipe = record.get("recipe")
    flat: dict[str, object] = {
        f"finetune.{k}": v for k, v in record.items() if isinstance(v, int | float | str)
    }
    if isinstance(recipe, Mapping):
        flat |= {f"finetune.recipe.{key}": value for key, value in recipe.items()}
    return flat


def describe_gguf(file: GgufFile, *, original_context: int | None = None) -> Description:
    """The description of a GGUF: as a checkpoint where it is one, else from its keys alone."""
    generic = _from_keys(file)
    try:
        checkpoint = checkpoint_of_gguf(file, original_context=original_context)
    except ConvertError as error:
        return replace(
            generic, notes=(f"described from its keys only; as a source: {error.message}",)
        )
    described = describe_checkpoint(checkpoint)
    return replace(
        described,
        tensors=generic.tensors,
        size_bytes=generic.size_bytes,
        file_bytes=generic.file_bytes,
        record=generic.record,
        sliding_window=generic.sliding_window,
    )


def _from_keys(file: GgufFile) -> Description:
    header = Header.of(file)
    general = file.keys
    rope = _rope_of_keys(header)
    contexts = {c for c in (rope.original_context, rope.context) if c} if rope else set()
    tensors = _groups((t.encoding, prod(t.shape), t.size_bytes) for t in file.tensors.values())
    return Description(
        label=file.path.name,
        container="gguf",
        architecture=header.architecture,
        name=_text(general.get("general.name")),
        license=_text(general.get("general.license")),
        size_bytes=sum(group.size_bytes for group in tensors),
        file_bytes=file.size_bytes,
        rope=rope,
        tensors=tensors,
        tokenizer=_tokenizer_of_keys(general),
        kv_cache_bytes=_cache_of_keys(header, sorted(contexts)),
        sliding_window=header.whole(llamacpp.WINDOW_KEY),
        record={
            key: value
            for key, value in general.items()
            if key.startswith(RECORD_PREFIX) and not isinstance(value, list | np.ndarray)
        },
    )


def _rope_of_keys(header: Header) -> RopeSummary | None:
    """RoPE as llama.cpp applies it; None for an architecture without."""
    if header.architecture in llamacpp.WITHOUT_ROPE:
        return None
    factor = header.applied_factor
    context, original = header.whole(spelling.CONTEXT_KEY), header.whole(spelling.ORIGINAL_KEY)
    theta = header.number(spelling.THETA_KEY)
    evidence = [
        Evidence("theta", header.full(spelling.THETA_KEY))
        if theta
        else Evidence("theta", "not stated: llama.cpp takes 10000", assumed=True)
    ]
    if original is not None:
        evidence.append(Evidence("L", header.full(spelling.ORIGINAL_KEY)))
    elif context is not None and factor != 1.0:
        original = unscaled_context(context, factor)
        sentence = f"{header.full(spelling.CONTEXT_KEY)} / {factor:g}, assuming that it is L'"
        evidence.append(Evidence("L", sentence, assumed=True))
    else:
        original = context
        evidence.append(Evidence("L", header.full(spelling.CONTEXT_KEY)))
    evidence.append(Evidence("L'", header.full(spelling.CONTEXT_KEY)))
    return RopeSummary(
        kind=_kind(header, factor),
        factor=factor,
        theta=short(theta) if theta else spelling.LLAMA_CPP_DEFAULT_THETA,
        rotary_dim=header.whole(spelling.DIMENSION_KEY) or header.head_dim,
        original_context=original,
        context=context,
        attention_factor=short(header.number(spelling.ATTENTION_KEY) or 1.0),
        evidence=tuple(evidence),
    )


def _kind(header: Header, factor: float) -> str:
    kind = header.scaling_type if factor != 1.0 else "default"
    tensors = [
        name
        for name, present in (
            ("longrope tensors", header.has_longrope_tensors),
            ("rope_freqs tensor", header.has_factor_tensor),
        )
        if present
    ]
    return " with ".join([kind, *tensors])


def _tokenizer_of_keys(general: Mapping[str, object]) -> TokenizerSummary | None:
    model = general.get(keys.MODEL)
    if not isinstance(model, str):
        return None
    ids = {
        name: value for name in _SPECIAL if isinstance(value := general.get(keys.id_key(name)), int)
    }
    return TokenizerSummary(
        kind=_KINDS.get(model, model),
        pre=_text(general.get(keys.PRE)),
        size=length(general.get(keys.TOKENS)) or 0,
        special_ids=ids,
        add_bos=_flag(general.get(keys.ADD_BOS)),
        add_eos=_flag(general.get(keys.ADD_EOS)),
        has_chat_template=bool(_text(general.get(keys.TEMPLATE))),
    )


def _cache_of_keys(header: Header, contexts: Iterable[int]) -> dict[int, int]:
    """By context; {} where the sizes are not stated. Windows and shared caches make it less."""
    layers = header.whole("block_count")
    head_dim = header.head_dim
    heads = header.keys.get("attention.head_count_kv", header.keys.get("attention.head_count"))
    if layers is None or head_dim is None or not isinstance(heads, int | np.ndarray):
        return {}
    all_heads = int(np.sum(heads)) if isinstance(heads, np.ndarray) else heads * layers
    value_dim = header.whole("attention.value_length") or head_dim
    token_bytes = all_heads * (head_dim + value_dim) * _CACHE_ELEMENT_BYTES
    return {context: token_bytes * context for context in contexts}


def _groups(tensors: Iterable[tuple[Encoding, int, int]]) -> tuple[TensorGroup, ...]:
    """Tensors by type, the type with most bytes first."""
    groups: dict[str, TensorGroup] = {}
    for encoding, elements, size_bytes in tensors:
        old = groups.get(encoding.name, TensorGroup(encoding.name, 0, 0, 0))
        groups[encoding.name] = TensorGroup(
            encoding.name, old.count + 1, old.elements + elements, old.size_bytes + size_bytes
        )
    return tuple(sorted(groups.values(), key=lambda g: (-g.size_bytes, g.encoding)))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
