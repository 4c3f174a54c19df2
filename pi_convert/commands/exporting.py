"""What ``pi-convert export`` does once the command line is understood."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.errors import ConvertError
    from converters.progress import Progress
    from converters.targets.gguf import GgufPlan
    from converters.targets.onnx import OnnxArtifact, OnnxPlan
    from pi_convert.report.export import ExportReport
    from pi_convert.verify.verdict import Preset, Verdict


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the command line asked for."""

    targets: tuple[str, ...]
    quantize: tuple[str, ...]
    dtype: str | None
    precisions: tuple[str, ...]
    device: str | None
    accuracy_level: int | None
    last_logits: bool
    portable: bool
    out: Path
    verify: str | None
    threads: int | None
    dry_run: bool
    force: bool
    allow_requantize: bool
    as_json: bool


def run_export(source: Checkpoint, scale: float, options: ExportOptions, started: float) -> int:
    """Plans, writes, proves and reports; the exit code."""
    from pi_convert.report.console import emit, emit_json, progress
    from pi_convert.report.export import ExportReport, dry_run_text, export_json, header_text

    checkpoint = source.interpolate(scale)
    report = ExportReport(
        source,
        checkpoint,
        scale,
        plans=_plans(checkpoint, options),
        onnx_plans=_onnx_plans(checkpoint, options),
        out=options.out,
        folder=_folder(options, checkpoint),
    )
    obstacles = _obstacles(report, options)
    if not options.as_json:
        emit(header_text(report))
    if options.dry_run:
        report = replace(report, obstacles=obstacles)
        if options.as_json:
            emit_json(export_json(report))
        else:
            emit(dry_run_text(report))
        return 0
    for obstacle in obstacles:
        raise obstacle
    _require_space(report, options)
    with progress() as tell:
        report = _write(report, options, tell)
    return _finish(replace(report, seconds=time.monotonic() - started), options)


def _plans(checkpoint: Checkpoint, options: ExportOptions) -> tuple[GgufPlan, ...]:
    from converters.targets.gguf import plan_gguf

    if "gguf" not in options.targets:
        return ()
    return plan_gguf(checkpoint, options.quantize, allow_requantize=options.allow_requantize)


def _onnx_plans(checkpoint: Checkpoint, options: ExportOptions) -> tuple[OnnxPlan, ...]:
    if "onnx" not in options.targets:
        return ()
    from pi_convert.runtimes.ort import require_onnx

    require_onnx()
    from converters.targets.onnx import plan_onnx

    return tuple(plan_onnx(checkpoint, name) for name in options.precisions or ("fp32",))


def _folder(options: ExportOptions, checkpoint: Checkpoint) -> Path | None:
    return options.out / checkpoint.artifact_name if "safetensors" in options.targets else None


def _obstacles(report: ExportReport, options: ExportOptions) -> tuple[ConvertError, ...]:
    """Why outputs cannot be written; asked before the first is, so that none is left alone."""
    from converters.errors import ConvertError
    from converters.files import refuse_existing
    from converters.targets.huggingface import require_replaceable

    paths = [options.out / plan.file_name for plan in report.plans]
    checks = [partial(refuse_existing, path, force=options.force) for path in paths]
    if report.folder is not None:
        checks.append(partial(refuse_existing, report.folder, force=options.force))
        checks.append(partial(require_replaceable, report.folder, report.checkpoint))
    if report.onnx_plans:
        from converters.targets.onnx import require_replaceable as require_onnx_folder

        checks.append(partial(refuse_existing, report.onnx_folder, force=options.force))
        checks.append(partial(require_onnx_folder, report.onnx_folder))
    found = []
    for check in checks:
        try:
            check()
        except ConvertError as error:
            found.append(error)
    return tuple(found)


def _require_space(report: ExportReport, options: ExportOptions) -> None:
    """Asks for all targets at once: they are all written to ``--out``."""
    from converters.files import require_free_space
    from converters.targets.huggingface import folder_bytes

    needed = sum(plan.size_bytes for plan in report.plans)
    if report.folder is not None:
        needed += folder_bytes(report.checkpoint, options.dtype)
    needed += sum(plan.data_bytes for plan in report.onnx_plans)
    require_free_space(options.out, needed)


def _write(report: ExportReport, options: ExportOptions, tell: Progress) -> ExportReport:
    from converters.targets.gguf import write_gguf
    from converters.targets.huggingface import write_folder

    if report.plans:
        ggufs = write_gguf(
            report.checkpoint, report.plans, options.out,
            threads=options.threads, force=options.force, progress=tell,
        )  # fmt: skip
        report = replace(report, ggufs=ggufs)
    if report.onnx_plans:
        report = replace(report, onnx=(_write_onnx(report, options, tell),))
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


def _write_onnx(report: ExportReport, options: ExportOptions, tell: Progress) -> OnnxArtifact:
    from converters.targets.onnx import GraphOptions, write_onnx

    level = GraphOptions().accuracy_level
    graph = GraphOptions(
        accuracy_level=level if options.accuracy_level is None else options.accuracy_level,
        last_logits=options.last_logits,
        portable=options.portable,
    )
    return write_onnx(
        report.checkpoint, report.onnx_plans, report.onnx_folder,
        options=graph, threads=options.threads, force=options.force, progress=tell,
    )  # fmt: skip


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
    from pi_convert.commands.verify import prove
    from pi_convert.report.console import emit
    from pi_convert.report.verdict import verdict_text
    from pi_convert.runtimes.llamacpp import LlamaCppOptions
    from pi_convert.runtimes.ort import OrtOptions
    from pi_convert.verify import VerifyRequest

    verdicts = []
    graphs = [
        folder.path / "onnx" / plan.precision.file_name
        for folder in report.onnx
        for plan in folder.plans
    ]
    for path in [*(gguf.path for gguf in report.ggufs), *graphs]:
        request = VerifyRequest(
            path,
            report.source,
            report.scale,
            preset=cast("Preset", options.verify),
            llamacpp=LlamaCppOptions(threads=options.threads),
            ort=OrtOptions(threads=options.threads),
        )
        verdicts.append(prove(request))
        if not options.as_json:
            emit("\n" + verdict_text(verdicts[-1]))
    return tuple(verdicts)
