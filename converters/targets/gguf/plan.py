"""What will be written, before any work is done: names, types, exact sizes; and every refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Checkpoint
from converters.containers.gguf import read_gguf_file
from converters.containers.gguf_header import Layout, encode_key, lay_out
from converters.encodings import F32, Encoding
from converters.errors import TokenizerError, UnsupportedError
from converters.ggml import load_ggml
from converters.rope.gguf import DIVISORS_TENSOR
from converters.targets.gguf.metadata import (
    FILE_TYPE_KEY,
    KEY_TYPES,
    SOURCE_HASH_KEY,
    file_keys,
)
from converters.targets.gguf.types import FILE_TYPES, Types, skeleton, skeleton_keys
from converters.tensor import Tensor

DEFAULT_QUANTIZE = "q4_k_m"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the file and where it comes from; ``rope_heads`` > 0: rows are interleaved."""

    name: str
    source: Tensor
    rope_heads: int = 0
    is_weight: bool = True  # False: made from the RoPE, no part of the source's hash


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """One file to write. ``fallbacks`` are tensors whose rows fit no block of their type."""

    quantize: str
    file_name: str
    size_bytes: int
    tensor_types: Mapping[str, Encoding]  # by GGUF name, in file order
    fallbacks: tuple[str, ...]
    keys: Mapping[str, bytes]  # encoded
    outputs: tuple[OutputTensor, ...]

    @property
    def type_counts(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(encoding.name for encoding in self.tensor_types.values()))

    def layout(self, source_hash: str | None = None) -> Layout:
        """The file's header and where its tensors lie; the size does not depend on the hash."""
        keys = dict(self.keys)
        if source_hash is not None:
            keys[SOURCE_HASH_KEY] = encode_key(SOURCE_HASH_KEY, source_hash)
        return _layout(keys, self.outputs, self.tensor_types)


@dataclass(frozen=True, slots=True)
class QuantizationOption:
    """A type this model can be written in; sizes are exact, of the whole file."""

    name: str
    bits_per_weight: float
    needs_importance_matrix: bool
    size_bytes: int
    tensor_types: Mapping[str, int]  # how many tensors of each type


def plan_gguf(
    checkpoint: Checkpoint, quantize: Sequence[str], *, allow_requantize: bool = False
) -> tuple[GgufPlan, ...]:
    """One plan a type, in the order given; without any, what suits the source.

    A float source defaults to ``DEFAULT_QUANTIZE``; a quantized one keeps its tensors as they are.
    Raises ``UnsupportedError`` for what llama.cpp could not hold right: an unknown type, one that
    needs an importance matrix, quantizing quantized weights without ``allow_requantize``, an
    attention window that would be ignored, llama3 RoPE where it would be lost.
    """
    _refuse(checkpoint)
    names = tuple(dict.fromkeys(name.lower() for name in quantize))
    outputs = output_tensors(checkpoint)
    quantized = sorted({o.source.encoding.name for o in outputs if not o.source.encoding.is_float})
    if not names and quantized:
        return (_plan_kept(checkpoint, outputs),)
    if quantized and not allow_requantize:
        raise UnsupportedError(
            f"{checkpoint.origin.label} is quantized already ({', '.join(quantized)})",
            hint="Leave --quantize out to keep its tensors as they are, or give --allow-requantize"
            " to lose precision twice.",
        )
    encoded = _encoded_keys(checkpoint)
    plans = []
    for types in _ask(checkpoint, outputs, names or (DEFAULT_QUANTIZE,)):
        if types.needs_importance_matrix:
            raise UnsupportedError(
                f"{types.name} needs an importance matrix for this model, which is not supported"
                " yet",
                hint="`pi-convert quants` lists the types that need none, such as q4_k_m.",
            )
        file_type = encode_key(FILE_TYPE_KEY, FILE_TYPES[types.name])
        plans.append(_plan(checkpoint, outputs, {**encoded, FILE_TYPE_KEY: file_type}, types))
    return tuple(plans)


def quantization_types(checkpoint: Checkpoint) -> tuple[QuantizationOption, ...]:
    """Every type that the installed llama.cpp can make of this model, smallest first."""
    _refuse(checkpoint)
    outputs = output_tensors(checkpoint)
    encoded = _encoded_keys(checkpoint)
    options = []
    for types in _ask(checkpoint, outputs, tuple(FILE_TYPES), skip_impossible=True):
        layout = _layout(encoded, outputs, types.tensors)
        data_bytes = sum(tensor.size_bytes for tensor in layout.tensors.values())
        options.append(
            QuantizationOption(
                name=types.name,
                bits_per_weight=8 * data_bytes / sum(o.source.elements for o in outputs),
                needs_importance_matrix=types.needs_importance_matrix,
                size_bytes=layout.size_bytes,
                tensor_types=dict(Counter(e.name for e in types.tensors.values())),
            )
        )
    return tuple(sorted(options, key=lambda option: (option.size_bytes, option.name)))


def output_tensors(checkpoint: Checkpoint) -> tuple[OutputTensor, ...]:
    """Every tensor of the file, in its order."""
    architecture, hparams = checkpoint.architecture, checkpoint.hparams
    outputs = [
        OutputTensor(gguf, checkpoint.tensors[name], architecture.rope_heads(spec, hparams))
        for name, gguf, _, spec in architecture.expected_tensors(hparams, checkpoint.groups)
    ]
    divisors = checkpoint.rope.frequency_divisors()
    if divisors is not None:
        outputs.insert(0, OutputTensor(DIVISORS_TENSOR, _constant(divisors), is_weight=False))
    return tuple(outputs)


def _constant(values: npt.NDArray[np.float32]) -> Tensor:
    row = values.view(np.uint8).reshape(1, -1)
    return Tensor(DIVISORS_TENSOR, values.shape, F32, lambda start, stop: row[start:stop])


def _refuse(checkpoint: Checkpoint) -> None:
    """Raises for a checkpoint that llama.cpp would load and run wrongly."""
    architecture, hparams = checkpoint.architecture, checkpoint.hparams
    label, context = checkpoint.origin.label, checkpoint.rope.context
    if hparams.sliding_window is not None and context > hparams.sliding_window:
        raise UnsupportedError(
            f"{label}: an attention window of {hparams.sliding_window} tokens, which llama.cpp"
            f" ignores for {architecture.gguf_name}, is exceeded by the context of {context}",
            hint="Give a scale whose context stays within the window, or another target.",
        )
    if checkpoint.rope.llama3 is not None and not architecture.loads_rope_freqs:
        raise UnsupportedError(
            f"{label}: llama3 RoPE, whose frequencies llama.cpp does not load for"
            f" {architecture.gguf_name}",
            hint="Export to safetensors instead.",
        )
    if hparams.query_size != hparams.hidden_size and not architecture.free_head_dim:
        raise UnsupportedError(
            f"{label}: {hparams.heads} heads of {hparams.head_dim} are not the hidden size of"
            f" {hparams.hidden_size}, which llama.cpp cannot load for {architecture.gguf_name}",
            hint="Export to safetensors instead.",
        )
    if checkpoint.vocabulary.size != hparams.vocab_size:
        raise TokenizerError(
            f"{label}: the tokenizer has {checkpoint.vocabulary.size} ids, the embedding"
            f" {hparams.vocab_size} rows",
            hint="Check that both belong to the same model.",
        )


def _ask(
    checkpoint: Checkpoint,
    outputs: Sequence[OutputTensor],
    names: Sequence[str],
    *,
    skip_impossible: bool = False,
) -> list[Types]:
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown:
        raise UnsupportedError(
            f"unknown type {', '.join(unknown)}", hint=f"Known are {', '.join(FILE_TYPES)}."
        )
    keys = skeleton_keys(file_keys(checkpoint, file_type=0, quantizer=""))
    found = []
    with skeleton(keys, [(o.name, o.source.shape) for o in outputs]) as model:
        for name in names:
            try:
                found.append(model.types(name))
            except UnsupportedError:
                if not skip_impossible:
                    raise
    return found


def _plan_kept(checkpoint: Checkpoint, outputs: tuple[OutputTensor, ...]) -> GgufPlan:
    """The source's tensors as they are, under the mixture that the source says it is."""
    number = read_gguf_file(checkpoint.origin.path).keys.get(FILE_TYPE_KEY)
    encoded = _encoded_keys(checkpoint)
    if isinstance(number, int):
        encoded[FILE_TYPE_KEY] = encode_key(FILE_TYPE_KEY, number)
    else:  # llama.cpp guesses where the key is missing
        del encoded[FILE_TYPE_KEY]
    name = next((known for known, n in FILE_TYPES.items() if n == number), None)
    if name is None:  # named after the type of most of its quantized tensors
        counts = Counter(o.source.encoding.name for o in outputs if not o.source.encoding.is_float)
        name = counts.most_common(1)[0][0]
    kept = Types(name, {o.name: o.source.encoding for o in outputs}, (), False)
    return _plan(checkpoint, outputs, encoded, kept)


def _encoded_keys(checkpoint: Checkpoint) -> dict[str, bytes]:
    keys = file_keys(checkpoint, file_type=0, quantizer=load_ggml().fingerprint())
    return {key: encode_key(key, value, KEY_TYPES.get(key)) for key, value in keys.items()}


def _plan(
    checkpoint: Checkpoint,
    outputs: tuple[OutputTensor, ...],
    keys: Mapping[str, bytes],
    types: Types,
) -> GgufPlan:
    return GgufPlan(
        quantize=types.name,
        file_name=_file_name(checkpoint, types.name),
        size_bytes=_layout(keys, outputs, types.tensors).size_bytes,
        tensor_types={o.name: types.tensors[o.name] for o in outputs},
        fallbacks=types.fallbacks,
        keys=keys,
        outputs=outputs,
    )


def _layout(
    keys: Mapping[str, bytes], outputs: Sequence[OutputTensor], types: Mapping[str, Encoding]
) -> Layout:
    return lay_out(keys, ((o.name, o.source.shape, types[o.name]) for o in outputs))


def _file_name(checkpoint: Checkpoint, quantize: str) -> str:
    """``SmolLM2-135M-Instruct-PI8-Q4_1.gguf``; without ``-PI8`` where nothing is interpolated."""
    name = re.sub(r"[^\w.+-]+", "-", checkpoint.card.name).strip("-.") or "model"
    factor = checkpoint.rope.factor
    scaled = f"-PI{factor:g}" if factor != 1.0 else ""
    return f"{name}{scaled}-{quantize.upper()}.gguf"
