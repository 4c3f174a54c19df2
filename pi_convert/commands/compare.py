"""``pi-convert compare``."""

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
    from collections.abc import Sequence

    from pi_convert.evaluate.compare import Paired
    from pi_convert.evaluate.models import Model
    from pi_convert.evaluate.texts import Document
    from pi_convert.evaluate.windows import TokenStream, Window

PROTOCOLS = ("documents", "llama.cpp")
_DEFAULT_CONTEXT, _DEFAULT_DOCUMENTS = 1024, 8


@dataclass(frozen=True, slots=True)
class Asked:
    """Which tokens are compared."""

    context: int
    documents: int  # 0: all
    protocol: str
    max_windows: int  # of protocol llama.cpp; 0: all
    extrapolate: bool

    @property
    def settings(self) -> dict[str, object]:
        """For the record."""
        by_documents = self.protocol == "documents"
        count = "documents" if by_documents else "max_windows"
        return {
            "protocol": self.protocol,
            "context": self.context,
            count: self.documents if by_documents else self.max_windows,
            "extrapolate": self.extrapolate,
        }


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of each document, from its start. Default: 1024, or L' where that is less.",
)
@click.option(
    "--documents",
    type=click.IntRange(min=0),
    metavar="N",
    help="Documents, spread evenly over the texts; 0: every one. Default: 8.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="documents",
    help="llama.cpp: the positions that llama-perplexity --kl-divergence scores, second halves of"
    " windows of --context tokens side by side. Default: documents.",
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=0),
    metavar="N",
    help="Windows of --protocol llama.cpp, the first N; 0 (default): every one.",
)
@text_option
@click.option("--extrapolate", is_flag=True, help="Allow a context past L'.")
@scale_option(
    required=False,
    help="Interpolate what torch runs, without fine-tuning; A and B both, where torch runs both.",
)
@runtime_option("--runtime-a", "A, a GGUF file")
@runtime_option("--runtime-b", "B, a GGUF file")
@original_context_option
@revision_option
@run_options
@report_option
@json_option
def command(
    *,
    a: str,
    b: str,
    context: int | None,
    documents: int | None,
    protocol: str,
    max_windows: int | None,
    texts: tuple[Path, ...],
    extrapolate: bool,
    scale: float | None,
    runtime_a: str | None,
    runtime_b: str | None,
    original_context: int | None,
    revision: str | None,
    report: Path | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare two models on the same tokens: KL, agreement, paired NLL.

    A and B are any two of sources and artifacts (folders, GGUF and ONNX files, hub ids), each in
    its own runtime, in lockstep: no logits are stored. KL(A || B) and the change of NLL come with
    95 % intervals clustered by document, and KL by position.

    \b
    Examples:
      pi-convert compare model-PI8-Q4_K_M.gguf ./model --scale 8
      pi-convert compare model.gguf model.gguf --runtime-b pytorch --context 4096
      pi-convert compare f16.gguf q4_k_m.gguf --protocol llama.cpp --context 512 --text wiki.raw
    """
    if max_windows is not None and protocol != "llama.cpp":
        raise click.UsageError("--max-windows is of --protocol llama.cpp; else give --documents.")
    if documents is not None and protocol == "llama.cpp":
        raise click.UsageError("--protocol llama.cpp takes --max-windows in place of --documents.")
    from pi_convert.commands._models import Opening, open_models, record, require_contexts
    from pi_convert.report.compare import CompareReport, compare_text
    from pi_convert.report.compare_page import compare_page
    from pi_convert.report.console import emit, emit_json

    require_report(report, force=force)
    opening = Opening(take_run(flags), scale, None, revision, original_context)
    models = open_models(
        [
            (name, replace(opening, runtime=runtime))
            for name, runtime in ((a, runtime_a), (b, runtime_b))
        ]
    )
    if context is None:
        context = min([_DEFAULT_CONTEXT, *(m.context for m in models if m.context is not None)])
    require_contexts(models, context, extrapolate=extrapolate, at_once=True)
    count = _DEFAULT_DOCUMENTS if documents is None else documents
    asked = Asked(context, count, protocol, max_windows or 0, extrapolate)
    documents_read, record_of_texts = read_texts(texts)
    paired = _compare(models, documents_read, asked)
    ran = record(models, opening, {**asked.settings, **record_of_texts})
    found = CompareReport(models[0], models[1], paired, ran)
    if as_json:
        emit_json(found.to_json())
    else:
        emit(compare_text(found))
    if report is not None:
        write_page(compare_page(found), report, force=force)


def _compare(models: Sequence[Model], texts: Sequence[Document], asked: Asked) -> Paired:
    import contextlib

    from pi_convert.evaluate.compare import compare
    from pi_convert.evaluate.cost import measure_speed
    from pi_convert.evaluate.models import require_vocabulary
    from pi_convert.evaluate.wording import duration
    from pi_convert.report.console import progress

    runs, windows = _windows(models, texts, asked)
    with progress() as tell, contextlib.ExitStack() as stack:
        loaded = [stack.enter_context(contextlib.closing(m.load(tell))) for m in models]
        for model, runtime in zip(models, loaded, strict=True):
            require_vocabulary(model, runtime, (run.tokens for run in runs))
        seconds = sum(
            measure_speed(model, runtime).of(windows)
            for model, runtime in zip(models, loaded, strict=True)
        )
        click.echo(f"cost: about {duration(seconds)}", err=True)
        return compare(loaded[0], loaded[1], windows, tell)


def _windows(
    models: Sequence[Model], texts: Sequence[Document], asked: Asked
) -> tuple[Sequence[TokenStream], Sequence[Window]]:
    """The texts' tokens, and windows over them."""
    from pi_convert.evaluate.compare import document_windows
    from pi_convert.evaluate.models import one_text, require_same_tokens
    from pi_convert.evaluate.perplexity import llamacpp_windows

    if asked.protocol == "documents":
        runs = require_same_tokens(models, texts)
        return runs, document_windows(runs, asked.context, asked.documents)
    runs = require_same_tokens(models, [one_text(texts)])
    return runs, llamacpp_windows(runs[0], models[0].bos, asked.context, asked.max_windows)
