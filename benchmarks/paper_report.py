"""What `benchmarks/paper.py` measured, as tables beside the paper's own numbers, plots and claims.

Every claim is held against the numbers: shown, or refuted with what was found instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.paper_model import L
from benchmarks.plot import standalone
from pi_convert.evaluate.passkey import LEAST_RATE
from pi_convert.evaluate.statistics import wilson_interval
from pi_convert.report.document import Line, LineChart, Point

Document = dict[str, Any]
WINDOWS = L, 2 * L, 4 * L, 8 * L
SAME_WINDOW = 0.03  # of the original window's loss: what the claim allows
SAME = 0.01  # of perplexity from one window to twice as long: stays

# arXiv 2306.15595, LLaMA-7B; L is 2,048.
PAPER_1 = (
    ("none", "7.20", "> 1000", "> 1000", "> 1000", "> 1000"),
    ("direct, to 8,192", "7.21", "7.34", "7.69", "-", "-"),
    ("PI to 8,192 (x4)", "7.13", "6.96", "6.95", "-", "-"),
    ("PI to 16,384 (x8)", "7.11", "6.93", "6.82", "6.83", "-"),
    ("PI to 32,768 (x16)", "7.23", "7.04", "6.91", "6.80", "6.77"),
)
PAPER_3 = (
    ("PI to 8,192 (x4)", "16.10", "7.12", "7.10", "7.02", "6.99", "6.95"),
    ("PI to 16,384 (x8)", "112.13", "7.05", "6.93", "6.88", "6.84", "6.83"),
)
PAPER_5 = (
    ("base", "76.1", "78.9", "55.7", "42.2", "69.6"),
    ("PI to 8,192 (x4)", "73.2", "78.2", "53.8", "41.7", "69.0"),
    ("PI to 16,384 (x8)", "69.8", "77.6", "53.3", "40.9", "67.8"),
    ("PI to 32,768 (x16)", "64.7", "77.2", "50.1", "39.6", "66.9"),
)


@dataclass(frozen=True)
class At:
    """A perplexity and its 95 % interval by document."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Measured:
    """The document's numbers by arm and step. ``direct`` at step 0 is the base, extrapolated."""

    def __init__(self, document: Document) -> None:
        self.perplexity: dict[tuple[str, int], dict[int, At]] = {}
        self.growth: dict[tuple[str, int], dict[int, Document]] = {}
        for row in document["perplexity"]:
            key = row["arm"], row["step"]
            self.perplexity[key] = {
                c["context"]: At(c["perplexity"], *c["interval"]) for c in row["contexts"]
            }
            self.growth[key] = {g["to"]: g for g in row["growth"]}
        self.paired: dict[str, Document] = document["paired"]
        self.passkey = {(row["arm"], row["step"]): row for row in document["passkey"]}
        self.scored_tokens = document["perplexity"][0]["scored_tokens"]
        self.window: dict[str, int] = document["windows"]  # that an arm is trained on

    def steps(self, arm: str) -> list[int]:
        return sorted(step for name, step in self.perplexity if name == arm)

    def last(self, arm: str) -> int:
        return self.steps(arm)[-1]

    def taught(self, arm: str) -> dict[int, Document]:
        """Passkeys of an arm that started from the taught base, by the step it was trained to."""
        return {
            step: row
            for (name, step), row in self.passkey.items()
            if name == f"taught {arm}" and step > 0
        }

    def recovered(self, arm: str) -> int:
        """The step that stands for the paper's 200."""
        return 200 if 200 in self.steps(arm) else self.last(arm)


def render(document: Document) -> tuple[str, dict[str, str]]:
    """(paper.md, plots by file name)."""
    found = Measured(document)
    lines = ["# Position Interpolation's claims, on a small LLaMA", "", "`make paper`", ""]
    lines += [f"- {key}: {value}" for key, value in document["environment"].items()]
    lines += ["", *_what_was_done(document, found), "", "## Claims", "", *claims(found)]
    lines += ["", "![perplexity by window](paper_windows.svg)", ""]
    lines += ["## Table 1: perplexity by window", "", *_table_1(found)]
    lines += ["", "## Table 3: perplexity by step", "", *_table_3(found)]
    lines += ["", "![perplexity by step](paper_steps.svg)", ""]
    lines += ["## Table 4: passkey", "", *_table_4(document, found)]
    lines += ["", "## Table 5: the original window", "", *_table_5(found)]
    lines += ["", "## Probe", "", *_probe(document)]
    lines += ["", "## Time", "", *_seconds(document)]
    plots = {"paper_windows.svg": _by_window(found), "paper_steps.svg": _by_step(found)}
    return "\n".join(lines) + "\n", plots


def _what_was_done(document: Document, found: Measured) -> list[str]:
    tokens, rates = document["tokens_a_step"], document["rates"]
    tuned = sorted({rate for name, rate in rates.items() if name != "pretraining"})
    return [
        "A LLaMA of 3.7 M parameters (hidden 256, 4 layers, 4 heads of 64, theta 10,000, byte-level"
        f" BPE of 2,048) is pretrained for {document['pretraining_steps']} steps of"
        f" {tokens['pretraining']:,} tokens on windows of L = {L}, at a rate of"
        f" {rates['pretraining']:g}; then each way to a longer window is trained with"
        f" {tokens['after']:,} tokens a step at {', '.join(f'{r:g}' for r in tuned)}, everything"
        " else as the paper has it. Four fifths of the tokens are 242 State of the Union speeches,"
        " one fifth is the paper's passkey prompt with its answer, of every length up to the"
        f" window. Perplexities are of {found.scored_tokens:,} tokens of 7 other speeches, the same"
        " at every window, with 95 % intervals by speech. *Direct* is fine-tuning on long windows"
        " without interpolation; its step 0 is the base, extrapolated. *Trained on* is the base"
        f" with as many more tokens on windows of {L}.",
    ]


def claims(found: Measured) -> list[str]:
    """One line each: shown or refuted, with the numbers."""
    far, pi = 8 * L, "PI x8"
    base, untuned = found.perplexity["direct", 0], found.perplexity[pi, 0]
    short, last = found.recovered(pi), found.last(pi)
    tuned, long = found.perplexity[pi, short], found.perplexity[pi, last]
    control = found.perplexity["trained on", found.last("trained on")]
    growth = found.growth[pi, last][far]["nll_change"]
    doublings = {f"{n} L": found.paired[f"grows to {n * L}"] for n in (2, 4, 8)}
    factors = [arm for arm in ("PI x2", "PI x4", pi) if (arm, 0) in found.perplexity]
    pairs = found.paired
    kept = [(pairs[f"kept {which}"], base[L]) for which in ("short", "last")]
    beside = [
        (pairs["kept beside short"], found.perplexity["trained on", short][L]),
        (pairs["kept beside last"], control[L]),
    ]
    flat = untuned[far].value / untuned[L].value
    recovered = {
        arm: found.perplexity[arm, found.recovered(arm)][found.window[arm]] for arm in factors
    }
    direct = found.perplexity["direct", found.recovered("direct")]
    return [
        _claim(
            "Extrapolation breaks",
            base[far].low > base[L].high,
            f"the base has {base[L]} at L and {base[far]} at 8 L",
        ),
        _claim(
            "Position Interpolation does not, even untuned",
            untuned[far].value < base[far].value and flat < base[far].value / base[L].value,
            f"{pi} without a step has {untuned[L]} at L and {untuned[far]} at 8 L",
        ),
        *(
            _claim(
                f"{found.recovered(arm)} steps recover what {arm} cost",
                _at_most(pairs[f"recovered {arm}"], 0),
                f"{at} at its L', the base {base[L]} at L: {_change(pairs[f'recovered {arm}'])}",
            )
            for arm, at in recovered.items()
        ),
        _claim(
            f"Perplexity falls or stays as the window grows, to {SAME:.0%} a doubling",
            _all(_at_most(change, math.log1p(SAME)) for change in doublings.values()),
            f"{pi} at step {last}, "
            + ", ".join(f"to {name}: {_change(change)}" for name, change in doublings.items())
            + f"; from L to 8 L {_change(growth)}",
        ),
        _claim(
            "The original window keeps the base's loss within 3 %",
            _all(_keeps_loss(*one) for one in kept),
            f"{pi} has {_loss(*kept[0])} at step {short} and {_loss(*kept[1])} at step {last}",
        ),
        _claim(
            "... and that of the base trained on with as many tokens",
            _all(_keeps_loss(*one) for one in beside),
            f"{_loss(*beside[0])} and {_loss(*beside[1])}",
        ),
        _claim(
            "It is not the further training",
            control[far].low > long[far].high,
            f"trained on with as many tokens on windows of L: {control[far]} at 8 L, {pi}"
            f" {long[far]}",
        ),
        *_passkey_claims(found, factors),
        _claim(
            f"Direct fine-tuning is worse at 8 L after {short} steps (perplexity)",
            _not(_at_most(pairs["direct"], 0)),
            f"direct {direct[far]}, {pi} {tuned[far]}: {_change(pairs['direct'])}",
        ),
    ]


def _passkey_claims(found: Measured, factors: list[str]) -> Iterator[str]:
    """At every step that was measured: how far each factor reaches, and direct fine-tuning."""
    for arm in factors:
        for step, row in found.taught(arm).items():
            low, high = row["k_max_bounds"]
            yield _claim(
                f"{arm} finds passkeys as far as its window reaches after {step:,} steps",
                _reaches_all(row),
                f"k_max {row['k_max']:,} ({low:,} to {high:,}) of {_farthest(row):,},"
                f" {_found_of(row)} found",
            )
    base = _found_of(found.passkey["taught", 0])
    for step, direct in found.taught("direct").items():
        reach = {
            arm: found.taught(arm)[step]["k_max"] for arm in factors if step in found.taught(arm)
        }
        longest = reach[factors[-1]]
        yield _claim(
            f"Direct fine-tuning reaches less far in {step:,} steps (passkey)",
            direct["k_max"] < longest if direct["k_max"] or longest else None,
            f"k_max {direct['k_max']:,}, "
            + ", ".join(f"{arm} {k:,}" for arm, k in reach.items())
            + f"; at L the base finds {base}",
        )


def _reaches_all(row: Document) -> bool | None:
    """Refuted where the passkeys of all depths together are found less often than the rule asks."""
    right, asked = _answers(row)
    if wilson_interval(right, asked)[1] < LEAST_RATE:
        return False
    return True if row["k_max_bounds"][0] == _farthest(row) else None


def _claim(what: str, holds: bool | None, numbers: str) -> str:
    """None: these runs cannot tell."""
    found = "cannot be told" if holds is None else "shown" if holds else "refuted"
    return f"- **{what}: {found}**: {numbers}."


def _at_most(change: Document, limit: float) -> bool | None:
    """Whether a paired change of NLL is; None where its interval has the limit in it."""
    low, high = change["interval"]
    return True if high <= limit else False if low > limit else None


def _not(holds: bool | None) -> bool | None:
    return None if holds is None else not holds


def _all(holds: Iterable[bool | None]) -> bool | None:
    """False where any is, True where all are."""
    each = list(holds)
    return False if False in each else None if None in each else True


def _keeps_loss(change: Document, other: At) -> bool | None:
    return _at_most(change, SAME_WINDOW * math.log(other.value))


def _loss(change: Document, other: At) -> str:
    """The paired change of loss, as a share."""
    low, value, high = (
        end / math.log(other.value)
        for end in (change["interval"][0], change["value"], change["interval"][1])
    )
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"


def _change(mean: Document) -> str:
    low, high = (math.expm1(end) for end in mean["interval"])
    return f"{math.expm1(mean['value']):+.1%} ({low:+.1%} to {high:+.1%}, paired)"


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _beside(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...], what: str) -> list[str]:
    return ["", f"The paper's, {what}:", "", *_rows(header, list(rows))]


def _table_1(found: Measured) -> list[str]:
    shown = [("base, extrapolated", "direct", 0), ("PI x8, untuned", "PI x8", 0)]
    for arm in ("PI x2", "PI x4", "PI x8", "direct"):
        shown.append((f"{arm}, step {found.recovered(arm)}", arm, found.recovered(arm)))
    for arm in ("PI x8", "trained on"):
        shown.append((f"{arm}, step {found.last(arm)}", arm, found.last(arm)))
    rows = []
    for name, arm, step in shown:
        at = found.perplexity[arm, step]
        limit = found.window[arm] if arm.startswith("PI") else 8 * L
        cells = (str(at[w]) if w <= limit else f"past L': {at[w].value:.2f}" for w in WINDOWS)
        rows.append((name, *cells))
    header = ("model", *(f"{w:,}" for w in WINDOWS))
    paper = ("model", "2,048", "4,096", "8,192", "16,384", "32,768")
    return [*_rows(header, rows), *_beside(paper, PAPER_1, "LLaMA-7B on PG-19 after 1,000 steps")]


def _table_3(found: Measured) -> list[str]:
    steps = found.steps("PI x8")
    rows = []
    for arm in ("PI x2", "PI x4", "PI x8", "direct"):
        window = found.window[arm]
        cells = (
            str(found.perplexity[arm, step][window]) if (arm, step) in found.perplexity else "-"
            for step in steps
        )
        rows.append((f"{arm}, window {window:,}", *cells))
    paper = ("model", "0", "200", "400", "600", "800", "1000")
    return [
        *_rows(("model", *map(str, steps)), rows),
        *_beside(paper, PAPER_3, "LLaMA-7B on PG-19 at the new window"),
    ]


def _table_4(document: Document, found: Measured) -> list[str]:
    rows = []
    for (arm, step), row in found.passkey.items():
        low, high = row["k_max_bounds"]
        k_max = f"{row['k_max']:,} ({low:,} to {high:,})"
        rows.append((arm, str(step), f"{row['window']:,}", k_max, _found_of(row)))
    tokens, teaching = document["tokens_a_step"], document["teaching"]
    return [
        "k_max with what the Wilson intervals allow, and how many passkeys were found in all.",
        "",
        f"The base is first taught the task for {teaching['steps']} steps of"
        f" {tokens['teaching']:,} tokens on windows of L, at {teaching['rate']:g}, on texts of"
        " which four fifths are the prompt with its answer at every distance that the window has."
        " With whole lines of filler it has two, and a base that was trained so had learned those"
        " by heart and found nothing at any other. Then every way is trained with"
        f" {tokens['taught']:,} tokens a step on its own window, at {teaching['rate_after']:g}.",
        "",
        *_rows(("model", "step", "prompt", "k_max", "found"), rows),
        "",
        "The paper's, at 200 steps: PI reaches its window at every factor; direct fine-tuning to"
        " 8,192 reaches 1,792 (and 2,560 after 10,000 steps).",
    ]


def _farthest(row: Document) -> int:
    return max(depth["distance"] for depth in row["depths"])


def _answers(row: Document) -> tuple[int, int]:
    """(right, asked) at all depths."""
    right, asked = (sum(depth[key] for depth in row["depths"]) for key in ("found", "trials"))
    return right, asked


def _found_of(row: Document) -> str:
    right, asked = _answers(row)
    return f"{right} of {asked}"


def _table_5(found: Measured) -> list[str]:
    base = found.perplexity["direct", 0][L]
    rows = [("base", str(base), "")]
    for arm in ("PI x2", "PI x4", "PI x8", "direct", "trained on"):
        for step in sorted({found.recovered(arm), found.last(arm)}):
            at = found.perplexity[arm, step][L]
            rows.append((f"{arm}, step {step}", str(at), f"{at.value / base.value - 1:+.1%}"))
    paper = ("model", "BoolQ", "PIQA", "Race-M", "Race-H", "WinoGrande")
    return [
        "The paper's table has tasks of the original window; a model of this size can do none of"
        f" them, so this is the perplexity on windows of {L}.",
        "",
        *_rows(("model", f"{L}", "against the base"), rows),
        *_beside(paper, PAPER_5, "LLaMA-7B"),
    ]


def _probe(document: Document) -> list[str]:
    rows = []
    for row in document["probe"]:
        trained = f"{row['scale']:g}" if row["scale"] != 1 else "none"
        fits = [row["factor"] or 1, *(fit["factor"] for fit in row["also_fit"])]
        found = "none" if row["factor"] is None else " or ".join(f"{fit:g}" for fit in fits)
        gain, nearest = row["gain_over_factor_1"]["value"], row["next_best"]
        told = f"{nearest:g}" + ("" if row["told_apart"] else ", not told apart")
        best = f"{row['best']:g}"
        rows.append((row["arm"], str(row["step"]), trained, found, best, f"{gain:.3f}", told))
    header = ("model", "step", "factor", "found", "best", "nats under factor 1", "next best")
    return [
        "`pi-convert probe` on the tuned weights with the base's config, which knows of no factor;"
        " it tries 1, 1.25, 1.5 ... 4, 5, 6 ... 32. The usual factor just above the best one is"
        " what it tells, and where a larger one loses as little, that too.",
        "",
        *_rows(header, rows),
    ]


def _seconds(document: Document) -> list[str]:
    took = document["seconds"]
    return [
        "What a training took, where it was kept; each goes on where it was stopped.",
        "",
        *_rows(("training", "minutes"), [(name, f"{s / 60:.1f}") for name, s in took.items()]),
    ]


def _by_window(found: Measured) -> str:
    lines = []
    for name, arm, step in (
        ("base, extrapolated", "direct", 0),
        ("PI x8, untuned", "PI x8", 0),
        (f"PI x8, step {found.recovered('PI x8')}", "PI x8", found.recovered("PI x8")),
        (f"PI x8, step {found.last('PI x8')}", "PI x8", found.last("PI x8")),
        (f"direct, step {found.recovered('direct')}", "direct", found.recovered("direct")),
        (f"trained on, step {found.last('trained on')}", "trained on", found.last("trained on")),
    ):
        at = found.perplexity[arm, step]
        points = tuple(Point(w, at[w].value, at[w].low, at[w].high) for w in WINDOWS)
        lines.append(Line(name, points, is_control=arm != "PI x8"))
    return standalone(
        LineChart(
            title="Perplexity by window",
            x_label="window in tokens",
            y_label="perplexity, 95 % by speech",
            lines=tuple(lines),
            marks=((L, "L"),),
            log_x=True,
            log_y=True,
        )
    )


def _by_step(found: Measured) -> str:
    """PI at its new window, and direct fine-tuning at the same."""
    lines = []
    for arm in ("PI x2", "PI x4", "PI x8", "direct"):
        window = found.window[arm]
        points = tuple(
            Point(step, at[window].value, at[window].low, at[window].high)
            for step in found.steps(arm)
            for at in [found.perplexity[arm, step]]
        )
        lines.append(Line(f"{arm}, window {window:,}", points, is_control=arm == "direct"))
    return standalone(
        LineChart(
            title="Perplexity at the new window by step",
            x_label="step",
            y_label="perplexity at the new window, 95 % by speech",
            lines=tuple(lines),
            log_y=True,
        )
    )
