"""The value that every source gives and every target takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.architectures import Architecture, HParams
from converters.rope import RopeParameters
from converters.tensor import Tensor
from converters.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from; ``label`` is shown and recorded, never a local path."""

    label: str  # the folder's or file's own name, or the hub id
    kind: str  # "folder", "gguf", "hub" or "adapter"
    path: Path
    revision: str | None = None  # the hub's commit


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known about the model besides its numbers; GGUF's ``general.*`` keys."""

    name: str
    license: str | None = None
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()  # hub ids
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    size_label: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model: what it is, and its tensors on demand, named and laid out as Hugging Face has them.

    ``config`` is the source's config.json for a folder target to carry on, {} where there was none;
    whatever pi-convert itself needs from it is parsed into the other fields. ``side_files`` are
    small files that a folder target copies (generation_config.json and such).
    """

    origin: Origin
    architecture: Architecture
    hparams: HParams
    rope: RopeParameters
    tensors: Mapping[str, Tensor]
    vocabulary: Vocabulary
    card: ModelCard
    groups: frozenset[str] = frozenset()  # tensor groups present, see architectures.spec
    config: Mapping[str, object] = field(default_factory=dict)
    side_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def artifact_name(self) -> str:
        """What an export is called: the model's name, and PI's factor where there is one."""
        factor = self.rope.factor
        return self.card.name if factor == 1.0 else f"{self.card.name}-PI{factor:g}"

    def interpolate(self, scale: float) -> Checkpoint:
        """The same checkpoint with its RoPE interpolated; no weight is touched."""
        return dataclasses.replace(self, rope=self.rope.interpolate(scale))
