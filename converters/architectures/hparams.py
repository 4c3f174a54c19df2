"""A model's sizes, read from a Hugging Face config or from GGUF keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from sys import float_info

from converters.errors import SourceError, shown


@dataclass(frozen=True, slots=True)
class HParams:
    """Sizes and switches of a decoder. ``sliding_window`` is in tokens, None without one."""

    vocab_size: int  # rows of the embedding
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied_embeddings: bool = False
    sliding_window: int | None = None

    @property
    def query_size(self) -> int:
        """Rows of the query projection: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key or value projection: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    def kv_cache_bytes(self, context_tokens: int, element_bytes: int = 2) -> int:
        """The key and value cache at a context: 2 * layers * kv_heads * head_dim * bytes."""
        return 2 * self.layers * self.kv_size * element_bytes * context_tokens


# field -> (config.json key, GGUF key without the architecture's prefix); both spellings are shared
# by every llama-like architecture. An empty string: derived, see _size.
_KEYS: Mapping[str, tuple[str, str]] = {
    "hidden_size": ("hidden_size", "embedding_length"),
    "intermediate_size": ("intermediate_size", "feed_forward_length"),
    "layers": ("num_hidden_layers", "block_count"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
}
NORM_EPS_KEYS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
_CONFIG, _GGUF = 0, 1
# Llama 3.1 405B has 126. More than this is a lie, and listing its tensors would take all memory.
MAX_LAYERS = 1000


def read_config_hparams(
    config: Mapping[str, object], *, sliding_window: int | None, where: str
) -> HParams:
    """The sizes in a ``config.json``. Raises ``SourceError`` listing every bad key at once."""
    problems: list[str] = []
    vocab_size = _whole(config.get("vocab_size"), "vocab_size", problems)
    sizes = _sizes(config, _CONFIG, problems)
    norm_eps = _positive(config.get(NORM_EPS_KEYS[_CONFIG]), NORM_EPS_KEYS[_CONFIG], problems)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings is {shown(tied)}, expected true or false")
    _raise(problems, where)
    return HParams(
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        tied_embeddings=bool(tied),
        sliding_window=sliding_window,
        **sizes,
    )


def read_gguf_hparams(
    keys: Mapping[str, object], *, vocab_size: int, tied_embeddings: bool, where: str
) -> HParams:
    """The sizes in GGUF keys (without prefix); ``vocab_size`` is the embedding's row count."""
    problems: list[str] = []
    sizes = _sizes(keys, _GGUF, problems)
    norm_eps = _positive(keys.get(NORM_EPS_KEYS[_GGUF]), NORM_EPS_KEYS[_GGUF], problems)
    if not problems and "attention.value_length" in keys:
        value_length = _whole(keys["attention.value_length"], "attention.value_length", problems)
        if not problems and value_length != sizes["head_dim"]:
            problems.append(f"attention.value_length is {value_length}, not attention.key_length")
    _raise(problems, where)
    return HParams(
        vocab_size=vocab_size, norm_eps=norm_eps, tied_embeddings=tied_embeddings, **sizes
    )


def write_config_hparams(hparams: HParams) -> dict[str, object]:
    """The config.json keys of the sizes."""
    keys: dict[str, object] = {names[_CONFIG]: getattr(hparams, f) for f, names in _KEYS.items()}
    return {
        "vocab_size": hparams.vocab_size,
        **keys,
        NORM_EPS_KEYS[_CONFIG]: hparams.norm_eps,
        "tie_word_embeddings": hparams.tied_embeddings,
    }


def write_gguf_hparams(hparams: HParams) -> dict[str, int | float]:
    """The GGUF keys of the sizes, without prefix.

    As llama.cpp's converter, key and value length are left out where they follow from the others.
    """
    keys: dict[str, int | float] = {n[_GGUF]: getattr(hparams, f) for f, n in _KEYS.items()}
    if hparams.head_dim * hparams.heads == hparams.hidden_size:
        del keys["attention.key_length"]
    else:
        keys["attention.value_length"] = hparams.head_dim
    keys[NORM_EPS_KEYS[_GGUF]] = hparams.norm_eps
    keys["vocab_size"] = hparams.vocab_size
    return keys


def _sizes(keys: Mapping[str, object], spelling: int, problems: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for field, names in _KEYS.items():
        key = names[spelling]
        value = keys.get(key)
        if value is None and field == "kv_heads":
            sizes[field] = sizes["heads"]
        elif value is None and field == "head_dim":
            if sizes["heads"] and sizes["hidden_size"] % sizes["heads"]:
                problems.append(f"{key} is missing and hidden size / heads is not whole")
            sizes[field] = sizes["hidden_size"] // max(sizes["heads"], 1)
        else:
            sizes[field] = _whole(value, key, problems)
    if sizes["layers"] > MAX_LAYERS:
        key = _KEYS["layers"][spelling]
        problems.append(f"{key} is {sizes['layers']}, expected at most {MAX_LAYERS}")
    if not problems and sizes["heads"] % sizes["kv_heads"]:
        problems.append(f"{sizes['heads']} heads do not divide among {sizes['kv_heads']} kv heads")
    if not problems and sizes["head_dim"] % 2:
        problems.append(f"a head of {sizes['head_dim']} elements is odd, RoPE rotates pairs")
    return sizes


def _whole(value: object, key: str, problems: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        found = "missing" if value is None else shown(value)
        problems.append(f"{key} is {found}, expected a positive whole number")
        return 0
    return value


def _positive(value: object, key: str, problems: list[str]) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= float_info.max
    ):
        found = "missing" if value is None else shown(value)
        problems.append(f"{key} is {found}, expected a positive number")
        return 0.0
    return float(value)


def _raise(problems: list[str], where: str) -> None:
    if problems:
        raise SourceError(f"{where}: {'; '.join(problems)}", hint="Correct these keys.")
