"""What verification is asked, and what every link works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.gguf import GgufFile, read_gguf_file
from converters.errors import RopeError
from converters.rope import RopeParameters
from converters.rope.gguf import DIVISORS_TENSOR, EffectiveRope, effective_rope
from converters.targets.gguf.metadata import VERSION_KEY
from converters.tensor import Tensor
from converters.transforms import deinterleave_rope
from pi_convert.evaluate.texts import Document, default_documents
from pi_convert.runtimes.llamacpp import ImposedRope, LlamaCppModel, LlamaCppOptions
from pi_convert.verify.verdict import Preset


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """An artifact, the source it was made from, and the scale the export was asked for.

    ``scale`` never comes from the artifact: None proves only what the source itself says.
    ``texts`` empty means the default text. ``device`` is torch's; llama.cpp has its own.
    """

    artifact: Path
    source: Checkpoint
    scale: float | None
    preset: Preset = "quick"
    texts: tuple[Document, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    llamacpp: LlamaCppOptions = field(default_factory=LlamaCppOptions)
    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def documents(self) -> tuple[Document, ...]:
        """The texts, or the default ones."""
        return self.texts or default_documents()


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact, read as far as it can be; what is wrong with it is kept, not raised.

    ``tensors`` are those of the source's that it has in the right shape, under Hugging Face's
    names, laid out as there, in the artifact's own encodings.
    """

    file: GgufFile
    architecture: str
    keys: Mapping[str, object]  # without the architecture's prefix
    rope: EffectiveRope | None
    rope_problem: str | None  # why llama.cpp could not load it
    tensors: Mapping[str, Tensor]
    missing: tuple[str, ...]  # GGUF names
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]  # name, shape and the shape expected

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def is_ours(self) -> bool:
        """Whether the file says that pi-convert wrote it."""
        return VERSION_KEY in self.file.keys

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the source is there, in shape."""
        return not (self.missing or self.misshapen)

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is stored in blocks."""
        return any(not tensor.encoding.is_float for tensor in self.tensors.values())


def open_artifact(path: Path, source: Checkpoint) -> Artifact:
    """Reads the header. Raises ``SourceError`` where the file is no whole GGUF."""
    file = read_gguf_file(path)
    architecture, keys = file.architecture, file.scoped_keys()
    divisors = None
    if DIVISORS_TENSOR in file.tensors:
        tensor = file.tensor(DIVISORS_TENSOR)
        divisors = tensor.read_f32(0, tensor.rows).reshape(-1)
    rope, problem = None, None
    try:
        rope = effective_rope(keys, divisors, rotary_dim=source.hparams.head_dim, where=path.name)
    except RopeError as error:
        problem = error.message
    tensors: dict[str, Tensor] = {}
    missing, misshapen = [], []
    expected = list(source.architecture.expected_tensors(source.hparams, source.groups))
    for name, gguf, shape, spec in expected:
        found = file.tensors.get(gguf)
        if found is None:
            missing.append(gguf)
        elif found.shape != shape:
            misshapen.append(f"{gguf} is {list(found.shape)}, expected {list(shape)}")
        else:
            heads = source.architecture.rope_heads(spec, source.hparams)
            renamed = dataclasses.replace(file.tensor(gguf), name=name)
            tensors[name] = deinterleave_rope(renamed, heads) if heads else renamed
    known = {gguf for _, gguf, _, _ in expected} | {DIVISORS_TENSOR}
    return Artifact(
        file=file,
        architecture=architecture,
        keys=keys,
        rope=rope,
        rope_problem=problem,
        tensors=tensors,
        missing=tuple(missing),
        unexpected=tuple(name for name in file.tensors if name not in known),
        misshapen=tuple(misshapen),
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """The RoPE that the artifact is held against, and whether anybody stated it.

    ``claimed`` is the factor taken from the artifact where nobody did: nothing can be proven then.
    """

    rope: RopeParameters
    claimed: float | None = None


def expected_rope(request: VerifyRequest, artifact: Artifact) -> Expected:
    """interpolate(source's RoPE, scale); a source that is scaled itself needs no scale."""
    source = request.source.rope
    if request.scale is not None:
        return Expected(source.interpolate(request.scale))
    if source.factor != 1.0:
        return Expected(source)
    claim = 1.0 if artifact.rope is None else float(str(np.float32(artifact.rope.factor)))
    return Expected(source.interpolate(max(1.0, claim)), claimed=claim)


@dataclass(frozen=True, slots=True)
class Subject:
    """What every link is given."""

    request: VerifyRequest
    artifact: Artifact
    expected: Expected

    @property
    def source(self) -> Checkpoint:
        """The checkpoint the artifact was made from."""
        return self.request.source

    def own_weights(self) -> Checkpoint:
        """The artifact's own dequantized weights, with the expected RoPE."""
        return dataclasses.replace(
            self.source, tensors=self.artifact.tensors, rope=self.expected.rope
        )

    def load(self, imposed: ImposedRope | None = None) -> LlamaCppModel:
        """The artifact in llama.cpp, as it is or with a RoPE imposed."""
        return LlamaCppModel(
            self.artifact.path, self.artifact.architecture, self.request.llamacpp, imposed
        )
