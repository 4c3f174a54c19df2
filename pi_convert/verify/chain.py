"""The five links in order. A failed link does not stop those that can still run."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence

from converters.errors import ConvertError, EnvironmentNotReadyError
from converters.progress import Progress, silent
from converters.rope import RopeParameters
from converters.targets.gguf.ggml import load_ggml
from pi_convert.evaluate.windows import TokenStream, encode_documents
from pi_convert.runtimes.llamacpp import cores, load_in_child, require_device
from pi_convert.runtimes.pytorch import limit_threads
from pi_convert.verify import execution, gates, quality
from pi_convert.verify.request import Expected, Subject, VerifyRequest, expected_rope, open_artifact
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
    require_device(request.llamacpp)
    if request.llamacpp.threads is not None:
        limit_threads(request.llamacpp.threads)
    artifact = open_artifact(request.artifact, request.source)
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
        environment=_environment(request),
        expected_rope=_rope_text(expected),
        seconds=time.monotonic() - started,
    )


def _run(subject: Subject, reference: ReferenceEncoder, progress: Progress) -> list[LinkResult]:
    stream = _stream(subject, reference)
    links = [
        verify_rope(subject, stream, progress),
        verify_weights(subject, progress),
        verify_tokenizer(subject, reference, progress),
    ]
    if (reason := execution.cannot_run(subject)) is not None:
        return [*links, _not_run(LinkName.EXECUTION, reason), _not_run(LinkName.QUALITY, reason)]
    return [*links, *_executed(subject, stream, progress)]


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
    """Why the artifact cannot be run; loaded in a child process, since llama.cpp may abort."""
    artifact = subject.artifact
    if artifact.rope_problem is not None:
        return artifact.rope_problem
    problem = load_in_child(artifact.path)
    return None if problem is None else f"llama.cpp cannot load the file: {problem}"


def _not_loadable(subject: Subject, reason: str, progress: Progress) -> list[LinkResult]:
    links = [verify_stored_rope(subject, reason)]
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


_PACKAGES: Sequence[str] = (
    "llama-cpp-python",
    "torch",
    "transformers",
    "tokenizers",
    "gguf",
    "numpy",
)


def _environment(request: VerifyRequest) -> dict[str, str]:
    options = request.llamacpp
    attention = {None: "auto", True: "on", False: "off"}[options.flash_attention]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "quantizer": load_ggml().fingerprint(),
        "torch device": request.device,
        "llama.cpp device": options.device,
        "threads": str(options.threads or cores()),
        "ubatch": str(options.ubatch),
        "flash attention": attention,
        "kv cache": options.kv_cache_type,
        "gpu layers": str(options.n_gpu_layers or 0),
    }
