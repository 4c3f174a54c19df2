"""A GGUF header as audit rules look at it: forgiving reads, one spelling of every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from converters.containers.gguf import GgufFile
from converters.rope import gguf as spelling
from converters.rope.parameters import shortest_float32

LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
_FLOAT32_MAX = float(np.finfo(np.float32).max)

short = shortest_float32


@dataclass(frozen=True, slots=True)
class Header:
    """A file and its architecture's keys without their prefix."""

    file: GgufFile
    architecture: str
    keys: Mapping[str, object]

    @classmethod
    def of(cls, file: GgufFile) -> Header:
        """The header of a file; ``SourceError`` where it names no architecture."""
        return cls(file, file.architecture, file.scoped_keys())

    def full(self, key: str) -> str:
        """The key with the architecture's prefix."""
        return f"{self.architecture}.{key}"

    def shown(self, *keys: str) -> str:
        """``key = value`` for each key; ``key is missing`` where it is."""
        return ", ".join(
            f"{self.full(key)} = {plain(self.keys[key])}"
            if key in self.keys
            else f"{self.full(key)} is missing"
            for key in keys
        )

    def number(self, key: str) -> float | None:
        """A number that float32 holds, None for anything else."""
        value = self.keys.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not abs(value) <= _FLOAT32_MAX:
            return None
        return float(value)

    def whole(self, key: str) -> int | None:
        """A positive whole number, None for anything else (a list by layer, say)."""
        value = self.keys.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return None
        return value

    def text(self, full_key: str) -> str | None:
        """A string under a full key, None for anything else."""
        value = self.file.keys.get(full_key)
        return value if isinstance(value, str) else None

    @property
    def scaling_type(self) -> str:
        """The type as llama.cpp takes it: linear where the key is missing."""
        return str(self.keys.get(spelling.TYPE_KEY, "linear"))

    @property
    def stored_factor(self) -> float | None:
        """The factor as written, also under its old key."""
        factor = self.number(spelling.FACTOR_KEY)
        return self.number(spelling.LEGACY_FACTOR_KEY) if factor is None else factor

    @property
    def applied_factor(self) -> float:
        """What llama.cpp divides positions by: 1 where nothing valid is stored or type is none."""
        factor = self.stored_factor
        if not factor or factor < 0 or self.scaling_type == "none":
            return 1.0
        return short(factor)

    @property
    def has_longrope_tensors(self) -> bool:
        """Whether the file carries long or short frequency factors."""
        return LONG_FACTORS in self.file.tensors or SHORT_FACTORS in self.file.tensors

    @property
    def has_factor_tensor(self) -> bool:
        """Whether the file carries ``rope_freqs.weight``."""
        return spelling.DIVISORS_TENSOR in self.file.tensors

    def divisors(self) -> npt.NDArray[np.float32] | None:
        """``rope_freqs.weight``, float32 (rotary_dim / 2,); None where the file has none."""
        if not self.has_factor_tensor:
            return None
        tensor = self.file.tensor(spelling.DIVISORS_TENSOR)
        return tensor.read_f32(0, tensor.rows).reshape(-1)

    @property
    def head_dim(self) -> int | None:
        """Elements of a key head; None where the sizes differ by layer or are missing."""
        stated = self.whole("attention.key_length")
        if stated is not None:
            return stated
        width, heads = self.whole("embedding_length"), self.whole("attention.head_count")
        return width // heads if width and heads and width % heads == 0 else None

    @property
    def is_split(self) -> bool:
        """Whether the model is spread over several files."""
        count = self.file.keys.get("split.count", 0)
        return isinstance(count, int) and count > 1


def plain(value: object) -> str:
    """A value for people: floats short, strings quoted, long arrays by their length."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{short(value):g}" if isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= 60 else f"{value[:57]}..."
    if isinstance(value, list | np.ndarray):
        return f"{len(value)} values"
    return str(value)
