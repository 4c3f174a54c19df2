"""A Hugging Face folder as a checkpoint: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.architectures import Architecture, HParams, architecture_of_config
from converters.architectures.hparams import read_config_hparams
from converters.architectures.spec import HuggingFaceSpelling, check_tensors
from converters.checkpoint import Checkpoint, Origin
from converters.containers.open_file import OpenFile
from converters.containers.strict_json import read_json_object
from converters.errors import SourceError, TensorError, UnsupportedError, shown
from converters.rope import RopeParameters
from converters.rope.config import RopeContext, read_config
from converters.sources.buffers import check_frequency_buffers, is_frequency_buffer
from converters.sources.card import card_of_folder
from converters.sources.shards import read_weights
from converters.tensor import Tensor
from converters.tokenizers import read_tokenizer

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_PREFIX = "model."
# What ``pi-convert finetune`` leaves beside the weights: L, s, L', recipe and text.
FINETUNE_RECORD = "pi_convert_finetune.json"
RUN, RECIPE = "run", "recipe.json"  # what its folder has from the start; a config comes last
_SIDE_FILES = (
    FINETUNE_RECORD,
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_MAX_SIDE_FILE_BYTES = 4 << 20
# model_max_length is 10^30 where a tokenizer has no limit.
_MAX_SANE_LENGTH = 10**9
_COMPARED_BYTES = 4 << 20


def open_folder(
    folder: Path, *, original_context: int | None = None, origin: Origin | None = None
) -> Checkpoint:
    """The checkpoint in ``folder``; weights are read when they are asked for.

    ``original_context`` is L in tokens where the caller knows it (``--original-context``);
    ``origin`` says where the folder came from, where that is a hub. Raises ``SourceError`` or one
    of its kinds for a checkpoint that is not whole or contradicts itself, and
    ``UnsupportedError`` for one that cannot be exported right.
    """
    origin = origin or Origin(label=folder.resolve().name, kind="folder", path=folder)
    config = _read_config(folder)
    where = str(folder / CONFIG)
    architecture, spelling = architecture_of_config(config, where)
    hparams = read_config_hparams(
        config, sliding_window=_window(config, spelling, where), where=where
    )
    rope = _rope(config, folder, architecture, hparams, original_context)
    stored = _with_prefix(read_weights(folder))
    buffers = {name: t for name, t in stored.items() if is_frequency_buffer(name)}
    tensors = _without_tied_head(
        {name: t for name, t in stored.items() if name not in buffers}, hparams, str(folder)
    )
    groups = _flagged_groups(config, architecture, where)
    expected = {n: shape for n, _, shape, _ in architecture.expected_tensors(hparams, groups)}
    check_tensors(expected, {name: t.shape for name, t in tensors.items()}, str(folder))
    check_frequency_buffers(buffers, rope, str(folder))
    return Checkpoint(
        origin=origin,
        architecture=architecture,
        hparams=hparams,
        rope=rope,
        tensors={name: tensors[name] for name in expected},
        vocabulary=read_tokenizer(folder, hparams.vocab_size, config=config),
        card=card_of_folder(
            folder,
            config,
            hub_id=origin.label if origin.kind == "hub" else None,
            parameters=sum(t.elements for t in tensors.values()),
            tuned=(folder / FINETUNE_RECORD).is_file(),
        ),
        groups=architecture.groups_present(tensors),
        config=config,
        side_files=_side_files(folder),
    )


def _read_config(folder: Path) -> dict[str, object]:
    if not (folder / CONFIG).is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        if ggufs:
            raise SourceError(
                f"{folder}: no {CONFIG}, but {', '.join(ggufs[:4])}",
                hint="Give the GGUF file itself.",
            )
        if (folder / RUN / RECIPE).is_file():
            raise SourceError(
                f"{folder} holds a run of `pi-convert finetune` that is not finished",
                hint="Go on with the command that it was started with and --resume.",
            )
        raise SourceError(
            f"{folder}: no {CONFIG}",
            hint="Expected a Hugging Face folder with config.json, safetensors and a tokenizer.",
        )
    config = read_json_object(folder / CONFIG)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedError(
            f"{folder / CONFIG}: the weights are quantized ({method or 'quantization_config'})",
            hint="Give the float checkpoint that it was made from.",
        )
    return config


def _rope(
    config: Mapping[str, object],
    folder: Path,
    architecture: Architecture,
    hparams: HParams,
    original_context: int | None,
) -> RopeParameters:
    where = str(folder / CONFIG)
    partial = config.get("partial_rotary_factor", 1)
    if partial not in (None, 1):
        raise UnsupportedError(
            f"{where}: partial_rotary_factor is {shown(partial)}",
            hint=f"{architecture.name} is supported with RoPE over the whole head only.",
        )
    about = RopeContext(
        where=where,
        rotary_dim=hparams.head_dim,
        default_theta=architecture.default_theta,
        model_max_length=_model_max_length(folder / TOKENIZER_CONFIG),
        original_context=original_context,
    )
    return read_config(config, about)


def _model_max_length(path: Path) -> int | None:
    value = read_json_object(path).get("model_max_length") if path.is_file() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 1 <= value <= _MAX_SANE_LENGTH and value == int(value) else None


def _window(config: Mapping[str, object], spelling: HuggingFaceSpelling, where: str) -> int | None:
    """The attention window in tokens; None where there is none or it is switched off."""
    window = spelling.window
    if window is None:
        return None
    if window.switch:
        switch = config.get(window.switch, False)
        if not isinstance(switch, bool):
            raise SourceError(
                f"{where}: {window.switch} is {shown(switch)}", hint="Expected true or false."
            )
        if not switch:
            return None
    value = config.get(window.key, window.default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(
            f"{where}: {window.key} is {shown(value)}",
            hint="Expected a positive whole number, or null for no window.",
        )
    return value


def _flagged_groups(
    config: Mapping[str, object], architecture: Architecture, where: str
) -> frozenset[str]:
    """The tensor groups that the config announces; others are unexpected where present."""
    groups = set()
    for flag, group in architecture.flags.items():
        value = config.get(flag, False)
        if not isinstance(value, bool):
            raise SourceError(f"{where}: {flag} is {shown(value)}", hint="Expected true or false.")
        if value:
            groups.add(group)
    return frozenset(groups)


def _with_prefix(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model with its head has them; a bare decoder's lack ``model.`` throughout."""
    if EMBEDDING.removeprefix(_PREFIX) not in stored or any(n.startswith(_PREFIX) for n in stored):
        return dict(stored)
    names = {name: name if name == HEAD else _PREFIX + name for name in stored}
    return {new: dataclasses.replace(stored[old], name=new) for old, new in names.items()}


def _without_tied_head(
    tensors: dict[str, Tensor], hparams: HParams, where: str
) -> dict[str, Tensor]:
    """The tensors less the head that is the embedding once more; another head is an error."""
    if not hparams.tied_embeddings or HEAD not in tensors or EMBEDDING not in tensors:
        return tensors
    if not same_bytes(tensors[HEAD], tensors[EMBEDDING]):
        raise TensorError(
            f"{where}: tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}",
            hint=f"Set tie_word_embeddings to false if {HEAD} is right, or remove the tensor.",
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are stored alike, byte for byte; a few MiB at a time are read."""
    if (a.shape, a.encoding) != (b.shape, b.encoding):
        return False
    step = max(1, _COMPARED_BYTES // a.row_bytes)
    starts = range(0, a.rows, step)
    return all(
        np.array_equal(a.read_rows(s, min(s + step, a.rows)), b.read_rows(s, min(s + step, a.rows)))
        for s in starts
    )


def _side_files(folder: Path) -> dict[str, bytes]:
    paths = sorted({path for pattern in _SIDE_FILES for path in folder.glob(pattern)})
    files = {path.name: OpenFile(path) for path in paths if path.is_file()}
    return {
        name: file.read(0, file.size_bytes).tobytes()
        for name, file in files.items()
        if file.size_bytes <= _MAX_SIDE_FILE_BYTES
    }
