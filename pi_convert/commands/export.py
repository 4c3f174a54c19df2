"""``pi-convert export``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from pi_convert.commands.options import (
    PATH,
    force_option,
    json_option,
    model_argument,
    original_context_option,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.progress import Progress
    from converters.targets.gguf import GgufPlan
    from pi_convert.report.export import ExportReport
    from pi_convert.verify.verdict import Preset, Verdict

TARGETS = ("gguf", "safetensors")
DTYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the command line asked for."""

    targets: tuple[str, ...]
    quantize: tuple[str, ...]
    dtype: str | None
    out: Path
    verify: str | None
    threads: int | None
    dry_run: bool
    force: bool
    allow_requantize: bool
    as_json: bool


@click.command()
@model_argument
@click.option(
    "--to",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    required=True,
    help="Format to write; may be repeated, the source is opened once.",
)
@scale_option(required=True, help="Factor s that the context is extended by; 1 leaves it as it is.")
@click.option(
    "--quantize",
    multiple=True,
    metavar="TYPE",
    help="GGUF type such as q4_k_m or f16 (see `pi-convert quants`); may be repeated."
    " Default: q4_k_m; a quantized source keeps its tensors as they are.",
)
@click.option("--allow-requantize", is_flag=True, help="Let --quantize change a quantized source.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of a safetensors folder. Default: the source's; float32 for a quantized one.",
)
@click.option("--out", type=PATH, default=Path(), help="Folder to write to. Default: this one.")
@click.option(
    "--verify",
    type=click.Choice(("quick", "full")),
    help="Prove each GGUF after writing it; exit 3 where the proof fails.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
@original_context_option
@revision_option
@force_option
@json_option
def command(
    model: str | None,
    scale: float,
    original_context: int | None,
    revision: str | None,
    **flags: object,
) -> int:
    """Write a checkpoint as GGUF or safetensors, with its RoPE interpolated.

    The RoPE of MODEL is scaled by S (factors compose: a model of factor 2 exported with --scale 4
    has factor 8) and written in every spelling that readers of the format need.

    \b
    Examples:
      pi-convert export --to gguf --scale 8
      pi-convert export ./vicuna --to gguf --scale 4 --quantize q8_0 --verify quick
      pi-convert export org/name --revision main --to safetensors --scale 2 --dtype bf16
    """
    options = ExportOptions(**flags)  # type: ignore[arg-type]
    _check_usage(options)
    from converters.sources import open_checkpoint
    from pi_convert.defaults import resolve_model
    from pi_convert.report.console import emit

    started = time.monotonic()
    resolved = resolve_model(model)
    if not options.as_json:
        emit(resolved.announcement)
    source = open_checkpoint(
        resolved.reference, revision=revision, original_context=original_context
    )
    return _export(source, source.interpolate(scale), scale, options, started)


def _check_usage(options: ExportOptions) -> None:
    if options.quantize and "gguf" not in options.targets:
        raise click.UsageError("--quantize is for --to gguf; a safetensors folder takes --dtype.")
    if options.dtype and "safetensors" not in options.targets:
        raise click.UsageError(
            f"--dtype is for --to safetensors; for a GGUF file give --quantize {options.dtype}."
        )
    if options.allow_requantize and not options.quantize:
        raise click.UsageError("--allow-requantize goes with --quantize TYPE.")
    if options.threads and "gguf" not in options.targets:
        raise click.UsageError("--threads is for --to gguf; a safetensors folder is copied.")
    if options.verify and "gguf" not in options.targets:
        raise click.UsageError("--verify proves GGUF files; add --to gguf.")
    if options.verify and options.dry_run:
        raise click.UsageError("--dry-run writes nothing that --verify could prove.")


def _export(
    source: Checkpoint, checkpoint: Checkpoint, scale: float, options: ExportOptions, started: float
) -> int:
    from pi_convert.report.console import emit, emit_json, progress
    from pi_convert.report.export import ExportReport, dry_run_text, export_json, header_text

    report = ExportReport(
        source,
        checkpoint,
        scale,
        plans=_plans(checkpoint, options),
        folder=_folder(options, checkpoint),
    )
    if not options.as_json:
        emit(header_text(report))
    if options.dry_run:
        if options.as_json:
            emit_json(export_json(report))
        else:
            emit(dry_run_text(report))
        return 0
    _refuse_existing(report, options)
    with progress() as tell:
        report = _write(report, options, tell)
    return _finish(replace(report, seconds=time.monotonic() - started), options)


def _plans(checkpoint: Checkpoint, options: ExportOptions) -> tuple[GgufPlan, ...]:
    from converters.targets.gguf import plan_gguf

    if "gguf" not in options.targets:
        return ()
    return plan_gguf(checkpoint, options.quantize, allow_requantize=options.allow_requantize)


def _folder(options: ExportOptions, checkpoint: Checkpoint) -> Path | None:
    return options.out / checkpoint.artifact_name if "safetensors" in options.targets else None


def _refuse_existing(report: ExportReport, options: ExportOptions) -> None:
    """Asks for every target before the first is written, so that none is left without the rest."""
    from converters.files import refuse_existing
    from converters.targets.huggingface import require_replaceable

    for plan in report.plans:
        refuse_existing(options.out / plan.file_name, force=options.force)
    if report.folder is not None:
        refuse_existing(report.folder, force=options.force)
        require_replaceable(report.folder, report.checkpoint)


def _write(report: ExportReport, options: ExportOptions, tell: Progress) -> ExportReport:
    from converters.targets.gguf import write_gguf
    from converters.targets.huggingface import write_folder

    if report.plans:
        ggufs = write_gguf(
            report.checkpoint, report.plans, options.out,
            threads=options.threads, force=options.force, progress=tell,
        )  # fmt: skip
        report = replace(report, ggufs=ggufs)
    if report.folder is not None:
        folder = write_folder(
            report.checkpoint,
            report.folder,
            dtype=options.dtype,
            force=options.force,
            progress=tell,
        )
        report = replace(report, folders=(folder,))
    return report


def _finish(report: ExportReport, options: ExportOptions) -> int:
    from pi_convert.report.console import emit, emit_json
    from pi_convert.report.export import export_json, written_text

    if not options.as_json:
        emit(written_text(report))
    if options.verify is not None:
        report = replace(report, verdicts=_verify(report, options))
    if options.as_json:
        emit_json(export_json(report))
    return max((verdict.outcome.exit_code for verdict in report.verdicts), default=0)


def _verify(report: ExportReport, options: ExportOptions) -> tuple[Verdict, ...]:
    from pi_convert.report.console import emit, progress
    from pi_convert.report.verdict import verdict_text
    from pi_convert.runtimes.llamacpp import LlamaCppOptions
    from pi_convert.verify import VerifyRequest, verify

    verdicts = []
    for gguf in report.ggufs:
        request = VerifyRequest(
            gguf.path,
            report.source,
            report.scale,
            preset=cast(Preset, options.verify),
            llamacpp=LlamaCppOptions(threads=options.threads),
        )
        with progress() as tell:
            verdicts.append(verify(request, tell))
        if not options.as_json:
            emit("\n" + verdict_text(verdicts[-1]))
    return tuple(verdicts)
