"""Link 5: what the artifact's predictions are worth against the source's own weights.

Lower perplexity is no pass: dropping the factor lowers it on a model that was not fine-tuned. The
gate is the distance to the source's own predictions with the expected RoPE, both ways.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from math import exp, expm1, log1p

from converters.progress import Progress
from pi_convert.evaluate.statistics import Comparison, Mean
from pi_convert.evaluate.windows import TokenStream, Window, in_lockstep
from pi_convert.runtimes.pytorch import TorchModel
from pi_convert.verify import gates
from pi_convert.verify.execution import Execution, Oracles
from pi_convert.verify.request import Subject, VerifyRequest
from pi_convert.verify.verdict import LinkName, LinkResult, Status


def report_quality(subject: Subject, execution: Execution) -> LinkResult:
    """Link 4's tokens against the source's weights; measured, not gated."""
    compared = execution.source
    nll = compared.clustered_nll_difference()
    measures = {**_measures(compared, nll), **_interpolation_cost(subject, execution)}
    return LinkResult(
        LinkName.QUALITY,
        Status.REPORTED,
        f"KL {compared.mean_kl:.2g} nats from the source's own weights, the same token first in"
        f" {compared.top1_agreement:.1%}",
        measures,
        notes=_untrained(subject, execution),
    )


def judge_quality(
    subject: Subject,
    execution: Execution,
    oracles: Oracles,
    stream: TokenStream,
    progress: Progress,
) -> LinkResult:
    """Documents and the window past L, with intervals clustered by document, against margins."""
    documents = _documents(subject, oracles.source, stream, progress)
    merged = Comparison(
        kl=[*documents.kl, *execution.source.kl],
        nll_difference=[*documents.nll_difference, *execution.source.nll_difference],
        same_top=[*documents.same_top, *execution.source.same_top],
        document=[*documents.document, *execution.source.document],
    )
    kl, nll = merged.clustered_kl(), merged.clustered_nll_difference()
    margins = Margins.of(subject.request)
    status, summary, over = _against(margins, kl, nll)
    return LinkResult(
        LinkName.QUALITY,
        status,
        summary,
        {
            **_measures(merged, nll),
            **_interpolation_cost(subject, execution),
            "documents": kl.clusters,
            "largest mean KL allowed": margins.kl,
            "largest change of perplexity allowed": f"{expm1(margins.nll):+.1%}",
            "mean KL, upper end of 95 %": _upper(kl),
            "change of NLL, ends of 95 %": _ends(nll),
        },
        cause=summary if over else None,
        findings=over,
        notes=_untrained(subject, execution),
    )


@dataclass(frozen=True, slots=True)
class Margins:
    """What link 5 allows."""

    kl: float  # nats
    nll: float  # nats, either way: the logarithm of the change of perplexity

    @classmethod
    def of(cls, request: VerifyRequest) -> Margins:
        """Those asked for, else the defaults."""
        increase = request.max_ppl_increase
        return cls(
            kl=gates.MAX_KL if request.max_kl is None else request.max_kl,
            nll=log1p(gates.MAX_PPL_INCREASE if increase is None else increase),
        )


def _against(margins: Margins, kl: Mean, nll: Mean) -> tuple[Status, str, tuple[str, ...]]:
    """The status, the summary, and what is over a margin."""
    over = []
    if not kl.value <= margins.kl:
        over.append(f"mean KL {kl.value:.3g}, at most {margins.kl:g}")
    if not abs(nll.value) <= margins.nll:
        allowed = f"at most {expm1(margins.nll):.1%} either way"
        over.append(f"perplexity {expm1(nll.value):+.1%}, {allowed}")
    if over:
        return Status.FAILED, "; ".join(over), tuple(over)
    if kl.clusters < gates.QUALITY_CLUSTERS:
        summary = (
            f"{kl.clusters} documents give no interval, {gates.QUALITY_CLUSTERS} are needed;"
            " give more --text"
        )
        return Status.INCONCLUSIVE, summary, ()
    if _crosses(kl, margins.kl) or _crosses(nll, margins.nll):
        summary = "the 95 % interval reaches over the margin; give more --text"
        return Status.INCONCLUSIVE, summary, ()
    summary = (
        f"KL {kl.value:.2g} nats, perplexity {expm1(nll.value):+z.2%} over {kl.clusters} documents"
    )
    return Status.PASSED, summary, ()


def _documents(
    subject: Subject, oracle: TorchModel, stream: TokenStream, progress: Progress
) -> Comparison:
    found = Comparison()
    longest = min(gates.QUALITY_DOCUMENT_TOKENS, subject.expected.rope.context)
    documents = stream.documents(gates.QUALITY_DOCUMENTS, longest)
    with contextlib.closing(subject.artifact.load()) as artifact:
        for number, document in enumerate(documents):
            window = Window(f"document {number}", document, 0, 0)
            with (
                artifact.open_session(longest) as a,
                oracle.open_session(longest) as b,
            ):
                for chunk in in_lockstep(window, [a, b], "documents in lockstep"):
                    p, q = chunk.logits
                    found.add(p, q, chunk.following, chunk.document)
            progress("documents, two runs in lockstep", number + 1, len(documents))
    return found


def _measures(compared: Comparison, nll: Mean) -> dict[str, float | int | str]:
    return {
        "mean KL against the source": compared.mean_kl,
        "top-1 agreement": compared.top1_agreement,
        "paired change of NLL": nll.value,
        "its standard error": "one document" if nll.standard_error is None else nll.standard_error,
        "positions": compared.positions,
    }


def _interpolation_cost(subject: Subject, execution: Execution) -> dict[str, float | int | str]:
    factor = subject.expected.rope.factor
    if factor == 1.0:
        return {}
    return {
        f"mean KL, factor {factor:g} against 1": execution.unscaled.mean_kl,
        f"top-1 agreement, factor {factor:g} against 1": execution.unscaled.top1_agreement,
    }


def _untrained(subject: Subject, execution: Execution) -> tuple[str, ...]:
    source, expected = subject.source.rope, subject.expected.rope
    if expected.factor == source.factor:
        return ()
    return (
        f"interpolation without fine-tuning moves predictions by"
        f" {execution.unscaled.mean_kl:.2g} nats below L; fine-tuning mends it",
    )


def _crosses(mean: Mean, margin: float) -> bool:
    ends = mean.interval
    return ends is None or max(abs(ends[0]), abs(ends[1])) > margin


def _upper(mean: Mean) -> float | str:
    return "one document" if mean.interval is None else mean.interval[1]


def _ends(mean: Mean) -> str:
    if mean.interval is None:
        return "one document"
    low, high = mean.interval
    return f"{low:+.4f} to {high:+.4f} (perplexity x {exp(low):.4f} to x {exp(high):.4f})"
