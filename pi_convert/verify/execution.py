"""Link 4: the artifact in its runtime against torch on the artifact's own dequantized weights.

Three windows: one across L, one at the far end of L', and a short one where controls run beside the
right RoPE and where the cost of rounding alone is measured. Quality's measures (link 5) are taken
on the same tokens, since a pass costs more than everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.errors import ConvertError
from converters.progress import Progress
from converters.rope import RopeParameters
from pi_convert.evaluate.statistics import Comparison
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep
from pi_convert.runtimes.base import Runtime, Session
from pi_convert.runtimes.pytorch import TorchModel, decodes_independently
from pi_convert.verify import gates
from pi_convert.verify.kl_series import kl_series
from pi_convert.verify.request import Subject
from pi_convert.verify.verdict import Control, LinkName, LinkResult, Preset, Status

DROPPED = "factor dropped"
_RIGHT = ("artifact", "right")  # KL of the first against the second


@dataclass(frozen=True, slots=True)
class Windows:
    """Where link 4 looks."""

    past: Window
    far: Window
    control: Window


@dataclass(frozen=True, slots=True)
class Execution:
    """Everything that was measured, by window."""

    past: Comparison
    past_dropped: Comparison | None
    far: Comparison
    control: Comparison
    rounding: Comparison
    faults: Mapping[str, Comparison]
    source: Comparison  # the artifact against the source's own weights, on ``past``
    unscaled: Comparison  # factor s against factor 1, the source's weights, on ``control``


def choose_windows(stream: TokenStream, rope: RopeParameters, preset: Preset) -> Windows:
    """The three windows for a RoPE, as long as L, L' and the preset allow."""
    low, high = rope.original_context, rope.context
    past_tokens = gates.PAST_TOKENS
    if preset == "full":
        past_tokens = max(past_tokens, int(low * (gates.FULL_WINDOW - 1)))
    stop = min(low + past_tokens, high)
    start = max(0, low - gates.QUICK_LEAD_TOKENS) if preset == "quick" else 0
    scored_from = max(start, min(low, stop - gates.LEAST_SCORED_TOKENS))
    far = min(gates.FAR_TOKENS, high)
    control = min(gates.CONTROL_TOKENS, high)
    return Windows(
        past=Window("across L", stream.take(stop - start), start, scored_from),
        far=Window("far end of L'", stream.take(far), high - far, high - far),
        control=Window("controls", stream.take(control), 0, control // 2),
    )


def fault_ropes(rope: RopeParameters) -> dict[str, RopeParameters]:
    """The expected RoPE broken on purpose, by name."""
    faults = {
        "factor halved": dataclasses.replace(rope, factor=rope.factor / 2),
        "factor doubled": dataclasses.replace(rope, factor=rope.factor * 2),
        "theta / 10": dataclasses.replace(rope, theta=rope.theta / 10),
    }
    if rope.llama3 is not None:
        faults["llama3 dropped"] = dataclasses.replace(rope, llama3=None)
    return faults


@dataclass(frozen=True, slots=True)
class Oracles:
    """torch on the artifact's own weights and on the source's; one model where they are equal."""

    own: TorchModel
    source: TorchModel


def measure(subject: Subject, oracles: Oracles, windows: Windows, progress: Progress) -> Execution:
    """Runs every window once, all runtimes in lockstep. Raises ``ConvertError`` from a runtime."""
    faults = fault_ropes(subject.expected.rope)
    with contextlib.closing(subject.artifact.load()) as artifact:
        runs = _Runs(artifact, oracles, subject.expected.rope, progress)
        across = runs.across(windows.past)
        reach = runs.right_alone(windows.far)
        found = runs.beside_controls(windows.control, faults)
    return Execution(
        past=across["right"],
        past_dropped=across.get(DROPPED),
        far=reach["right"],
        control=found["right"],
        rounding=found["rounding"],
        faults={name: found[name] for name in faults},
        source=across["source"],
        unscaled=found["unscaled"],
    )


@dataclass(frozen=True, slots=True)
class _Runs:
    """The artifact and the oracles, run over each kind of window."""

    artifact: Runtime
    oracles: Oracles
    rope: RopeParameters
    progress: Progress

    def across(self, window: Window) -> dict[str, Comparison]:
        """The right RoPE, the source's own weights, and the factor dropped where there is one."""
        lockstep = self._right(window)
        pairs = {"right": _RIGHT, "source": _RIGHT}
        if self.oracles.source is not self.oracles.own:
            lockstep.add("source", self.oracles.source)
            pairs["source"] = ("artifact", "source")
        if self.rope.factor != 1.0:
            lockstep.add(DROPPED, self.oracles.own, rope=self.rope.unscaled())
            pairs[DROPPED] = ("artifact", DROPPED)
        return lockstep.compare(pairs)

    def right_alone(self, window: Window) -> dict[str, Comparison]:
        """The right RoPE."""
        return self._right(window).compare({"right": _RIGHT})

    def beside_controls(
        self, window: Window, faults: Mapping[str, RopeParameters]
    ) -> dict[str, Comparison]:
        """The right RoPE, rounding alone, every fault, and what interpolation alone moves."""
        lockstep = self._right(window)
        lockstep.add("rounded", self.oracles.own, rounded=True)
        lockstep.add("source", self.oracles.source)
        lockstep.add("unscaled", self.oracles.source, rope=self.rope.unscaled())
        for name, fault in faults.items():
            lockstep.add(name, self.oracles.own, rope=fault)
        return lockstep.compare(
            {
                "right": _RIGHT,
                "rounding": ("rounded", "right"),
                "unscaled": ("source", "unscaled"),
                **{name: ("artifact", name) for name in faults},
            }
        )

    def _right(self, window: Window) -> _Lockstep:
        lockstep = _Lockstep(window, self.progress)
        lockstep.add("artifact", self.artifact)
        lockstep.add("right", self.oracles.own)
        return lockstep


class _Lockstep:
    """Sessions over one window, and comparisons between them."""

    def __init__(self, window: Window, progress: Progress) -> None:
        self._window, self._progress = window, progress
        self._open: dict[str, Session] = {}

    def add(
        self,
        name: str,
        runtime: Runtime | TorchModel,
        *,
        rope: RopeParameters | None = None,
        rounded: bool = False,
    ) -> None:
        count = self._window.tokens
        if isinstance(runtime, TorchModel):
            self._open[name] = runtime.open_session(count, rope=rope, rounded=rounded)
        else:
            self._open[name] = runtime.open_session(count)

    def compare(self, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Comparison]:
        """KL(first || second) of every pair, by the pair's name; closes the sessions."""
        found = {pair: Comparison() for pair in pairs.values()}  # once where two are the same
        order = list(self._open)
        stage = f"window {self._window.name}, {len(order)} runs in lockstep"
        with contextlib.ExitStack() as stack:
            for session in self._open.values():
                stack.callback(session.close)
            sessions = list(self._open.values())
            for chunk in in_lockstep(self._window, sessions, stage, self._progress):
                by_name = dict(zip(order, chunk.logits, strict=True))
                for (p, q), comparison in found.items():
                    comparison.add(by_name[p], by_name[q], chunk.following, chunk.document)
                del chunk, by_name  # or the next chunk's logits stand beside them
        return {name: found[pair] for name, pair in pairs.items()}


def gate_of(subject: Subject, execution: Execution) -> float:
    """The largest mean KL that a right artifact may have."""
    gate = max(gates.FLOAT_MEAN_KL, gates.ROUNDING_MARGIN * execution.rounding.mean_kl)
    if subject.artifact.on_gpu and subject.artifact.is_quantized:
        gate = max(gate, gates.CUDA_QUANTIZED_MEAN_KL)
    return gate


def judge(
    subject: Subject, execution: Execution, windows: Windows, progress: Progress
) -> LinkResult:
    """Every window under the gate, every control far over it."""
    gate, runtime = gate_of(subject, execution), subject.artifact.runtime_name
    right = {
        windows.past.name: execution.past.mean_kl,
        windows.far.name: execution.far.mean_kl,
        windows.control.name: execution.control.mean_kl,
    }
    controls = _controls(execution, gate)
    result = LinkResult(
        LinkName.EXECUTION,
        Status.PASSED,
        f"{runtime} and torch agree: {_largest(right)}, at most {gate:.2g} allowed",
        {
            **{f"mean KL, {name}": kl for name, kl in right.items()},
            "mean KL of rounding alone": execution.rounding.mean_kl,
            "gate": gate,
            "scored across L": f"{windows.past.scored} tokens from {windows.past.scored_from}",
            "reached position": windows.far.position + windows.far.tokens - 1,
        },
        controls,
        notes=_notes(subject),
        series=kl_series(subject.expected.rope, execution, windows),
    )
    if over := {name: kl for name, kl in right.items() if not kl <= gate}:
        summary = f"{runtime} and torch differ: {_largest(over)}, at most {gate:.2g} allowed"
        cause = cause_by_intervention(subject, windows.control, gate, progress)
        return dataclasses.replace(
            result, status=Status.FAILED, summary=summary, cause=cause, findings=(summary, cause)
        )
    if unseen := [control.name for control in controls if not control.seen]:
        summary = f"this model cannot tell a wrong RoPE: {', '.join(unseen)} not seen"
        return dataclasses.replace(result, status=Status.INCONCLUSIVE, summary=summary)
    return result


def _controls(execution: Execution, gate: float) -> tuple[Control, ...]:
    """The factor dropped first, on the window across L; then every fault on the control window."""
    controls = [
        _control(name, fault.mean_kl, execution.control.mean_kl, gate)
        for name, fault in execution.faults.items()
    ]
    if execution.past_dropped is not None:
        dropped = execution.past_dropped.mean_kl
        controls.insert(0, _control(DROPPED, dropped, execution.past.mean_kl, gate))
    return tuple(controls)


def _notes(subject: Subject) -> tuple[str, ...]:
    encodings = {tensor.encoding for tensor in subject.artifact.tensors.values()}
    names = sorted(e.name for e in encodings if not decodes_independently(e))
    if not names:
        return ()
    return (f"gguf-py cannot decode {', '.join(names)}: torch was given libggml's own values",)


def _control(name: str, value: float, right: float, gate: float) -> Control:
    # nan is a difference too: a fault that breaks the model is seen.
    unseen = value <= gate or value < gates.CONTROL_RATIO * right
    return Control(name, value, right, not unseen)


def _largest(kls: Mapping[str, float]) -> str:
    name = max(kls, key=lambda key: kls[key])
    return f"mean KL {kls[name]:.2g} nats ({name})"


def cause_by_intervention(subject: Subject, window: Window, gate: float, progress: Progress) -> str:
    """Puts the expected RoPE in by force and sees whether the difference goes away."""
    rope, runtime = subject.expected.rope, subject.artifact.runtime_name
    oracle = TorchModel(subject.own_weights(), device=subject.request.device)
    try:
        with contextlib.closing(subject.artifact.load(rope)) as artifact:
            lockstep = _Lockstep(window, progress)
            lockstep.add("imposed", artifact)
            lockstep.add("right", oracle)
            kl = lockstep.compare({"kl": ("imposed", "right")})["kl"].mean_kl
    finally:
        oracle.close()
    if kl <= gate:
        return (
            f"RoPE: with factor {rope.factor:.8g}, theta {rope.theta:g} imposed"
            f" {runtime} agrees (mean KL {kl:.2g})"
        )
    return f"not the RoPE keys: with the expected RoPE imposed the mean KL is still {kl:.2g}"


def cannot_run(subject: Subject) -> str | None:
    """Why the artifact cannot be run beside torch; None where it can."""
    artifact = subject.artifact
    if artifact.rope_problem is not None:
        return artifact.rope_problem
    if not artifact.is_complete:
        names = [*artifact.missing, *artifact.misshapen]
        return f"tensors are missing or misshapen: {', '.join(names[:3])}"
    return None


@contextlib.contextmanager
def open_oracles(subject: Subject, progress: Progress) -> Iterator[Oracles]:
    """Torch on the artifact's own weights and on the source's."""
    device = subject.request.device
    own = TorchModel(subject.own_weights(), device=device, progress=progress)
    try:
        if _same_weights(subject):
            yield Oracles(own, own)
            return
        checkpoint = dataclasses.replace(subject.source, rope=subject.expected.rope)
        source = TorchModel(checkpoint, device=device, progress=progress)
        try:
            yield Oracles(own, source)
        finally:
            source.close()
    finally:
        own.close()


def _same_weights(subject: Subject) -> bool:
    """Whether every tensor has the source's encoding: then link 2 has compared every bit."""
    source, artifact = subject.source.tensors, subject.artifact.tensors
    return all(artifact[name].encoding is source[name].encoding for name in source)


def failed(error: ConvertError, name: LinkName) -> LinkResult:
    """The result of a link whose runtime refused the artifact."""
    return LinkResult(name, Status.FAILED, error.message, cause=error.message)
