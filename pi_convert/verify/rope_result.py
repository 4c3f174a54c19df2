"""How link 1 ends, for every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pi_convert.runtimes.base import Logits
from pi_convert.verify.request import Expected
from pi_convert.verify.verdict import Control, LinkName, LinkResult, Status


def rope_result(
    expected: Expected,
    findings: Sequence[str],
    measures: Mapping[str, float | int | str],
    control: Control | None = None,
    unseen: str | None = None,
    *,
    notes: tuple[str, ...] = (),
) -> LinkResult:
    """``unseen`` is why the control says nothing, None where it was seen."""
    if findings:
        status, summary = Status.FAILED, findings[0]
    elif expected.claimed is not None:
        status = Status.INCONCLUSIVE
        summary = (
            f"consistent with the factor {expected.claimed:g} it claims;"
            f" give --scale {expected.claimed:g} to prove it"
        )
    elif unseen is not None:
        status, summary = Status.INCONCLUSIVE, unseen
    else:
        status = Status.PASSED
        summary = (
            f"factor {expected.rope.factor:g}, theta {expected.rope.theta:g}:"
            " stored right, and applied bit for bit"
        )
    return LinkResult(
        LinkName.ROPE,
        status,
        summary,
        measures,
        () if control is None else (control,),
        cause=findings[0] if findings else None,
        findings=tuple(findings),
        notes=notes,
    )


def largest_difference(a: Logits, b: Logits) -> float:
    """Between two arrays of logits; infinite where one has a nan."""
    difference = np.abs(a - b).max()
    return float(difference) if np.isfinite(difference) else float("inf")
