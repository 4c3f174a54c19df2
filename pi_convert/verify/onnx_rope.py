"""Link 1 of an ONNX file: its tables are the expected RoPE's, and they are what it rotates by."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from converters.containers.onnx import companion_folder
from converters.errors import SourceError
from converters.progress import Progress
from converters.rope.parameters import FloatArray, RopeParameters, uniform_ratio
from pi_convert.evaluate.statistics import kl_divergence
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep
from pi_convert.runtimes.base import Logits
from pi_convert.runtimes.onnx_tables import (
    Tables,
    nearest_ulp,
    recovered_frequencies,
    right_tables,
    tolerance,
)
from pi_convert.runtimes.pytorch import build_rotary, reference_rope
from pi_convert.verify import gates
from pi_convert.verify.onnx_artifact import OnnxArtifact, stored_rope
from pi_convert.verify.request import Subject
from pi_convert.verify.rope_result import largest_difference, rope_result
from pi_convert.verify.verdict import Control, LinkName, LinkResult, Status

_LOADS = 4
# Frequencies recovered from float32 tables spread by 1e-6 around one factor, from float16 by 5e-3.
_ONE_FACTOR = 1e-2


def verify_onnx_rope(
    subject: Subject, artifact: OnnxArtifact, stream: TokenStream, progress: Progress
) -> LinkResult:
    """Tables against transformers' frequencies, then the run against runs with tables imposed."""
    expected = subject.expected
    findings, measures = _stored(subject, artifact)
    if artifact.tables is None:
        return rope_result(expected, findings, measures)
    control, unseen = None, None
    try:
        identity = _Identity(subject, artifact, artifact.tables, stream, progress)
        difference, kl = identity.difference(None)
        measures["identity: largest logit difference"] = difference
        measures["identity: mean KL"] = kl
        torch_kl = None
        if not artifact.is_quantized:  # rounded activations flip by a table's last bit
            torch_kl = identity.difference(identity.torch_tables())[1]
            measures["torch's tables imposed: mean KL"] = torch_kl
        findings += _identity_findings(identity, artifact, difference, torch_kl)
        control, unseen = _control(identity, expected.rope, torch_kl)
    except SourceError as error:  # ONNX Runtime refuses the file or its tokens
        findings.append(error.message)
    return rope_result(expected, findings, measures, control, unseen)


def verify_stored_onnx_rope(subject: Subject, artifact: OnnxArtifact, reason: str) -> LinkResult:
    """Tables and files alone, where ONNX Runtime cannot run the file for ``reason``."""
    findings, measures = _stored(subject, artifact)
    if findings:
        return rope_result(subject.expected, findings, measures)
    return LinkResult(LinkName.ROPE, Status.NOT_RUN, f"stored right; {reason}", measures)


def _stored(
    subject: Subject, artifact: OnnxArtifact
) -> tuple[list[str], dict[str, float | int | str]]:
    """What is wrong with the tables and the files beside the graph, and the values."""
    expected, tables = subject.expected.rope, artifact.tables
    if tables is None:
        return [artifact.rope_problem or "it has no tables"], {}
    reference, attention = reference_rope(subject.source, expected)
    findings = [*_table_findings(tables, expected, reference, attention, artifact)]
    findings += _record_findings(artifact, expected)
    findings += _folder_findings(artifact, subject, reference)
    measures: dict[str, float | int | str] = {
        "table positions": tables.rows,
        "factor recovered": _recovered_factor(tables, expected, reference),
        "attention factor": tables.amplitude(),
    }
    return findings, measures


def _table_findings(
    tables: Tables,
    expected: RopeParameters,
    reference: FloatArray,
    attention: float,
    artifact: OnnxArtifact,
) -> Iterator[str]:
    if tables.rotary_dim != expected.rotary_dim:
        yield f"the tables rotate {tables.rotary_dim} channels, expected {expected.rotary_dim}"
        return
    if tables.rows < expected.context:
        yield f"the tables have {tables.rows:,} positions, L' is {expected.context:,}"
    if abs(tables.amplitude() - attention) > tolerance(tables):
        yield f"the tables are multiplied by {tables.amplitude():g}, expected {attention:g}"
    limit = gates.OUR_FREQUENCY_ULP if artifact.is_ours else gates.OTHER_FREQUENCY_ULP
    off = nearest_ulp(tables, reference, attention, limit)
    wrong = [column for column, ulp in enumerate(off) if ulp > limit]
    if wrong:
        yield _frequency_finding(tables, expected, reference, wrong)


def _frequency_finding(
    tables: Tables, expected: RopeParameters, reference: FloatArray, wrong: list[int]
) -> str:
    """Names the factor or theta that explains the tables, where one does."""
    factor = _recovered_factor(tables, expected, reference)
    if isinstance(factor, float) and abs(factor / expected.factor - 1) > 1e-6:
        dropped = " (dropped)" if abs(factor - 1) < _ONE_FACTOR / 10 else ""
        return f"the tables are of factor {factor:.8g}{dropped}, expected {expected.factor:.8g}"
    theta = _recovered_theta(tables, expected)
    if theta is not None:
        return f"the tables are of theta {theta:g}, expected {expected.theta:g}"
    return (
        f"{len(wrong)} of {len(reference)} columns are not of the expected frequencies,"
        f" first column {wrong[0]}"
    )


def _recovered_factor(
    tables: Tables, expected: RopeParameters, reference: FloatArray
) -> float | str:
    """The one factor by which the tables' frequencies lie below those of factor 1."""
    if tables.rotary_dim != expected.rotary_dim:
        return "other dimension"
    found = recovered_frequencies(tables)
    base = (reference.astype(np.float64) * expected.factor).astype(np.float64)
    if not (np.isfinite(found).all() and (found > 0).all()):
        return "none"
    ratio = uniform_ratio(base, found, tolerance=_ONE_FACTOR)  # type: ignore[arg-type]
    return "none" if ratio is None else ratio


def _recovered_theta(tables: Tables, expected: RopeParameters) -> float | None:
    """The theta that gives every recovered frequency with the expected factor, if one does."""
    found = recovered_frequencies(tables) * expected.factor
    if expected.llama3 is not None or not (found > 0).all():
        return None
    exponents = np.arange(1, len(found)) * 2 / expected.rotary_dim
    thetas = np.exp(-np.log(found[1:]) / exponents)
    middle = float(np.median(thetas))
    return middle if np.abs(thetas / middle - 1).max() < _ONE_FACTOR else None


def _record_findings(artifact: OnnxArtifact, expected: RopeParameters) -> Iterator[str]:
    """The file's own record, where it has one."""
    record = stored_rope(artifact)
    wanted = {
        "factor": expected.factor,
        "theta": expected.theta,
        "original_context": expected.original_context,
        "context": expected.context,
    }
    for key, value in wanted.items():
        if record and record.get(key) != value:
            yield f"the recorded {key} is {record.get(key)}, expected {value:g}"


def _folder_findings(
    artifact: OnnxArtifact, subject: Subject, reference: FloatArray
) -> Iterator[str]:
    """config.json as transformers reads it, and genai_config.json: what clients go by."""
    folder, expected = companion_folder(artifact.path), subject.expected.rope
    if (folder / "config.json").is_file():
        yield from _config_findings(str(folder), subject, reference)
    genai = folder / "genai_config.json"
    if genai.is_file():
        try:
            context = json.loads(genai.read_text("utf-8"))["model"]["context_length"]
        except (ValueError, KeyError, TypeError) as error:
            yield f"genai_config.json cannot be read: {error!r}"
            return
        if context != expected.context:
            yield f"genai_config.json says context_length {context}, expected {expected.context}"


def _config_findings(folder: str, subject: Subject, reference: FloatArray) -> Iterator[str]:
    import transformers

    expected = subject.expected.rope
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        yield f"transformers cannot read config.json: {error}"
        return
    if config.max_position_embeddings != expected.context:
        yield (
            f"config.json says max_position_embeddings {config.max_position_embeddings},"
            f" expected {expected.context}"
        )
    if expected.llama3 is not None and expected.factor != 1.0:
        return  # transformers has no kind for PI over llama3
    rotary = type(build_rotary(subject.source, expected))
    found = rotary(config).inv_freq.cpu().numpy()
    if found.shape != reference.shape or not np.allclose(found, reference, rtol=1e-6, atol=0):
        ratio = uniform_ratio(reference, found, tolerance=1e-3)
        by = "" if ratio is None else f": they lie {ratio:.6g} times lower"
        yield f"config.json gives transformers other frequencies{by}"


def _identity_findings(
    identity: _Identity, artifact: OnnxArtifact, difference: float, torch_kl: float | None
) -> Iterator[str]:
    """Another tool's tables may differ from numpy's in the last bit; then torch's have to agree."""
    if torch_kl is not None and torch_kl > gates.TORCH_TABLES_KL:
        yield f"with torch's tables imposed the mean KL is {torch_kl:.2g}"
    elif difference > identity.allowed and (artifact.is_ours or torch_kl is None):
        yield f"with the expected tables imposed ONNX Runtime's logits move by {difference:.2g}"


def _control(
    identity: _Identity, expected: RopeParameters, torch_kl: float | None
) -> tuple[Control, str | None]:
    """A factor that is hardly another one has to move the logits more than torch's tables do."""
    factor = expected.factor * gates.IDENTITY_CONTROL_STRETCH
    frequencies = (identity.reference * np.float32(1 / gates.IDENTITY_CONTROL_STRETCH)).astype(
        np.float32
    )
    seen, kl = identity.difference(identity.tables_of(frequencies))
    fine = seen > identity.allowed and (torch_kl is None or kl > torch_kl)
    control = Control(f"tables of factor {factor:.8g} imposed", seen, 0.0, fine)
    if fine:
        return control, None
    beside = "" if torch_kl is None else f", torch's tables {torch_kl:.3g}"
    return control, (
        f"imposing tables of the wrong factor {factor:.8g} for {expected.factor:.8g} moved the"
        f" logits by {seen:.3g} (mean KL {kl:.3g}{beside}): this model cannot tell a wrong factor"
        " from the right one"
    )


class _Identity:
    """Logits with tables imposed against logits with the expected tables imposed."""

    def __init__(
        self,
        subject: Subject,
        artifact: OnnxArtifact,
        tables: Tables,
        stream: TokenStream,
        progress: Progress,
    ) -> None:
        self._artifact, self._tables, self._progress = artifact, tables, progress
        rope = self._rope = subject.expected.rope
        self.reference, self.attention = reference_rope(subject.source, rope)
        count = min(gates.IDENTITY_TOKENS, rope.context)
        self._stream = stream.take(count)
        self._positions = sorted({0, rope.context - count})
        self._loads = 0
        # Of the frequencies that the file was made of: theirs where they pass, else the expected.
        self._right = list(self._run(self.tables_of(self._exact())))
        self.allowed = 0.0
        if artifact.on_gpu:
            again = self._run(self.tables_of(self._exact()))
            spread = max(largest_difference(a, b) for a, b in zip(again, self._right, strict=True))
            self.allowed = gates.DEVICE_REPEAT_MARGIN * spread

    def tables_of(self, frequencies: FloatArray) -> Tables:
        """The file's tables made of other frequencies, in its own type."""
        if frequencies.shape != self._tables.cos.shape[1:]:
            raise SourceError(
                f"the tables have {self._tables.cos.shape[1]} columns",
                hint=f"Expected {len(frequencies)}, one for each frequency.",
            )
        cos, sin = right_tables(self._tables, frequencies, self.attention)
        return Tables(self._tables.cos_name, self._tables.sin_name, cos, sin)

    def torch_tables(self) -> Tables:
        """The expected tables as torch computes them."""
        import torch

        frequencies = torch.from_numpy(self.reference.copy())
        angles = torch.arange(self._tables.rows, dtype=torch.float32)[:, None] * frequencies[None]
        dtype = self._tables.cos.dtype
        cos = (angles.cos() * self.attention).numpy().astype(dtype)
        sin = (angles.sin() * self.attention).numpy().astype(dtype)
        return Tables(self._tables.cos_name, self._tables.sin_name, cos, sin)

    def difference(self, imposed: Tables | None) -> tuple[float, float]:
        """(largest logit difference, mean KL) with ``imposed``; None is the file as it is."""
        largest, kl = 0.0, []
        for found, right in zip(self._run(imposed), self._right, strict=True):
            largest = max(largest, largest_difference(found, right))
            kl.append(kl_divergence(found, right).mean())
        return largest, float(np.mean(kl))

    def _exact(self) -> FloatArray:
        """The expected frequencies to the last bit that the file has, where it has them."""
        return self._rope.inv_freq()

    def _run(self, imposed: Tables | None) -> Iterator[Logits]:
        self._loads += 1
        self._progress("running with tables imposed", self._loads, max(_LOADS, self._loads))
        count = len(self._stream.tokens)
        tables = self._tables if imposed is None else imposed
        for position in self._positions:
            # As the file is: nothing is imposed where its own tables start at the position.
            shifted = None if imposed is None and position == 0 else tables.shifted(position)
            scored = max(0, count - gates.IDENTITY_SCORED_TOKENS)
            window = Window("identity", self._stream, 0, scored)
            with (
                self._artifact.load_with(shifted) as model,
                model.open_session(count) as session,
            ):
                chunks = list(in_lockstep(window, [session], "identity"))
            yield np.concatenate([chunk.logits[0] for chunk in chunks])
