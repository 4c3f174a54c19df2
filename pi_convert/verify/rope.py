"""Link 1: the artifact's RoPE is the expected one, as stored and as llama.cpp applies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from converters.errors import SourceError
from converters.progress import Progress
from converters.rope import gguf as keys
from converters.rope.gguf import EffectiveRope
from converters.rope.parameters import FloatArray, RopeParameters, ulp_distance
from pi_convert.evaluate.statistics import kl_divergence
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep
from pi_convert.runtimes.base import Logits
from pi_convert.runtimes.llamacpp import ImposedRope
from pi_convert.runtimes.pytorch import reference_rope
from pi_convert.verify import gates
from pi_convert.verify.gguf_artifact import GgufArtifact
from pi_convert.verify.request import Subject
from pi_convert.verify.rope_result import largest_difference, rope_result
from pi_convert.verify.verdict import Control, LinkName, LinkResult, Status

_LOADS = 3  # of a right file: expected, as it is, the control
_KNOWN_KEYS = {
    keys.THETA_KEY,
    keys.DIMENSION_KEY,
    keys.TYPE_KEY,
    keys.FACTOR_KEY,
    keys.ORIGINAL_KEY,
    keys.ATTENTION_KEY,
    keys.LEGACY_FACTOR_KEY,
    keys.FINETUNED_KEY,  # printed, and read by granite only
}


def verify_rope(
    subject: Subject, artifact: GgufArtifact, stream: TokenStream, progress: Progress
) -> LinkResult:
    """Stored values against transformers', then the run against the run with RoPE imposed."""
    expected = subject.expected
    findings, measures = _stored(subject, artifact)
    rope, notes = artifact.rope, tuple(_notes(artifact))
    if rope is None:
        return rope_result(expected, findings, measures, notes=notes)
    control, unseen = None, None
    try:
        identity = _Identity(artifact, expected.rope, stream, progress)
        difference, kl = identity.difference(None)
        measures["identity: largest logit difference"] = difference
        measures["identity: mean KL"] = kl
        if difference > identity.allowed:
            findings.append(_name_by_imposing(identity, rope, expected.rope, difference))
        control = _control(identity, expected.rope, difference)
        unseen = None if control.seen else _unseen(control, expected.rope, identity.allowed)
    except SourceError as error:  # llama.cpp refuses the file or its tokens
        findings.append(error.message)
    return rope_result(expected, findings, measures, control, unseen, notes=notes)


def verify_stored_rope(subject: Subject, artifact: GgufArtifact, reason: str) -> LinkResult:
    """Stored values alone, where llama.cpp cannot run the file for ``reason``."""
    findings, measures = _stored(subject, artifact)
    if findings:
        notes = tuple(_notes(artifact))
        return rope_result(subject.expected, findings, measures, notes=notes)
    return LinkResult(LinkName.ROPE, Status.NOT_RUN, f"stored right; {reason}", measures)


def _stored(
    subject: Subject, artifact: GgufArtifact
) -> tuple[list[str], dict[str, float | int | str]]:
    """What is wrong with the stored values, and the values."""
    expected, rope = subject.expected, artifact.rope
    if rope is None:
        return [artifact.rope_problem or "it has no RoPE"], {}
    reference, attention = reference_rope(subject.source, expected.rope)
    limit = gates.OUR_FREQUENCY_ULP if artifact.is_ours else gates.OTHER_FREQUENCY_ULP
    findings = [
        *_frequency_findings(rope, expected.rope, reference, limit),
        *_attention_findings(rope, attention),
        *_context_findings(artifact, rope, expected.rope),
    ]
    measures: dict[str, float | int | str] = {
        "factor": rope.factor,
        "theta": rope.theta,
        "L": rope.original_context or "not stored",
        "L'": rope.context,
        "frequencies off by (ulp)": _distance(reference, rope),
    }
    return findings, measures


def _distance(reference: FloatArray, rope: EffectiveRope) -> int | str:
    if rope.divisors is not None and rope.divisors.shape != reference.shape:
        return f"{keys.DIVISORS_TENSOR} has {len(rope.divisors)} elements"
    found = rope.inv_freq()
    return ulp_distance(reference, found) if found.shape == reference.shape else "other dimension"


def _frequency_findings(
    rope: EffectiveRope, expected: RopeParameters, reference: FloatArray, limit: int
) -> Iterator[str]:
    """Every stored value that makes the frequencies differ, by name."""
    if rope.rotary_dim != expected.rotary_dim:
        yield f"{keys.DIMENSION_KEY} is {rope.rotary_dim}, expected {expected.rotary_dim}"
        return
    if rope.type == "none" and expected.factor != 1.0:
        stored = rope.stored_factor
        yield f"{keys.TYPE_KEY} is none, so llama.cpp drops the factor" + (
            f" {stored:g} that is stored" if stored else ""
        )
    elif rope.type not in ("none", "linear"):
        yield f"{keys.TYPE_KEY} is {rope.type}, expected {_expected_type(expected)}"
    elif np.float32(rope.factor) != np.float32(expected.factor):
        dropped = " (dropped)" if rope.factor == 1.0 else ""
        yield f"the factor is {rope.factor:.8g}{dropped}, expected {expected.factor:.8g}"
    if np.float32(rope.theta) != np.float32(expected.theta):
        yield f"{keys.THETA_KEY} is {rope.theta:g}, expected {expected.theta:g}"
    yield from _divisor_findings(rope.divisors, expected, limit)
    distance = _distance(reference, rope)
    if isinstance(distance, int) and distance > limit:
        yield f"the frequencies are {distance} units in the last place off, at most {limit} allowed"


def _expected_type(rope: RopeParameters) -> str:
    return "none" if rope.factor == 1.0 else "linear"


def _divisor_findings(
    found: FloatArray | None, expected: RopeParameters, limit: int
) -> Iterator[str]:
    divisors = expected.frequency_divisors()
    if found is None and divisors is not None:
        yield f"{keys.DIVISORS_TENSOR} is missing: llama3's scaling is lost"
    if found is not None and divisors is None:
        yield f"a stray {keys.DIVISORS_TENSOR} divides the frequencies by up to {found.max():g}"
    if found is not None and divisors is not None:
        if found.shape != divisors.shape:
            yield f"{keys.DIVISORS_TENSOR} has {len(found)} elements, expected {len(divisors)}"
        elif ulp_distance(divisors, found) > limit:
            (where,) = np.nonzero(divisors != found)
            yield f"{keys.DIVISORS_TENSOR} differs in {len(where)} elements, first {where[0]}"


def _attention_findings(rope: EffectiveRope, attention: float) -> Iterator[str]:
    if np.float32(rope.attention_factor) != np.float32(attention):
        yield f"{keys.ATTENTION_KEY} is {rope.attention_factor:g}, expected {attention:g}"


def _context_findings(
    artifact: GgufArtifact, rope: EffectiveRope, expected: RopeParameters
) -> Iterator[str]:
    if rope.context != expected.context:
        yield f"{keys.CONTEXT_KEY} is {rope.context}, expected {expected.context} (L')"
    if rope.original_context is None:
        if artifact.is_ours:
            yield f"{keys.ORIGINAL_KEY} is missing"
    elif rope.original_context != expected.original_context:
        yield (
            f"{keys.ORIGINAL_KEY} is {rope.original_context},"
            f" expected {expected.original_context} (L)"
        )


def _notes(artifact: GgufArtifact) -> Iterator[str]:
    found = artifact.keys
    if keys.ORIGINAL_KEY not in found and not artifact.is_ours:
        yield f"{keys.ORIGINAL_KEY} is not stored: readers cannot tell L from the file"
    if keys.TYPE_KEY not in found:
        yield f"{keys.TYPE_KEY} is not stored: llama.cpp takes it as linear"
    if keys.LEGACY_FACTOR_KEY in found and keys.FACTOR_KEY in found:
        yield (
            f"{keys.LEGACY_FACTOR_KEY} {_shown(found[keys.LEGACY_FACTOR_KEY])} stands beside"
            f" {keys.FACTOR_KEY} {_shown(found[keys.FACTOR_KEY])}: llama.cpp reads"
            f" {keys.FACTOR_KEY} alone"
        )
    elif keys.LEGACY_FACTOR_KEY in found:
        yield f"the factor stands in the old {keys.LEGACY_FACTOR_KEY}"
    for key in sorted(found):
        if key.startswith("rope.") and key not in _KNOWN_KEYS:
            yield f"{key} is stored; llama.cpp's {artifact.architecture} does not read it"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _name_by_imposing(
    identity: _Identity, rope: EffectiveRope, expected: RopeParameters, difference: float
) -> str:
    """The one key that, put right alone, makes the run the expected one."""
    full = ImposedRope.of(expected)
    # A factor counts only with a type that lets it, so type goes with it in the second try.
    for imposed in (
        ImposedRope(type=full.type),
        ImposedRope(factor=full.factor),
        ImposedRope(theta=full.theta),
        ImposedRope(attention_factor=full.attention_factor),
        ImposedRope(type=full.type, factor=full.factor),
    ):
        if identity.difference(imposed)[0] <= identity.allowed:
            values = " and ".join(f"{key} {value}" for key, value in imposed.keys().items())
            return (
                f"llama.cpp's logits are up to {difference:.2g} off; imposing {values} alone"
                " makes them right"
            )
    return f"llama.cpp's logits are up to {difference:.2g} off with the expected RoPE imposed"


def _control(identity: _Identity, expected: RopeParameters, difference: float) -> Control:
    """A factor that is hardly another one: to be seen, unless the run itself is farther off."""
    factor = _control_factor(expected)
    seen, _ = identity.difference(ImposedRope.of(dataclasses.replace(expected, factor=factor)))
    is_seen = seen > max(identity.allowed, difference)
    return Control(f"factor {factor:.8g} imposed", seen, difference, is_seen)


def _control_factor(expected: RopeParameters) -> float:
    return expected.factor * gates.IDENTITY_CONTROL_STRETCH


def _unseen(control: Control, expected: RopeParameters, allowed: float) -> str:
    """Why the control says nothing: a wrong factor came out as a right one would."""
    return (
        f"imposing the wrong factor {_control_factor(expected):.8g} for {expected.factor:.8g} moved"
        f" the logits by {control.value:.3g}, and up to {allowed:.3g} counts as equal: this model"
        " cannot tell a wrong factor from the right one"
    )


class _Identity:
    """Logits with a RoPE imposed against logits with the expected RoPE imposed."""

    def __init__(
        self,
        artifact: GgufArtifact,
        rope: RopeParameters,
        stream: TokenStream,
        progress: Progress,
    ) -> None:
        self._artifact, self._rope, self._progress = artifact, rope, progress
        count = min(gates.IDENTITY_TOKENS, rope.context)
        self._stream = stream.take(count)
        self._positions = sorted({0, rope.context - count})
        self._loads = 0
        self._right = list(self._run(ImposedRope.of(rope)))
        self.allowed = self._repeatability()

    def difference(self, imposed: ImposedRope | None) -> tuple[float, float]:
        """(largest logit difference, mean KL) of the file with ``imposed`` against the right run.

        ``imposed`` None is the file as it is.
        """
        largest, kl = 0.0, []
        for found, right in zip(self._run(imposed), self._right, strict=True):
            largest = max(largest, largest_difference(found, right))
            kl.append(kl_divergence(found, right).mean())
        return largest, float(np.mean(kl))

    def _run(self, imposed: ImposedRope | None) -> Iterator[Logits]:
        """The logits at every position of a window, one load for all of them."""
        self._loads += 1
        self._progress("running with RoPE imposed", self._loads, max(_LOADS, self._loads))
        count = len(self._stream.tokens)
        with self._artifact.load_with(imposed) as model:
            for position in self._positions:
                scored = max(0, count - gates.IDENTITY_SCORED_TOKENS)
                window = Window("identity", self._stream, position, position + scored)
                with model.open_session(count) as session:
                    chunks = list(in_lockstep(window, [session], "identity"))
                yield np.concatenate([chunk.logits[0] for chunk in chunks])

    def _repeatability(self) -> float:
        """The difference allowed: none on the CPU, elsewhere what two equal runs differ by."""
        if not self._artifact.on_gpu:
            return 0.0
        again = self._run(ImposedRope.of(self._rope))
        pairs = zip(again, self._right, strict=True)
        return gates.DEVICE_REPEAT_MARGIN * max(largest_difference(a, b) for a, b in pairs)
