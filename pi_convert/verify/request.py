"""What verification is asked, and what every link works on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converters.checkpoint import Checkpoint
from converters.rope import RopeParameters
from pi_convert.evaluate.texts import Document, default_documents
from pi_convert.runtimes.llamacpp import LlamaCppOptions
from pi_convert.runtimes.ort import OrtOptions
from pi_convert.verify.artifact import Artifact
from pi_convert.verify.gguf_artifact import open_gguf_artifact
from pi_convert.verify.onnx_artifact import open_onnx_artifact
from pi_convert.verify.verdict import Preset


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """An artifact, the source it was made from, and the scale the export was asked for.

    ``scale`` never comes from the artifact: None proves only what the source itself says.
    ``texts`` empty means the default text. ``device`` is torch's; the others have their own.
    """

    artifact: Path
    source: Checkpoint
    scale: float | None
    preset: Preset = "quick"
    texts: tuple[Document, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    llamacpp: LlamaCppOptions = field(default_factory=LlamaCppOptions)
    ort: OrtOptions = field(default_factory=OrtOptions)
    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def documents(self) -> tuple[Document, ...]:
        """The texts, or the default ones."""
        return self.texts or default_documents()


def is_onnx(path: Path) -> bool:
    """Whether an artifact is an ONNX file; anything else is taken for a GGUF."""
    return path.suffix == ".onnx"


def open_artifact(request: VerifyRequest) -> Artifact:
    """Reads the artifact's header. Raises ``SourceError`` where it is no whole GGUF or ONNX."""
    if is_onnx(request.artifact):
        return open_onnx_artifact(request.artifact, request.source, request.ort)
    return open_gguf_artifact(request.artifact, request.source, request.llamacpp)


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
    claim = 1.0 if artifact.claimed_factor is None else artifact.claimed_factor
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
