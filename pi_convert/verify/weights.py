"""Link 2: every tensor of the source is in the artifact, and nothing else is.

Tensors are compared in Hugging Face's layout, chunk by chunk on a few threads. The oracle of what a
source's values are in another encoding is gguf-py for float types and libggml for block types.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from converters.architectures.hparams import read_gguf_hparams
from converters.encodings import Encoding, decode_f32
from converters.errors import SourceError, UnsupportedError
from converters.progress import Progress
from converters.targets.gguf.ggml import load_ggml
from converters.tensor import Tensor
from pi_convert.runtimes.llamacpp import cores
from pi_convert.verify import gates
from pi_convert.verify.encode import encode
from pi_convert.verify.mismatch import name_cause
from pi_convert.verify.request import QUANTIZER_KEY, Subject
from pi_convert.verify.verdict import LinkName, LinkResult, Status

_CHUNK_BYTES = 4 << 20  # of float32 values at once on a thread
_SHOWN = 4  # tensors whose cause is looked for


class Match(Enum):
    """How a tensor was found equal."""

    COPIED = "kept as stored in the source"
    EXACT = "float, bit for bit"
    REQUANTIZED = "equal to quantizing the source again"
    OTHER_BUILD = "quantized by another build, as near the source as this one's"


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor held against the source's."""

    name: str
    encoding: Encoding
    match: Match | None  # None: it is not the source's tensor
    differing_rows: int = 0
    first_row: int = 0
    error_ratio: float = 0.0  # of another build's: its error over ours


def verify_weights(subject: Subject, progress: Progress) -> LinkResult:
    """Compares sizes, the list of tensors, and every tensor's values."""
    artifact = subject.artifact
    findings = [
        *_size_findings(subject),
        *(f"{name} is missing{_tied(name)}" for name in artifact.missing),
        *(f"{name} is not a tensor of the source{_untied(name)}" for name in artifact.unexpected),
        *artifact.misshapen,
    ]
    results = _compare_all(subject, progress)
    wrong = [result for result in results if result.match is None]
    # Matrices first: their cause is told with more certainty than a norm's.
    wrong.sort(key=lambda result: len(artifact.tensors[result.name].shape) == 1)
    for result in wrong[:_SHOWN]:
        findings.append(name_cause(subject, result.name, result.differing_rows, result.first_row))
    if len(wrong) > _SHOWN:
        findings.append(f"and {len(wrong) - _SHOWN} more tensors differ")
    measures: dict[str, float | int | str] = {"tensors": len(results)}
    for match in Match:
        if count := sum(result.match is match for result in results):
            measures[match.value] = count
    others = [result for result in results if result.match is Match.OTHER_BUILD]
    if others:
        measures["largest error over this build's"] = max(r.error_ratio for r in others)
    if wrong:
        measures["tensors that differ"] = len(wrong)
    notes = _notes(subject, len(others))
    if findings:
        return LinkResult(
            LinkName.WEIGHTS,
            Status.FAILED,
            findings[0],
            measures,
            cause=findings[0],
            findings=tuple(findings),
            notes=notes,
        )
    summary = f"all {len(results)} tensors of the source, none over"
    return LinkResult(LinkName.WEIGHTS, Status.PASSED, summary, measures, notes=notes)


def _notes(subject: Subject, others: int) -> tuple[str, ...]:
    if not others:
        return ()
    recorded = QUANTIZER_KEY in subject.artifact.file.keys
    reason = "records another build's" if recorded else "does not record its"
    return (f"{others} tensors judged by their error: the file {reason} quantizer",)


def _tied(gguf_name: str) -> str:
    head = gguf_name == "output.weight"
    return ": llama.cpp uses the token embedding in its place" if head else ""


def _untied(gguf_name: str) -> str:
    head = gguf_name == "output.weight"
    return ", whose head is its token embedding" if head else ""


def _size_findings(subject: Subject) -> Iterator[str]:
    artifact, expected = subject.artifact, subject.source.hparams
    try:
        found = read_gguf_hparams(
            artifact.keys,
            vocab_size=expected.vocab_size,
            tied_embeddings=expected.tied_embeddings,
            where=artifact.path.name,
        )
    except SourceError as error:
        yield error.message
        return
    for field in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
        have, want = getattr(found, field), getattr(expected, field)
        if have != want:
            yield f"{field} is {have}, the source's is {want}"
    if np.float32(found.norm_eps) != np.float32(expected.norm_eps):
        yield f"norm_eps is {found.norm_eps:g}, the source's is {expected.norm_eps:g}"


def _compare_all(subject: Subject, progress: Progress) -> list[TensorResult]:
    artifact, source = subject.artifact, subject.source
    same_build = (
        artifact.file.keys.get(QUANTIZER_KEY) == load_ggml().fingerprint()
        if artifact.is_quantized
        else True
    )
    pairs = [(tensor, source.tensors[name]) for name, tensor in artifact.tensors.items()]
    results = []
    with ThreadPoolExecutor(min(cores(), os.cpu_count() or 1)) as pool:
        jobs = pool.map(lambda pair: compare_tensor(*pair, same_build=same_build), pairs)
        for done, result in enumerate(jobs, start=1):
            results.append(result)
            progress("comparing weights", done, len(pairs))
    return results


def compare_tensor(found: Tensor, source: Tensor, *, same_build: bool) -> TensorResult:
    """``found`` against ``source`` put into its encoding; both laid out alike."""
    step = max(1, _CHUNK_BYTES // (4 * found.row_elements))
    rows = [(start, min(start + step, found.rows)) for start in range(0, found.rows, step)]
    differing, first = 0, -1
    for start, stop in rows:
        unequal = _unequal_rows(found, source, start, stop)
        if unequal.any():
            first = start + int(unequal.argmax()) if first < 0 else first
            differing += int(unequal.sum())
    copied = found.encoding is source.encoding
    if not differing:
        block = Match.COPIED if copied else Match.REQUANTIZED
        match = Match.EXACT if found.encoding.is_float else block
        return TensorResult(found.name, found.encoding, match)
    if same_build or copied or found.encoding.is_float:
        return TensorResult(found.name, found.encoding, None, differing, first)
    ratio = _error_ratio(found, source, rows)
    match_other = Match.OTHER_BUILD if ratio <= gates.OTHER_BUILD_ERROR_RATIO else None
    return TensorResult(found.name, found.encoding, match_other, differing, first, ratio)


def _unequal_rows(found: Tensor, source: Tensor, start: int, stop: int) -> npt.NDArray[np.bool_]:
    raw = found.read_rows(start, stop)
    if found.encoding is source.encoding:
        expected = source.read_rows(start, stop)
    else:
        try:
            expected = encode(source.read_f32(start, stop), found.encoding)
        except UnsupportedError:  # made with an importance matrix: judged by its error alone
            return np.ones(stop - start, dtype=np.bool_)
    unequal: npt.NDArray[np.bool_] = np.any(raw != expected, axis=1)
    return unequal


def _error_ratio(found: Tensor, source: Tensor, rows: Sequence[tuple[int, int]]) -> float:
    """Squared errors over all rows, the artifact's over this build's, as a ratio of roots."""
    theirs = ours = 0.0
    try:
        for start, stop in rows:
            values = source.read_f32(start, stop)
            theirs += _squared(found.read_f32(start, stop) - values)
            again = decode_f32(encode(values, found.encoding), found.encoding)
            ours += _squared(again - values)
    except UnsupportedError:  # no way to make or to read this type here
        return float("inf")
    return float(np.sqrt(theirs / ours)) if ours and np.isfinite(theirs) else float("inf")


def _squared(difference: npt.NDArray[np.float32]) -> float:
    flat = difference.reshape(-1).astype(np.float64)
    return float(flat @ flat)
