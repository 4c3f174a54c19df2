"""A GGUF file as a checkpoint: tensors under Hugging Face's names and in its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from converters.architectures import Architecture, HParams, architecture_named
from converters.architectures.hparams import read_gguf_hparams
from converters.architectures.spec import UNTIED, check_tensors
from converters.checkpoint import Checkpoint, Origin
from converters.containers.gguf import GgufFile, read_gguf_file
from converters.errors import TensorError, TokenizerError, UnsupportedError, shown
from converters.rope.gguf import DIVISORS_TENSOR, read_gguf
from converters.rope.parameters import FloatArray, shortest_float32
from converters.sources.card import card_of_gguf
from converters.tensor import Tensor
from converters.tokenizers import Vocabulary, vocabulary_from_gguf
from converters.transforms import deinterleave_rope

_EMBEDDING = "token_embd.weight"
_SPLIT_KEY = "split.count"
# Integer tensors and ggml's own intermediates hold no weights.
_NOT_WEIGHTS = frozenset({"i8", "i16", "i32", "i64", "q8_1", "q8_k"})


def open_gguf(path: Path, *, original_context: int | None = None) -> Checkpoint:
    """The checkpoint in the GGUF file at ``path``; see ``checkpoint_of_gguf``."""
    return checkpoint_of_gguf(read_gguf_file(path), original_context=original_context)


def checkpoint_of_gguf(file: GgufFile, *, original_context: int | None = None) -> Checkpoint:
    """The checkpoint in an open GGUF; quantized tensors stay as they are stored.

    ``original_context`` is L in tokens where the caller knows it (``--original-context``). Raises
    ``SourceError`` or one of its kinds for a file that is not whole or contradicts itself, and
    ``UnsupportedError`` for one that cannot be exported right.
    """
    where = str(file.path)
    _refuse_split(file)
    architecture = architecture_named(file.architecture, where)
    groups = architecture.groups_present(file.tensors, gguf=True)
    hparams = _hparams(file, architecture, groups)
    tensors = _tensors(file, architecture, hparams, groups)
    rope = read_gguf(
        file.scoped_keys(),
        _divisors(file),
        rotary_dim=hparams.head_dim,
        original_context=original_context,
        where=where,
        file_keys=file.keys,
    )
    return Checkpoint(
        origin=Origin(label=file.path.name, kind="gguf", path=file.path),
        architecture=architecture,
        hparams=hparams,
        rope=rope,
        tensors=tensors,
        vocabulary=_vocabulary(file, hparams),
        card=card_of_gguf(file.keys, file.path),
        groups=groups,
    )


def _refuse_split(file: GgufFile) -> None:
    count = file.keys.get(_SPLIT_KEY, 1)
    if count not in (0, 1):
        raise UnsupportedError(
            f"{file.path}: one of {count} parts of a split GGUF, which is not supported yet",
            hint="Join them first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )


def _hparams(file: GgufFile, architecture: Architecture, groups: frozenset[str]) -> HParams:
    where = str(file.path)
    if _EMBEDDING not in file.tensors:
        raise TensorError(f"{where}: {_EMBEDDING} is missing", hint="The file holds no model.")
    hparams = read_gguf_hparams(
        file.scoped_keys(),
        vocab_size=file.tensors[_EMBEDDING].shape[0],
        tied_embeddings=UNTIED not in groups,
        where=where,
    )
    rotary = file.scoped_keys().get("rope.dimension_count", hparams.head_dim)
    if not isinstance(rotary, int) or rotary != hparams.head_dim:
        raise UnsupportedError(
            f"{where}: rope.dimension_count is {shown(rotary)} of a head of {hparams.head_dim}",
            hint=f"{architecture.name} is supported with RoPE over the whole head only.",
        )
    return dataclasses.replace(hparams, norm_eps=shortest_float32(hparams.norm_eps))


def _tensors(
    file: GgufFile, architecture: Architecture, hparams: HParams, groups: frozenset[str]
) -> Mapping[str, Tensor]:
    where = str(file.path)
    specs = list(architecture.expected_tensors(hparams, groups))
    found = {name: t.shape for name, t in file.tensors.items() if name != DIVISORS_TENSOR}
    check_tensors({gguf: shape for _, gguf, shape, _ in specs}, found, where)
    odd = [
        f"{name} {tensor.encoding.name}"
        for name, tensor in file.tensors.items()
        if tensor.encoding.name in _NOT_WEIGHTS
    ]
    if odd:
        raise UnsupportedError(
            f"{where}: tensors that hold no weights: {', '.join(odd[:8])}",
            hint="Weights are floats or one of ggml's quantized types.",
        )
    return {
        name: _as_huggingface(file.tensor(gguf), name, architecture.rope_heads(spec, hparams))
        for name, gguf, _, spec in specs
    }


def _as_huggingface(tensor: Tensor, name: str, rope_heads: int) -> Tensor:
    renamed = dataclasses.replace(tensor, name=name)
    return deinterleave_rope(renamed, rope_heads) if rope_heads else renamed


def _vocabulary(file: GgufFile, hparams: HParams) -> Vocabulary:
    vocabulary = vocabulary_from_gguf(file.keys, str(file.path))
    if vocabulary.size != hparams.vocab_size:
        raise TokenizerError(
            f"{file.path}: {vocabulary.size} tokens for an embedding of {hparams.vocab_size} rows",
            hint="llama.cpp cannot load it; convert the model again.",
        )
    return vocabulary


def _divisors(file: GgufFile) -> FloatArray | None:
    if DIVISORS_TENSOR not in file.tensors:
        return None
    tensor = file.tensor(DIVISORS_TENSOR)
    return tensor.read_f32(0, tensor.rows).reshape(-1)
