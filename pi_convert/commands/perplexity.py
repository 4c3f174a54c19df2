"""``pi-convert perplexity``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pi_convert.commands._measuring import (
    read_texts,
    report_option,
    require_report,
    run_options,
    runtime_option,
    take,
    take_run,
    text_option,
    write_page,
)
from pi_convert.commands.options import (
    json_option,
    original_context_option,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pi_convert.commands._models import Opening
    from pi_convert.evaluate.models import Model
    from pi_convert.evaluate.texts import Document
    from pi_convert.report.perplexity import LlamaCppReport, PerplexityReport

_DEFAULT_WINDOWS = 16
PROTOCOLS = ("paper", "llama.cpp")
_DEFAULT_CONTEXTS = (512, 1024, 2048)
_DEFAULT_STRIDE = 256


class ContextsType(click.ParamType[tuple[int, ...]]):
    """Whole numbers of at least 2, separated by commas."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The contexts, ascending and once each, or a usage error (exit 2)."""
        try:
            contexts = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            self.fail(f"{value!r} is no list of numbers, such as 2048,4096.", param, ctx)
        if contexts[0] < 2 or contexts[-1] >= 2**31:
            self.fail(f"{value!r}: a context has 2 tokens or more.", param, ctx)
        return tuple(contexts)


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """What the command line asked for."""

    contexts: tuple[int, ...] | None
    stride: int | None
    max_windows: int | None
    join: bool
    extrapolate: bool
    protocol: str


@click.command()
@click.argument("models", metavar="[MODEL|ARTIFACT]...", nargs=-1)
@click.option(
    "--contexts",
    type=ContextsType(),
    metavar="N,N,...",
    help="Window sizes in tokens. Default: 512,1024,2048 as far as L' goes.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens scored at the end of each window. Default: 256, the paper's, or half of the"
    " smallest context.",
)
@text_option
@click.option(
    "--max-windows",
    type=click.IntRange(min=0),
    metavar="N",
    help="Windows a context, spread evenly over the texts; of protocol llama.cpp the first ones."
    " 0: every one. Default: 16; of protocol llama.cpp every one.",
)
@click.option(
    "--join",
    is_flag=True,
    help="Put texts one after the other, for those shorter than a window. The default text is.",
)
@click.option("--extrapolate", is_flag=True, help="Allow contexts past L'.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="paper",
    help="llama.cpp: what llama-perplexity computes, second halves of windows side by side."
    " Default: paper.",
)
@scale_option(required=False, help="Interpolate models that torch runs, without fine-tuning.")
@runtime_option()
@original_context_option
@revision_option
@run_options
@report_option
@json_option
def command(
    *,
    models: tuple[str, ...],
    texts: tuple[Path, ...],
    scale: float | None,
    runtime: str | None,
    original_context: int | None,
    revision: str | None,
    report: Path | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Perplexity over a sliding window, the same tokens scored at every context.

    Models and artifacts (folders, GGUF and ONNX files, hub ids) are measured on the same tokens,
    each in its own runtime. Intervals are clustered by document; how perplexity changes as the
    window grows is paired token by token. What it will cost is measured and printed first.

    \b
    Examples:
      pi-convert perplexity model.gguf --contexts 2048,4096,8192 --text book.txt
      pi-convert perplexity ./model ./model-PI8 --contexts 2048,4096 --text a.txt --text b.txt
      pi-convert perplexity model.gguf --protocol llama.cpp --contexts 512 --text wiki.test.raw
    """
    from pi_convert.commands._models import Opening, open_models
    from pi_convert.report.console import emit_json

    require_report(report, force=force)
    options = PerplexityOptions(**take(flags, PerplexityOptions))
    if options.stride is not None and options.protocol == "llama.cpp":
        raise click.UsageError(
            "--protocol llama.cpp scores the second half of every window: it takes no --stride."
        )
    opening = Opening(take_run(flags), scale, runtime, revision, original_context)
    opened = open_models([(model, opening) for model in models or (None,)])
    options = _settled(options, opened, joined=not texts)
    documents, record_of_texts = read_texts(texts)
    asked = Asked(options, opening, record_of_texts, as_json)
    found: PerplexityReport | LlamaCppReport
    if options.protocol == "llama.cpp":
        found = _as_llamacpp(opened, documents, asked)
    else:
        found = _as_the_paper(opened, documents, asked)
    if as_json:
        emit_json(found.to_json())
    if report is not None:
        from pi_convert.report.perplexity_page import page_of

        write_page(page_of(found), report, force=force)


@dataclass(frozen=True, slots=True)
class Asked:
    """All that the command line asked for."""

    options: PerplexityOptions
    opening: Opening
    texts: Mapping[str, object]  # for the record
    as_json: bool

    @property
    def max_windows(self) -> int:
        """Windows a context; 0: every one."""
        if self.options.max_windows is None:
            return _DEFAULT_WINDOWS if self.options.protocol == "paper" else 0
        return self.options.max_windows

    def environment(self, models: Sequence[Model]) -> dict[str, str]:
        """What it ran on, and with what."""
        from pi_convert.commands._models import record

        options, paper = self.options, self.options.protocol == "paper"
        settings = {
            "protocol": options.protocol,
            "contexts": ",".join(map(str, options.contexts or ())),
            "stride": options.stride if paper else None,
            "max_windows": self.max_windows,
            "join": options.join if paper else None,
            "extrapolate": options.extrapolate,
        }
        return record(models, self.opening, {**settings, **self.texts})


def _settled(
    options: PerplexityOptions, models: Sequence[Model], *, joined: bool
) -> PerplexityOptions:
    """With contexts chosen, and checked against what models and memory hold."""
    contexts = options.contexts
    if contexts is None:
        reach = min((m.context for m in models if m.context is not None), default=2**31)
        contexts = tuple(c for c in _DEFAULT_CONTEXTS if c <= reach) or (reach,)
    stride = options.stride or min(_DEFAULT_STRIDE, max(1, contexts[0] // 2))
    if options.protocol == "paper" and contexts[0] <= stride:
        raise click.UsageError(
            f"--stride {stride} is not below the smallest context, {contexts[0]}."
        )
    from pi_convert.commands._models import require_contexts

    require_contexts(models, contexts[-1], extrapolate=options.extrapolate)
    return replace(options, contexts=contexts, stride=stride, join=options.join or joined)


def _as_the_paper(
    models: Sequence[Model], documents: Sequence[Document], asked: Asked
) -> PerplexityReport:
    from pi_convert.evaluate.cost import cost_text
    from pi_convert.evaluate.models import Workbench, require_same_tokens, require_vocabulary
    from pi_convert.evaluate.perplexity import measure_perplexity, plan_windows
    from pi_convert.report.console import emit, progress
    from pi_convert.report.perplexity import PerplexityReport, model_text, plan_text

    options = asked.options
    runs = require_same_tokens(models, documents)
    plan = plan_windows(
        runs,
        options.contexts or (),
        stride=options.stride or _DEFAULT_STRIDE,
        most=asked.max_windows,
        joined=options.join,
    )
    if not asked.as_json:
        emit(plan_text(plan))
    found = []
    with progress() as tell, Workbench(tell) as bench:
        windows = [window for context in plan.contexts for window in plan.windows(context)]
        click.echo(f"cost: {cost_text(bench, models, windows)}", err=True)
        for model in models:
            runtime = bench.runtime(model)
            require_vocabulary(model, runtime, (run.tokens for run in runs))
            found.append((model, measure_perplexity(runtime, plan, tell, f"{model.name}: ")))
            report = PerplexityReport(plan, tuple(found), asked.environment(models))
            if not asked.as_json:
                emit("\n".join([model_text(*found[-1]), *_indented(report)]))
    return report


def _indented(report: PerplexityReport) -> list[str]:
    """The last model against the first."""
    from pi_convert.report.perplexity import against_lines

    return [f"  {line}" for line in against_lines(report, len(report.models) - 1)]


def _as_llamacpp(
    models: Sequence[Model], documents: Sequence[Document], asked: Asked
) -> LlamaCppReport:
    from pi_convert.evaluate.cost import cost_text
    from pi_convert.evaluate.models import Workbench, encode_whole, require_vocabulary
    from pi_convert.evaluate.perplexity import llamacpp_windows, measure_llamacpp
    from pi_convert.report.console import emit, progress
    from pi_convert.report.perplexity import LlamaCppReport, llamacpp_text

    found = []
    with progress() as tell, Workbench(tell) as bench:
        for model in models:
            run = encode_whole(model, documents)
            windows = [
                llamacpp_windows(run, model.bos, context, asked.max_windows)
                for context in asked.options.contexts or ()
            ]
            cost = cost_text(bench, [model], [window for group in windows for window in group])
            click.echo(f"cost: {cost}", err=True)
            runtime = bench.runtime(model)
            require_vocabulary(model, runtime, [run.tokens])
            measured = []
            for group in windows:
                measured.append(measure_llamacpp(runtime, group, model.name, tell))
                if not asked.as_json:
                    emit(llamacpp_text(model, measured[-1]))
            found.append((model, measured))
    return LlamaCppReport(found, asked.environment(models))
