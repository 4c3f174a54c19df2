"""The five links in order. A failed link does not stop those that can still run."""

from __future__ import annotations

import importlib.metadata
import platform
import time

from converters.errors import ConvertError, EnvironmentNotReadyError
from converters.ggml import load_ggml
from converters.progress import Progress, silent
from converters.rope import RopeParameters
from pi_convert.evaluate import statistics
from pi_convert.evaluate.windows import TokenStream, encode_documents
from pi_convert.runtimes.llamacpp import require_device
from pi_convert.runtimes.ort import require_provider
from pi_convert.runtimes.pytorch import limit_threads
from pi_convert.verify import execution, gates, quality
from pi_convert.verify.artifact import Artifact
from pi_convert.verify.folder_tokenizer import verify_folder_tokenizer
from pi_convert.verify.gguf_artifact import GgufArtifact
from pi_convert.verify.onnx_artifact import OnnxArtifact
from pi_convert.verify.onnx_rope import verify_onnx_rope, verify_stored_onnx_rope
from pi_convert.verify.request import (
    Expected,
    Subject,
    VerifyRequest,
    expected_rope,
    is_onnx,
    open_artifact,
)
from pi_convert.verify.rope import verify_rope, verify_stored_rope
from pi_convert.verify.tokenizer_reference import ReferenceEncoder, reference_encoder
from pi_convert.verify.verdict import LinkName, LinkResult, Status, Verdict
from pi_convert.verify.vocabulary import verify_tokenizer
from pi_convert.verify.weights import verify_weights


def verify(request: VerifyRequest, progress: Progress = silent) -> Verdict:
    """What the five links say of the artifact.

    Faults of the artifact are in the verdict. Raised are only ``SourceError`` where it is no whole
    GGUF, ``EnvironmentNotReadyError`` where torch, llama.cpp, the device or memory is missing,
    ``UnsupportedError`` where transformers refuses the source's sizes, and ``RopeError`` where the
    scale cannot be applied.
    """
    started = time.monotonic()
    _require_runtime(request)
    artifact = open_artifact(request)
    expected = expected_rope(request, artifact)
    subject = Subject(request, artifact, expected)
    reference = reference_encoder(request.source.vocabulary)
    if artifact.architecture != request.source.architecture.gguf_name:
        links = _other_architecture(subject)
    elif (problem := _load_problem(subject)) is not None:
        links = _not_loadable(subject, problem, progress)
    else:
        links = _run(subject, reference, progress)
    return Verdict(
        artifact=request.artifact.name,
        source=request.source.origin.label,
        preset=request.preset,
        links=tuple(links),
        environment=_environment(request, artifact),
        expected_rope=_rope_text(expected),
        seconds=time.monotonic() - started,
    )


def _require_runtime(request: VerifyRequest) -> None:
    threads = request.llamacpp.threads
    if is_onnx(request.artifact):
        require_provider(request.ort)
        threads = request.ort.threads
    else:
        require_device(request.llamacpp)
    if threads is not None:
        limit_threads(threads)
        statistics.limit_threads(threads)


def _run(subject: Subject, reference: ReferenceEncoder, progress: Progress) -> list[LinkResult]:
    stream = _stream(subject, reference)
    links = [
        _rope(subject, stream, progress),
        verify_weights(subject, progress),
        _tokenizer(subject, reference, progress),
    ]
    if (reason := execution.cannot_run(subject)) is not None:
        return [*links, _not_run(LinkName.EXECUTION, reason), _not_run(LinkName.QUALITY, reason)]
    return [*links, *_executed(subject, stream, progress)]


def _rope(subject: Subject, stream: TokenStream, progress: Progress) -> LinkResult:
    match subject.artifact:
        case GgufArtifact() as gguf:
            return verify_rope(subject, gguf, stream, progress)
        case OnnxArtifact() as onnx:
            return verify_onnx_rope(subject, onnx, stream, progress)
    raise TypeError(type(subject.artifact))


def _stored_rope(subject: Subject, reason: str) -> LinkResult:
    match subject.artifact:
        case GgufArtifact() as gguf:
            return verify_stored_rope(subject, gguf, reason)
        case OnnxArtifact() as onnx:
            return verify_stored_onnx_rope(subject, onnx, reason)
    raise TypeError(type(subject.artifact))


def _tokenizer(subject: Subject, reference: ReferenceEncoder, progress: Progress) -> LinkResult:
    if isinstance(subject.artifact, OnnxArtifact):
        return verify_folder_tokenizer(subject, subject.artifact, reference, progress)
    return verify_tokenizer(subject, reference, progress)


def _executed(subject: Subject, stream: TokenStream, progress: Progress) -> list[LinkResult]:
    windows = execution.choose_windows(stream, subject.expected.rope, subject.request.preset)
    try:
        with execution.open_oracles(subject, progress) as oracles:
            measured = execution.measure(subject, oracles, windows, progress)
            worth = _worth(subject, measured, oracles, stream, progress)
        return [execution.judge(subject, measured, windows, progress), worth]
    except EnvironmentNotReadyError:
        raise
    except ConvertError as error:
        return [
            execution.failed(error, LinkName.EXECUTION),
            _not_run(LinkName.QUALITY, "the artifact cannot be run"),
        ]


def _worth(
    subject: Subject,
    measured: execution.Execution,
    oracles: execution.Oracles,
    stream: TokenStream,
    progress: Progress,
) -> LinkResult:
    """Link 5; what stops it says nothing against link 4, which has been measured."""
    try:
        if subject.request.preset == "full":
            return quality.judge_quality(subject, measured, oracles, stream, progress)
        return quality.report_quality(subject, measured)
    except EnvironmentNotReadyError:
        raise
    except ConvertError as error:
        return execution.failed(error, LinkName.QUALITY)


def _stream(subject: Subject, reference: ReferenceEncoder) -> TokenStream:
    """The texts as the source's tokenizer gives them, as long as any window needs."""
    rope = subject.expected.rope
    need = int(rope.original_context * gates.FULL_WINDOW) + gates.CONTROL_TOKENS
    if subject.request.preset == "full":
        need = max(need, gates.QUALITY_DOCUMENTS * gates.QUALITY_DOCUMENT_TOKENS)

    def encode(text: str) -> list[int]:
        return reference.encode(reference.prepare(text), add_special=False, parse_special=False)

    return encode_documents(subject.request.documents(), encode, at_least=need)


def _other_architecture(subject: Subject) -> list[LinkResult]:
    reason = (
        f"the artifact is {subject.artifact.architecture},"
        f" the source is {subject.source.architecture.gguf_name}"
    )
    return [
        _not_run(name, reason)
        if name is not LinkName.WEIGHTS
        else LinkResult(name, Status.FAILED, reason, cause=reason, findings=(reason,))
        for name in LinkName
    ]


def _load_problem(subject: Subject) -> str | None:
    """Why the artifact cannot be run."""
    artifact = subject.artifact
    return artifact.rope_problem or artifact.load_problem()


def _not_loadable(subject: Subject, reason: str, progress: Progress) -> list[LinkResult]:
    links = [_stored_rope(subject, reason)]
    links += [verify_weights(subject, progress), _not_run(LinkName.TOKENIZER, reason)]
    links += [LinkResult(LinkName.EXECUTION, Status.FAILED, reason, cause=reason)]
    return [*links, _not_run(LinkName.QUALITY, reason)]


def _not_run(name: LinkName, reason: str) -> LinkResult:
    return LinkResult(name, Status.NOT_RUN, reason)


def _rope_text(expected: Expected) -> str:
    rope: RopeParameters = expected.rope
    claim = "" if expected.claimed is None else " (claimed by the artifact alone)"
    return (
        f"{rope.kind}, factor {rope.factor:g}, theta {rope.theta:g},"
        f" L {rope.original_context:,}, L' {rope.context:,}{claim}"
    )


_PACKAGES = ("torch", "transformers", "tokenizers", "gguf", "numpy")


def _environment(request: VerifyRequest, artifact: Artifact) -> dict[str, str]:
    packages = (*artifact.packages, *_PACKAGES)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{package: importlib.metadata.version(package) for package in packages},
        "quantizer": load_ggml().fingerprint(),
        "torch device": request.device,
        **artifact.environment(),
    }
