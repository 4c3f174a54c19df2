"""What every link needs of an artifact, whatever its format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from converters.architectures import HParams
from converters.rope import RopeParameters
from converters.targets.gguf.metadata import VERSION_KEY
from converters.tensor import Tensor
from pi_convert.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact, read as far as it can be; what is wrong with it is kept, not raised.

    ``tensors`` are those of the source's that it has in the right shape, under Hugging Face's
    names, laid out as there, in the artifact's own encodings. ``record`` has what the file says of
    its making, under GGUF's names.
    """

    path: Path
    architecture: str
    record: Mapping[str, object]
    rope_problem: str | None  # why its RoPE cannot be told
    tensors: Mapping[str, Tensor]
    missing: tuple[str, ...]  # as the format names them
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]  # name, shape and the shape expected

    runtime_name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # of its runtime
    keeps_row_order: ClassVar[bool]  # of queries and keys, whatever RoPE pairs: Hugging Face's

    @property
    def is_ours(self) -> bool:
        """Whether the file says that pi-convert wrote it."""
        return VERSION_KEY in self.record

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the source is there, in shape."""
        return not (self.missing or self.misshapen)

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is stored in blocks."""
        return any(not tensor.encoding.is_float for tensor in self.tensors.values())

    @property
    @abstractmethod
    def claimed_factor(self) -> float | None:
        """The factor that the file itself gives, None where it gives none."""

    @property
    @abstractmethod
    def on_gpu(self) -> bool:
        """Whether its runtime uses a GPU."""

    @abstractmethod
    def load(self, imposed: RopeParameters | None = None) -> Runtime:
        """The artifact in its runtime, as it is or with a RoPE imposed."""

    @abstractmethod
    def load_problem(self) -> str | None:
        """Why its runtime cannot load it; None where it can."""

    @abstractmethod
    def size_findings(self, expected: HParams) -> Iterator[str]:
        """Where sizes that the file states are not the source's."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """How its runtime runs it, for the record."""
