"""Signs that a checkpoint without a factor was tuned with one.

Merges and converters drop the scaling from configs (LongLoRA's recipe and unsloth's among them).
What is left in names and sizes cannot say which factor it was; ``pi-convert probe`` asks the
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from converters.checkpoint import Checkpoint
from converters.containers.strict_json import parse_json_object, read_json_object
from converters.errors import ConvertError
from converters.sources.huggingface import FINETUNE_RECORD, TOKENIZER_CONFIG
from converters.sources.lora import KIND as ADAPTER

_LENGTH_KEYS = ("max_sequence_length", "model_max_length")
_ORIGINAL = "original_max_position_embeddings"
_CONDENSED = "rope_condense_ratio"  # LongChat's own key, which transformers does not read
_MAX_SANE_LENGTH = 10**9  # model_max_length is 10^30 where a tokenizer has no limit
# Longer ones were trained with larger theta: LLaMA 2 has 4,096 positions at 10,000, Code Llama and
# Llama 3 moved theta before they moved on.
_SMALL_THETA, _USUAL_CONTEXT = 10000.0, 4096
# "16k" as a word of its own, of the sizes that contexts have; 52k and such are numbers of examples.
_NAMED = re.compile(r"(?<![a-z0-9.])(8|16|24|32|64|100|128|256|512)k(?![a-z0-9])", re.IGNORECASE)
_TOKENS_A_K = 1000  # 16k is 16,000 to some and 16,384 to others


def lost_scaling(checkpoint: Checkpoint) -> str | None:
    """One line for people where ``checkpoint`` has no factor and looks as if it had had one."""
    if checkpoint.rope.factor != 1.0:
        return None
    signs = list(_signs(checkpoint))
    return _line(f"states no factor, but {'; '.join(signs)}") if signs else None


def unrecorded_scaling(checkpoint: Checkpoint) -> str | None:
    """``lost_scaling``, and for an adapter whose factor nobody stated a line in any case."""
    found = lost_scaling(checkpoint)
    if found is None and checkpoint.origin.kind == ADAPTER and checkpoint.rope.factor == 1.0:
        return _line("is an adapter, and neither it nor its base records a factor")
    return found


def _line(what: str) -> str:
    return f"this model {what}: `pi-convert probe` tells which one its weights were tuned with"


def _signs(checkpoint: Checkpoint) -> Iterator[str]:
    context, theta = checkpoint.rope.context, checkpoint.rope.theta
    recorded = _recorded_factor(checkpoint)
    if recorded not in (None, 1, 1.0):
        yield f"{FINETUNE_RECORD} records {recorded:g}"
    ratio = _length(checkpoint.config.get(_CONDENSED))
    if ratio is not None and ratio > 1:
        yield f"{_CONDENSED} is {ratio}"
    original = _length(checkpoint.config.get(_ORIGINAL))
    if original is not None and original < context:
        yield f"{_ORIGINAL} is {original:,} and its context {context:,}"
    for key, length in _lengths(checkpoint):
        if length > context:
            yield f"{key} is {length:,} and its context {context:,}"
    for name in _names(checkpoint):
        found = _NAMED.search(name)
        if found and int(found[1]) * _TOKENS_A_K > context:
            yield f"it is called {name} and its context is {context:,}"
            break
    if theta <= _SMALL_THETA and context > _USUAL_CONTEXT and checkpoint.rope.llama3 is None:
        yield (
            f"its context of {context:,} is more than models with theta {theta:g} are trained for"
            f" from the start ({_USUAL_CONTEXT:,})"
        )


def _recorded_factor(checkpoint: Checkpoint) -> float | None:
    data = checkpoint.side_files.get(FINETUNE_RECORD)
    if data is None:
        return None
    try:
        factor = parse_json_object(data, FINETUNE_RECORD).get("factor")
    except ConvertError:
        return None
    return factor if isinstance(factor, int | float) else None


def _lengths(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """Every length that is stated beside the RoPE."""
    stated = {key: checkpoint.config.get(key) for key in _LENGTH_KEYS}
    tokenizer = checkpoint.origin.path / TOKENIZER_CONFIG
    if tokenizer.is_file():
        stated["the tokenizer's model_max_length"] = read_json_object(tokenizer).get(
            "model_max_length"
        )
    for key, value in stated.items():
        length = _length(value)
        if length is not None:
            yield key, length


def _length(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 1 <= value <= _MAX_SANE_LENGTH else None


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    yield checkpoint.origin.label.rpartition("/")[2]
    yield checkpoint.card.name
    original = checkpoint.config.get("_name_or_path")
    if isinstance(original, str):
        yield original.rpartition("/")[2]
