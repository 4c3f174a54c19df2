"""The keys of a GGUF: what the model is called, its sizes, its RoPE, its tokenizer, its origin.

Names and value types are those of llama.cpp's converter (``conversion/base.py`` and
``gguf-py/gguf/metadata.py`` of 0c1e57098); docs/gguf-metadata.md lists where ours differ and why.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping

from converters.architectures.hparams import write_gguf_hparams
from converters.checkpoint import Checkpoint, ModelCard
from converters.containers.gguf import ARCHITECTURE_KEY, ValueType
from converters.errors import SourceError, shown
from converters.rope.config import LLAMA3_FACTORS
from converters.rope.gguf import LLAMA3_RECORD, RECORD_PREFIX, write_llama3_record
from converters.rope.gguf import write_gguf as write_gguf_rope
from converters.tokenizers import vocabulary_to_gguf

FILE_TYPE_KEY = "general.file_type"
SOURCE_NAME_KEY = f"{RECORD_PREFIX}source.name"
SOURCE_HASH_KEY = f"{RECORD_PREFIX}source.sha256"
QUANTIZER_KEY = f"{RECORD_PREFIX}quantizer"
VERSION_KEY = f"{RECORD_PREFIX}version"
HASH_PLACEHOLDER = "0" * 64  # the source's hash is known when its last tensor has been read

_QUANTIZATION_VERSION = 2  # ggml.h GGML_QNT_VERSION
_HUB_URL = "https://huggingface.co/"
_GENERATION_CONFIG = "generation_config.json"
_INT32_MAX, _FLOAT32_MAX = 2**31 - 1, float.fromhex("0x1.fffffep127")

# generation_config.json's key -> the end of general.sampling.*, and its type.
_SAMPLING: Mapping[str, tuple[str, ValueType]] = {
    "top_k": ("top_k", ValueType.INT32),
    "top_p": ("top_p", ValueType.FLOAT32),
    "min_p": ("min_p", ValueType.FLOAT32),
    "temperature": ("temp", ValueType.FLOAT32),
    "repetition_penalty": ("penalty_repeat", ValueType.FLOAT32),
}
KEY_TYPES: Mapping[str, ValueType] = {
    **{f"general.sampling.{name}": kind for name, kind in _SAMPLING.values()},
    # As in the config: llama3's smoothing amplifies last bits, so float32 would not do.
    **{f"{LLAMA3_RECORD}.{name}": ValueType.FLOAT64 for name in LLAMA3_FACTORS},
}


def file_keys(
    checkpoint: Checkpoint, *, file_type: int, quantizer: str, source_hash: str = HASH_PLACEHOLDER
) -> dict[str, object]:
    """Every key of the file, in the order in which it is written.

    ``file_type`` is llama.cpp's number of the mixture, ``quantizer`` the fingerprint of ggml.
    """
    prefix = checkpoint.architecture.gguf_name
    scoped = {**write_gguf_hparams(checkpoint.hparams), **write_gguf_rope(checkpoint.rope)}
    return {
        ARCHITECTURE_KEY: prefix,
        "general.type": "model",
        **_sampling(checkpoint.side_files.get(_GENERATION_CONFIG)),
        **_card(checkpoint.card),
        **{f"{prefix}.{key}": value for key, value in scoped.items()},
        FILE_TYPE_KEY: file_type,
        **vocabulary_to_gguf(checkpoint.vocabulary),
        "general.quantization_version": _QUANTIZATION_VERSION,
        VERSION_KEY: _version(),
        SOURCE_NAME_KEY: checkpoint.origin.label,
        SOURCE_HASH_KEY: source_hash,
        QUANTIZER_KEY: quantizer,
        **write_llama3_record(checkpoint.rope),
    }


def _card(card: ModelCard) -> dict[str, object]:
    keys: dict[str, object] = {
        "general.name": card.name,
        "general.organization": card.organization,
        "general.finetune": card.finetune,
        "general.basename": card.basename,
        "general.size_label": card.size_label,
        "general.license": card.license,
    }
    if card.base_models:
        keys["general.base_model.count"] = len(card.base_models)
    for number, model in enumerate(card.base_models):
        keys |= _base_model(f"general.base_model.{number}", model)
    keys["general.tags"] = list(card.tags) or None
    keys["general.languages"] = list(card.languages) or None
    return {key: value for key, value in keys.items() if value is not None}


def _base_model(prefix: str, model: str) -> dict[str, object]:
    """A base model given as a hub id, or as a URL where it is not on the hub."""
    if "://" in model:
        return {f"{prefix}.repo_url": model}
    organization, _, name = model.rpartition("/")
    keys: dict[str, object] = {f"{prefix}.name": name}
    if organization:
        keys[f"{prefix}.organization"] = organization
        keys[f"{prefix}.repo_url"] = f"{_HUB_URL}{model}"
    return keys


def _sampling(generation_config: bytes | None) -> dict[str, object]:
    """The sampler's settings. Raises ``SourceError`` for a file that is no JSON object."""
    if generation_config is None:
        return {}
    try:
        settings = json.loads(generation_config)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SourceError(
            f"{_GENERATION_CONFIG} is no JSON object",
            hint="It holds the sampler's settings; correct the file or remove it.",
        )
    return {
        f"general.sampling.{name}": _setting(settings[key], key, kind)
        for key, (name, kind) in _SAMPLING.items()
        if settings.get(key) is not None
    }


def _setting(value: object, key: str, kind: ValueType) -> float:
    """A number that its type holds; ``SourceError`` for anything else."""
    largest = _INT32_MAX if kind is ValueType.INT32 else _FLOAT32_MAX
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not abs(number) <= largest or (kind is ValueType.INT32 and number != int(number)):
        wanted = "a whole number" if kind is ValueType.INT32 else "a number"
        raise SourceError(
            f"{_GENERATION_CONFIG}: {key} is {shown(value)}",
            hint=f"Expected {wanted} of 32 bits; correct the file or remove it.",
        )
    return int(number) if kind is ValueType.INT32 else float(number)


def _version() -> str:
    try:
        return importlib.metadata.version("pi-convert")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that was never installed
