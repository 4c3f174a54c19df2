"""A LoRA adapter on its base, merged row by row as the rows are read: W + B A * scale.

Two layouts: PEFT's folder (adapter_config.json, adapter_model.safetensors or .bin, with what
``modules_to_save`` names in it), and LongLoRA's, whose trained embeddings and norms stand in
trainable_params.bin beside it. A folder's adapter_config.json names the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.architectures.hparams import HParams
from converters.architectures.spec import check_tensors
from converters.checkpoint import Checkpoint, Origin
from converters.containers.safetensors import read_safetensors
from converters.containers.strict_json import read_json_object
from converters.encodings import BF16, F16, F32, Encoding
from converters.errors import RopeError, SourceError, TensorError, UnsupportedError
from converters.rope import RopeParameters
from converters.rope.config import RopeContext, read_config
from converters.sources.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from converters.sources.huggingface import CONFIG, EMBEDDING, HEAD, same_bytes
from converters.sources.pytorch_bin import read_pytorch
from converters.tensor import Tensor
from converters.tokenizers import read_tokenizer

TRAINABLE = "trainable_params.bin"  # LongLoRA's
KIND = "adapter"

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FULL_WEIGHTS = ("model.safetensors*", "pytorch_model*.bin*")
_PREFIX = "base_model.model."
_BEFORE = ".original_module."  # a replaced weight as it was; saved where embeddings were resized
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# From a reference and the revision of a hub id, or None.
OpenBase = Callable[[str, str | None], Checkpoint]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two factors of one weight's change: B (rows, rank), A (rank, columns)."""

    a: Tensor
    b: Tensor


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no whole model."""
    whole = any(any(folder.glob(pattern)) for pattern in _FULL_WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def open_adapter(
    origin: Origin, open_base: OpenBase, *, original_context: int | None = None
) -> Checkpoint:
    """The base that the adapter at ``origin`` names with the adapter merged into it.

    Its RoPE is the base's, or what a config.json beside the adapter says; ``original_context`` is L
    in tokens where the caller knows it. Raises ``SourceError`` or one of its kinds where the
    adapter is not whole or does not fit its base, ``UnsupportedError`` for adapters that are merged
    otherwise.
    """
    folder = origin.path
    where = folder / ADAPTER_CONFIG
    settings = read_adapter_config(where)
    base = open_base(_base_reference(settings.base, folder), settings.revision)
    _require_floats(base, where)
    hparams, tensors = _merged_tensors(base, settings, folder)
    config = {**base.config, "vocab_size": hparams.vocab_size}
    if hparams.tied_embeddings != base.hparams.tied_embeddings:
        config["tie_word_embeddings"] = hparams.tied_embeddings
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    vocabulary = base.vocabulary
    if has_tokenizer or hparams.vocab_size != base.hparams.vocab_size:
        place = folder if has_tokenizer else base.origin.path
        vocabulary = read_tokenizer(place, hparams.vocab_size, config=config)
    name = origin.label.rpartition("/")[2]
    return dataclasses.replace(
        base,
        origin=dataclasses.replace(origin, kind=KIND),
        hparams=hparams,
        rope=_rope(folder, base, original_context),
        tensors=tensors,
        vocabulary=vocabulary,
        card=dataclasses.replace(base.card, name=name),
        groups=base.architecture.groups_present(tensors),
        config=config,
    )


def _merged_tensors(
    base: Checkpoint, settings: AdapterConfig, folder: Path
) -> tuple[HParams, dict[str, Tensor]]:
    """The sizes and tensors after the merge. Raises ``TensorError`` where the two do not fit."""
    pairs, whole = _split(_stored(folder), folder)
    whole, tensors = _with_ties(whole, base, settings)
    hparams = _resized(base.hparams, whole, folder)
    hparams = dataclasses.replace(hparams, tied_embeddings=HEAD not in tensors)
    for name, tensor in whole.items():
        tensors[name] = _replacement(name, tensor, tensors, hparams, folder)
    if HEAD in tensors and tensors[HEAD].shape[0] < hparams.vocab_size:
        tensors[HEAD] = _padded(tensors[HEAD], hparams.vocab_size)
    for name, pair in pairs.items():
        scale = settings.scale(pair.a.shape[0])
        tensors[name] = _merged(_target(name, tensors, folder), pair, scale, folder)
    groups = base.architecture.groups_present(tensors)
    expected = {n: shape for n, _, shape, _ in base.architecture.expected_tensors(hparams, groups)}
    check_tensors(expected, {n: tensor.shape for n, tensor in tensors.items()}, str(folder))
    return hparams, {name: tensors[name] for name in expected}


def _base_reference(base: str, folder: Path) -> str:
    beside = folder / base
    return str(beside) if not Path(base).is_absolute() and beside.is_dir() else base


def _require_floats(base: Checkpoint, where: Path) -> None:
    names = {tensor.encoding.name for tensor in base.tensors.values()}
    if not names <= {F32.name, F16.name, BF16.name}:
        raise UnsupportedError(
            f"{where}: the base is quantized ({', '.join(sorted(names))})",
            hint="Name its float checkpoint in base_model_name_or_path.",
        )


def _stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter by the name that PEFT gives it."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise SourceError(
            f"{folder}: neither {' nor '.join(_WEIGHTS)}", hint="The download is incomplete."
        )
    read = read_safetensors if found.suffix == ".safetensors" else read_pytorch
    stored = read(found)
    if (folder / TRAINABLE).is_file():
        stored |= read_pytorch(folder / TRAINABLE)
    return stored


def _split(
    stored: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """(factors by the weight they change, weights that replace the base's)."""
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for stored_name, tensor in stored.items():
        name = stored_name.removeprefix(_PREFIX)
        if _BEFORE in name:
            continue
        for mark in (".modules_to_save.default", ".modules_to_save", ".default"):
            name = name.replace(mark, "")
        weight, lora, rest = name.partition(".lora_")
        if not lora:
            whole[name.replace(".base_layer", "")] = tensor
        elif rest in ("A.weight", "B.weight"):
            factors.setdefault(f"{weight}.weight", {})[rest[0]] = tensor
        else:
            raise UnsupportedError(
                f"{folder}: {stored_name}", hint="Only LoRA of linear layers is merged."
            )
    alone = [name for name, found in factors.items() if len(found) != 2]
    if alone or not (factors or whole):
        raise TensorError(
            f"{folder}: lora_A or lora_B is missing for {', '.join(alone) or 'every weight'}",
            hint="The adapter is incomplete; fetch it again.",
        )
    return {name: _Pair(found["A"], found["B"]) for name, found in factors.items()}, whole


def _with_ties(
    whole: dict[str, Tensor], base: Checkpoint, settings: AdapterConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights that replace the base's, the base's), with a head only where it has its own.

    On a tied base PEFT saves one tensor under both names where it saves embeddings on its own
    account. What ``modules_to_save`` names is a copy, and the other one of the two stays as it was.
    """
    tensors = dict(base.tensors)
    if not base.hparams.tied_embeddings:
        return whole, tensors
    pair = [whole[name] for name in (EMBEDDING, HEAD) if name in whole]
    if len(pair) == 2 and same_bytes(*pair):
        return {name: tensor for name, tensor in whole.items() if name != HEAD}, tensors
    if any(settings.unties(tensor) for tensor in (EMBEDDING, HEAD) if tensor in whole):
        tensors[HEAD] = dataclasses.replace(tensors[EMBEDDING], name=HEAD)
    return whole, tensors


def _resized(hparams: HParams, whole: Mapping[str, Tensor], folder: Path) -> HParams:
    """The sizes with the adapter's number of embedding rows, where it has more."""
    rows = {whole[name].shape[0] for name in (EMBEDDING, HEAD) if name in whole}
    if not rows:
        return hparams
    if min(rows) < hparams.vocab_size or len(rows) > 1:
        raise TensorError(
            f"{folder}: embeddings of {sorted(rows)} rows, the base has {hparams.vocab_size}",
            hint="Check that the adapter belongs to this base.",
        )
    return dataclasses.replace(hparams, vocab_size=rows.pop())


def _target(name: str, tensors: Mapping[str, Tensor], folder: Path) -> Tensor:
    if name not in tensors and name == HEAD:
        raise TensorError(
            f"{folder}: the adapter changes {name}, which is the base's embedding (tied)",
            hint=f"Untie the base: store its embedding as {name} too, with tie_word_embeddings"
            " false.",
        )
    if name not in tensors:
        raise TensorError(
            f"{folder}: the adapter changes {name}, which the base does not have",
            hint="Check that the adapter belongs to this base.",
        )
    return tensors[name]


def _replacement(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], hparams: HParams, folder: Path
) -> Tensor:
    expected = _target(name, tensors, folder).shape
    if name in (EMBEDDING, HEAD):
        expected = (hparams.vocab_size, *expected[1:])
    if tensor.shape != expected:
        raise TensorError(
            f"{folder}: {name} is {list(tensor.shape)}, the base has {list(expected)}",
            hint="Check that the adapter belongs to this base.",
        )
    return dataclasses.replace(tensor, name=name)


def _padded(head: Tensor, rows: int) -> Tensor:
    """The head with the mean of its rows for each token it lacks: neither likely nor unlikely."""
    missing = rows - head.rows
    mean = head.read_f32(0, head.rows).mean(axis=0, dtype=np.float64).astype(np.float32)
    new = encode_float(np.broadcast_to(mean, (missing, len(mean))), head.encoding)

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        old = head.read_rows(min(start, head.rows), min(stop, head.rows))
        return np.concatenate([old, new[max(0, start - head.rows) : max(0, stop - head.rows)]])

    return Tensor(head.name, (rows, *head.shape[1:]), head.encoding, read)


def _merged(weight: Tensor, pair: _Pair, scale: float, folder: Path) -> Tensor:
    rank = pair.a.shape[0]
    if pair.b.shape != (weight.shape[0], rank) or pair.a.shape != (rank, weight.shape[-1]):
        raise TensorError(
            f"{folder}: {weight.name} is {list(weight.shape)}, its lora_B {list(pair.b.shape)} and"
            f" lora_A {list(pair.a.shape)}",
            hint="Check that the adapter belongs to this base.",
        )

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        change = pair.b.read_f32(start, stop) @ pair.a.read_f32(0, rank) * np.float32(scale)
        return encode_float(weight.read_f32(start, stop) + change, weight.encoding)

    return dataclasses.replace(weight, read_raw=read)


def encode_float(values: Floats, encoding: Encoding) -> npt.NDArray[np.uint8]:
    """Rows as f32, f16 or bf16, rounded to nearest even, uint8 (rows, row_bytes)."""
    if encoding is BF16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16).view(np.uint8)
    dtype = np.float16 if encoding is F16 else np.float32
    return np.ascontiguousarray(values, dtype=dtype).view(np.uint8)


def _rope(folder: Path, base: Checkpoint, original_context: int | None) -> RopeParameters:
    """What a config.json beside the adapter says, held against the base; else the base's.

    L is the base's wherever that config leaves it to be assumed.
    """
    path = folder / CONFIG
    if not path.is_file():
        return base.rope
    about = RopeContext(
        where=str(path),
        rotary_dim=base.rope.rotary_dim,
        default_theta=base.architecture.default_theta,
        original_context=original_context,
    )
    config = read_json_object(path)
    own = read_config(config, about)
    if (own.theta, own.llama3) != (base.rope.theta, base.rope.llama3):
        raise RopeError(
            f"{path}: theta {own.theta:g} and {own.kind} RoPE, the base has {base.rope.theta:g} and"
            f" {base.rope.kind}",
            hint="Correct the config beside the adapter, or the base that it names.",
        )
    if base.rope.factor not in (1.0, own.factor):
        raise RopeError(
            f"{path}: factor {own.factor:g}, the base has {base.rope.factor:g}",
            hint="State one factor in both.",
        )
    if own.factor == 1.0 or original_context is not None or _is_assumed(base.rope):
        return own
    if _is_assumed(own):
        known = base.rope.original_context
        key = f"the base's L ({base.origin.label})"
        about = dataclasses.replace(about, original_context=known, original_context_key=key)
        return read_config(config, about)
    if own.original_context != base.rope.original_context:
        raise RopeError(
            f"{path}: L is {own.original_context:,} tokens, the base's is"
            f" {base.rope.original_context:,}",
            hint="Correct one of them, or give --original-context N if you know it.",
        )
    return own


def _is_assumed(rope: RopeParameters) -> bool:
    """Whether L was told from L' and the factor alone."""
    return any(one.name == "L" and one.assumed for one in rope.evidence)
