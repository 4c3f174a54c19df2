"""Link 2: every tensor of the source is in the artifact, and nothing else is.

Tensors are compared in Hugging Face's layout, chunk by chunk on a few threads. The oracle of what a
source's values are in another encoding is gguf-py for float types, libggml for its block types and
ONNX Runtime's quantizer for its own.
A file of another build of them cannot be the same in every byte: there each tensor's and each
row's error is held against that of quantizing here, and the share of blocks that differ.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from converters import nbits
from converters.encodings import NBITS, Encoding, decode_f32
from converters.errors import UnsupportedError
from converters.ggml import load_ggml
from converters.progress import Progress
from converters.rope.gguf import RECORD_PREFIX
from converters.targets.gguf.metadata import QUANTIZER_KEY
from converters.tensor import Tensor
from pi_convert.runtimes.llamacpp import cores
from pi_convert.verify import gates
from pi_convert.verify.encode import encode
from pi_convert.verify.mismatch import name_cause
from pi_convert.verify.provenance import SourceNote, source_note
from pi_convert.verify.request import Subject
from pi_convert.verify.verdict import LinkName, LinkResult, Status

Floats = npt.NDArray[np.float32]

_CHUNK_BYTES = 4 << 20  # of float32 values at once on a thread
_SHOWN = 4  # tensors whose cause is looked for
_MATRIX_PREFIX = "quantize.imatrix."  # keys that llama-quantize writes with an importance matrix


class Match(Enum):
    """How a tensor was found equal."""

    COPIED = "kept as stored in the source"
    EXACT = "float, bit for bit"
    REQUANTIZED = "equal to quantizing the source again"
    OTHER_BUILD = "quantized by another build, as near the source as this one's"
    UNTOLD = "of a type that cannot be made or read here"  # equal or not: nobody can tell


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor held against the source's."""

    name: str
    encoding: Encoding
    match: Match | None  # None: it is not the source's tensor
    differing_rows: int = 0
    first_row: int = 0
    distance: BuildDistance | None = None  # where another build was allowed


@dataclass(frozen=True, slots=True)
class BuildDistance:
    """How far a tensor of another build is from quantizing the source here."""

    error_ratio: float  # root mean square errors against the source, theirs over ours
    row_error_ratio: float  # the same of the worst row
    worst_row: int
    differing_blocks: float  # share

    def problem(self, encoding: Encoding, *, uses_matrix: bool) -> str | None:
        """Why no right build gives it; None where one can."""
        searched = encoding.name.endswith("_k") or encoding.name.startswith("iq")
        spread = gates.SEARCHED_SPREAD if searched else gates.DIRECT_SPREAD
        if not self.row_error_ratio <= spread.row_error_ratio:
            return (
                f"row {self.worst_row} has {self.row_error_ratio:.3g} times the error of quantizing"
                f" here, between builds at most {spread.row_error_ratio:g}"
            )
        if not self.error_ratio <= gates.OTHER_BUILD_ERROR_RATIO:
            return (
                f"it has {self.error_ratio:.3g} times the error of quantizing here, between builds"
                f" at most {gates.OTHER_BUILD_ERROR_RATIO:g}"
            )
        if self.differing_blocks > spread.differing_blocks and not uses_matrix:
            return (
                f"{self.differing_blocks:.2%} of its blocks differ from quantizing here, between"
                f" builds at most {spread.differing_blocks:.2%}, and no importance matrix is"
                " recorded"
            )
        return None


@dataclass(frozen=True, slots=True)
class Build:
    """What is known of the quantizer that made the artifact."""

    same: bool  # this machine's
    uses_matrix: bool = False


def verify_weights(subject: Subject, progress: Progress) -> LinkResult:
    """Compares sizes, the list of tensors, and every tensor's values."""
    results = _compare_all(subject, progress)
    findings = [*_list_findings(subject), *_value_findings(subject, results)]
    others = sum(result.match is Match.OTHER_BUILD for result in results)
    untold = [result for result in results if result.match is Match.UNTOLD]
    note = source_note(subject, progress)
    wrong = sum(result.match is None for result in results)
    if note is not None and not note.same_weights and wrong > len(results) / 2:
        findings.insert(0, f"--against is another model: {note.text}")
    status, summary = Status.PASSED, f"all {len(results)} tensors of the source, none over"
    if findings:
        status, summary = Status.FAILED, findings[0]
    elif untold:
        types = ", ".join(sorted({result.encoding.name for result in untold}))
        status = Status.INCONCLUSIVE
        summary = f"{len(untold)} tensors cannot be compared: {types} cannot be made or read here"
    return LinkResult(
        LinkName.WEIGHTS,
        status,
        summary,
        _measures(results),
        cause=findings[0] if findings else None,
        findings=tuple(findings),
        notes=tuple(_notes(subject, others, note)),
    )


def _list_findings(subject: Subject) -> Iterator[str]:
    """What is wrong with sizes and with the list of tensors."""
    artifact = subject.artifact
    yield from artifact.size_findings(subject.source.hparams)
    for name in artifact.missing:
        yield f"{name} is missing{_tied(name)}"
    for name in artifact.unexpected:
        yield f"{name} is not a tensor of the source{_untied(name)}"
    yield from artifact.misshapen


def _value_findings(subject: Subject, results: Sequence[TensorResult]) -> Iterator[str]:
    """The causes of the first tensors that differ."""
    tensors = subject.artifact.tensors
    wrong = [result for result in results if result.match is None]
    # Matrices first: their cause is told with more certainty than a norm's.
    wrong.sort(key=lambda result: len(tensors[result.name].shape) == 1)
    for result in wrong[:_SHOWN]:
        yield _cause(subject, result)
    if len(wrong) > _SHOWN:
        yield f"and {len(wrong) - _SHOWN} more tensors differ"


def _measures(results: Sequence[TensorResult]) -> dict[str, float | int | str]:
    measures: dict[str, float | int | str] = {"tensors": len(results)}
    for match in Match:
        if count := sum(result.match is match for result in results):
            measures[match.value] = count
    others = [result for result in results if result.match is Match.OTHER_BUILD]
    if distances := [result.distance for result in others if result.distance]:
        measures["largest error over this build's"] = max(d.error_ratio for d in distances)
        measures["largest of one row"] = max(d.row_error_ratio for d in distances)
        measures["largest share of differing blocks"] = max(d.differing_blocks for d in distances)
    if wrong := sum(result.match is None for result in results):
        measures["tensors that differ"] = wrong
    return measures


def _cause(subject: Subject, result: TensorResult) -> str:
    named = name_cause(subject, result.name, result.differing_rows, result.first_row)
    if result.distance is None:
        return named
    build = _build(subject, result.encoding)
    return f"{named}; {result.distance.problem(result.encoding, uses_matrix=build.uses_matrix)}"


def _build(subject: Subject, encoding: Encoding) -> Build:
    """Of the quantizer that made the artifact's tensors of ``encoding``."""
    keys = subject.artifact.record
    if encoding.is_float:
        return Build(same=True)
    if encoding in NBITS:
        recorded = keys.get(f"{RECORD_PREFIX}{nbits.FINGERPRINT_KEY}")
        return Build(same=recorded == nbits.fingerprint(encode))
    return Build(
        same=keys.get(QUANTIZER_KEY) == load_ggml().fingerprint(),
        uses_matrix=any(key.startswith(_MATRIX_PREFIX) for key in keys),
    )


def _notes(subject: Subject, others: int, note: SourceNote | None) -> Iterator[str]:
    if others:
        recorded = QUANTIZER_KEY in subject.artifact.record
        reason = "records another build's" if recorded else "does not record its"
        yield f"{others} tensors judged by their error: the file {reason} quantizer"
    if note is not None:
        yield note.text


def _tied(gguf_name: str) -> str:
    head = gguf_name == "output.weight"
    return ": llama.cpp uses the token embedding in its place" if head else ""


def _untied(gguf_name: str) -> str:
    head = gguf_name == "output.weight"
    return ", whose head is its token embedding" if head else ""


def _compare_all(subject: Subject, progress: Progress) -> list[TensorResult]:
    artifact, source = subject.artifact, subject.source
    pairs = [(tensor, source.tensors[name]) for name, tensor in artifact.tensors.items()]
    builds = {tensor.encoding: _build(subject, tensor.encoding) for tensor, _ in pairs}
    results = []
    with ThreadPoolExecutor(min(cores(), os.cpu_count() or 1)) as pool:
        jobs = pool.map(
            lambda pair: compare_tensor(pair[0], pair[1], builds[pair[0].encoding]), pairs
        )
        for done, result in enumerate(jobs, start=1):
            results.append(result)
            progress("comparing weights", done, len(pairs))
    return results


def compare_tensor(found: Tensor, source: Tensor, build: Build) -> TensorResult:
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
    wrong = TensorResult(found.name, found.encoding, None, differing, first)
    if build.same or copied or found.encoding.is_float:
        return wrong
    try:
        distance = _distance(found, source, rows)
    except UnsupportedError:  # such as one that takes an importance matrix
        return dataclasses.replace(wrong, match=Match.UNTOLD)
    problem = distance.problem(found.encoding, uses_matrix=build.uses_matrix)
    match_other = Match.OTHER_BUILD if problem is None else None
    return dataclasses.replace(wrong, match=match_other, distance=distance)


def _unequal_rows(found: Tensor, source: Tensor, start: int, stop: int) -> npt.NDArray[np.bool_]:
    raw = found.read_rows(start, stop)
    if found.encoding is source.encoding:
        expected = source.read_rows(start, stop)
    else:
        try:
            expected = encode(source.read_f32(start, stop), found.encoding)
        except UnsupportedError:  # it takes an importance matrix, which is not here
            return np.ones(stop - start, dtype=np.bool_)
    unequal: npt.NDArray[np.bool_] = np.any(raw != expected, axis=1)
    return unequal


def _distance(found: Tensor, source: Tensor, rows: Sequence[tuple[int, int]]) -> BuildDistance:
    """``found`` against quantizing the source here, from its own values or from their f16.

    llama.cpp's converter goes through an f16 file: a block that equals either is no difference,
    and a row is held against the larger of the two errors. Raises ``UnsupportedError`` for a type
    that cannot be made or read here.
    """
    theirs, ours = np.zeros(found.rows), np.zeros(found.rows)  # squared, by row
    differing = 0
    for start, stop in rows:
        values, raw = source.read_f32(start, stop), found.read_rows(start, stop)
        theirs[start:stop] = _squared(found.read_f32(start, stop) - values)
        floor = gates.LEAST_RELATIVE_ERROR**2 * _squared(values)
        differs = np.ones(raw.size // found.encoding.block_bytes, dtype=np.bool_)
        for origin in _origins(values):
            again = encode(origin, found.encoding)
            error = _squared(decode_f32(again, found.encoding) - values)
            ours[start:stop] = np.maximum.reduce([ours[start:stop], error, floor])
            unequal = (raw != again).reshape(-1, found.encoding.block_bytes)
            differs &= unequal.any(axis=1)
        differing += int(differs.sum())
    ratios = np.sqrt(np.divide(theirs, ours, out=np.where(theirs > 0, np.inf, 1.0), where=ours > 0))
    ratios[~np.isfinite(ratios)] = np.inf
    worst = int(ratios.argmax())
    whole = np.sqrt(theirs.sum() / ours.sum()) if ours.any() else ratios[worst]
    blocks = found.elements // found.encoding.block_elements
    return BuildDistance(float(whole), float(ratios[worst]), worst, differing / blocks)


def _origins(values: Floats) -> Iterator[Floats]:
    """The values, and their f16 where f16 holds them and is not the same."""
    yield values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    if np.isfinite(half).all() and not np.array_equal(half, values):
        yield half


def _squared(rows: Floats) -> npt.NDArray[np.float64]:
    """The squared length of every row."""
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be inf or nan
        squared: npt.NDArray[np.float64] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return squared
