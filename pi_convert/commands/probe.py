"""``pi-convert probe``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pi_convert.commands._measuring import read_texts, text_option
from pi_convert.commands.options import (
    json_option,
    model_argument,
    original_context_option,
    revision_option,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from converters.checkpoint import Checkpoint
    from pi_convert.commands._measuring import RunOptions
    from pi_convert.evaluate.texts import Document
    from pi_convert.report.probe import ProbeReport


@click.command()
@model_argument
@text_option
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    help="Torch's device; never falls back.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core.")
@original_context_option
@revision_option
@json_option
def command(
    *,
    model: str | None,
    texts: tuple[Path, ...],
    device: Literal["cpu", "cuda"],
    threads: int | None,
    original_context: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Tell from the weights which factor a checkpoint was tuned with.

    For checkpoints that may have lost their scaling. The text is scored in torch with factors from
    1 to 32, below the supposed L, and past it with factor 1 and the best ones. A tuned model
    predicts best with its own factor, also below L; where none stands out, that is said. The text
    should be of the kind that the model was trained on.

    \b
    Examples:
      pi-convert probe ./merged-model --text book.txt
      pi-convert probe ./merged-model --original-context 4096
    """
    from converters.sources import open_checkpoint
    from pi_convert.commands._measuring import RunOptions
    from pi_convert.defaults import resolve_model
    from pi_convert.report.console import emit, emit_json
    from pi_convert.report.probe import probe_text

    resolved = resolve_model(model)
    click.echo(resolved.announcement, err=True)
    run = RunOptions(device, threads, 512, None, "f16", None)
    checkpoint = open_checkpoint(
        resolved.reference, revision=revision, original_context=original_context
    )
    documents, record_of_texts = read_texts(texts)
    settings = {"revision": revision, "original_context": original_context, **record_of_texts}
    given = {"--revision": revision, "--original-context": original_context}
    words = [resolved.reference]
    words += [w for flag, value in given.items() if value is not None for w in (flag, str(value))]
    report = _probe(checkpoint, documents, run, settings, shlex.join(words))
    if as_json:
        emit_json(report.to_json())
    else:
        emit(probe_text(report))


def _probe(
    checkpoint: Checkpoint,
    texts: tuple[Document, ...],
    run: RunOptions,
    settings: Mapping[str, object],
    words: str,
) -> ProbeReport:
    from pi_convert.commands._models import require_contexts, torch_model
    from pi_convert.evaluate.cost import measure_speed
    from pi_convert.evaluate.models import encode_all, require_vocabulary
    from pi_convert.evaluate.probe import FACTORS, probe, probe_windows
    from pi_convert.evaluate.wording import duration
    from pi_convert.report.console import progress
    from pi_convert.report.probe import ProbeReport
    from pi_convert.report.provenance import environment
    from pi_convert.runtimes.pytorch import TorchModel, limit_threads

    if run.threads is not None:
        limit_threads(run.threads)
    model = torch_model(checkpoint, run)
    runs = encode_all(model, texts)
    windows = probe_windows(runs, checkpoint.rope.original_context)
    require_contexts([model], windows.past.tokens, extrapolate=True)
    with progress() as tell:
        loaded = TorchModel(checkpoint, device=run.device, progress=tell)
        require_vocabulary(model, loaded, (run.tokens for run in runs))
        speed = measure_speed(model, loaded)
        seconds = len(FACTORS) * speed.of(windows.below) + 3 * speed.of([windows.past])
        click.echo(f"cost: about {duration(seconds)}", err=True)
        found = probe(checkpoint, loaded, windows, tell)
        loaded.close()
    ran = environment(["torch"], {**run.settings(["torch"]), **settings})
    return ProbeReport(checkpoint.origin.label, words, checkpoint.rope.factor, found, ran)
