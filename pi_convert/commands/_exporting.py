"""What ``pi-convert export`` does once the command line is understood."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.errors import ConvertError
    from converters.ggml import Choice
    from converters.progress import Progress
    from converters.targets.gguf import GgufPlan
    from converters.targets.onnx import Device, GraphOptions, OnnxPlan, Storage, WeightOptions
    from converters.targets.writing import Target
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
    block_size: str | None
    asymmetric: bool
    embedding: str | None
    head: str | None
    accuracy_level: int | None
    last_logits: bool
    portable: bool
    out: Path
    verify: str | None
    threads: int | None
    dry_run: bool
    force: bool
    allow_requantize: bool
    quantizer: Choice | None
    as_json: bool


def require_export(source: Checkpoint, scale: float, options: ExportOptions) -> None:
    """Raises ``ConvertError`` where ``source``, once it is tuned, could not be exported.

    A tuned model's weights are not quantized, whatever the source's are.
    """
    from converters.targets.gguf.plan import DEFAULT_QUANTIZE

    options = replace(
        options, quantize=options.quantize or (DEFAULT_QUANTIZE,), allow_requantize=True
    )
    report = _planned(source, scale, options)
    for obstacle in _obstacles(_targets(report, options), options):
        raise obstacle
    _preflight(report, options)


def run_export(source: Checkpoint, scale: float, options: ExportOptions, started: float) -> int:
    """Plans, writes, proves and reports; the exit code."""
    from converters.errors import ConvertError
    from pi_convert.report.console import emit, emit_json, progress
    from pi_convert.report.export import dry_run_text, export_json, header_text

    report = _planned(source, scale, options)
    targets = _targets(report, options)
    obstacles = _obstacles(targets, options)
    try:
        report = replace(report, notices=(*report.notices, *_preflight(report, options)))
    except ConvertError as error:
        obstacles = (*obstacles, error)
    if not options.as_json:
        emit(header_text(report))
    if options.dry_run:
        report = replace(report, obstacles=obstacles)
        if options.as_json:
            emit_json(export_json(report))
        else:
            emit(dry_run_text(report))
        return 1 if obstacles else 0
    for obstacle in obstacles:
        raise obstacle
    with progress() as tell:
        report = _write(report, targets, options, tell)
    return _finish(replace(report, seconds=time.monotonic() - started), options)


def _planned(source: Checkpoint, scale: float, options: ExportOptions) -> ExportReport:
    """What would be written of ``source``; raises ``ConvertError`` where that cannot be."""
    from converters.ggml import load_quantizer
    from pi_convert.audit.stripped import lost_scaling
    from pi_convert.report.export import ExportReport

    checkpoint = source.interpolate(scale)
    load_quantizer(options.quantizer)  # one that cannot be had is said before any work
    lost = lost_scaling(source)
    return ExportReport(
        source,
        checkpoint,
        scale,
        plans=_plans(checkpoint, options),
        onnx_plans=_onnx_plans(checkpoint, options),
        out=options.out,
        folder=_folder(options, checkpoint),
        notices=(lost,) if lost else (),
    )


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

    weights = _weight_options(options)
    names = dict.fromkeys(options.precisions or ("fp32",))
    return tuple(plan_onnx(checkpoint, name, weights) for name in names)


def _weight_options(options: ExportOptions) -> WeightOptions:
    from converters.targets.onnx import WeightOptions

    default = WeightOptions()
    return WeightOptions(
        block_size=128 if options.block_size == "128" else default.block_size,
        asymmetric=options.asymmetric,
        embedding=cast("Storage | None", options.embedding),
        head=cast("Storage | None", options.head),
        requantize=options.allow_requantize,
    )


def _preflight(report: ExportReport, options: ExportOptions) -> tuple[str, ...]:
    """What to know of the ONNX files and of running them; raises where they cannot run."""
    if not report.onnx_plans:
        return ()
    from converters.targets.onnx import preflight

    device = cast("Device | None", options.device)
    return preflight(report.checkpoint, report.onnx_plans, _graph_options(options), device)


def _folder(options: ExportOptions, checkpoint: Checkpoint) -> Path | None:
    return options.out / checkpoint.artifact_name if "safetensors" in options.targets else None


def _targets(report: ExportReport, options: ExportOptions) -> dict[str, Target[Any]]:
    """The targets to write, by the field of the report that holds what is made of them."""
    targets: dict[str, Target[Any]] = {}
    if report.plans:
        from converters.targets.gguf import GgufTarget

        targets["ggufs"] = GgufTarget(report.checkpoint, report.plans, options.out)
    if report.onnx_plans:
        from converters.targets.onnx import OnnxTarget

        targets["onnx"] = OnnxTarget(
            report.checkpoint, report.onnx_plans, report.onnx_folder, _graph_options(options)
        )
    if report.folder is not None:
        from converters.targets.huggingface import FolderTarget

        targets["folders"] = FolderTarget(report.checkpoint, report.folder, options.dtype)
    return targets


def _graph_options(options: ExportOptions) -> GraphOptions:
    from converters.targets.onnx import GraphOptions

    level = GraphOptions().accuracy_level
    return GraphOptions(
        accuracy_level=level if options.accuracy_level is None else options.accuracy_level,
        last_logits=options.last_logits,
        portable=options.portable,
    )


def _obstacles(
    targets: Mapping[str, Target[Any]], options: ExportOptions
) -> tuple[ConvertError, ...]:
    """Why outputs cannot be written; asked before the first is, so that none is left alone."""
    from converters.errors import ConvertError
    from converters.targets.writing import require_target

    found = []
    for target in targets.values():
        try:
            require_target(target, force=options.force)
        except ConvertError as error:
            found.append(error)
    return tuple(found)


def _write(
    report: ExportReport,
    targets: Mapping[str, Target[Any]],
    options: ExportOptions,
    tell: Progress,
) -> ExportReport:
    """All targets in one reading of the source: all of them, or none."""
    from converters.targets.writing import write_targets

    written = write_targets(
        list(targets.values()),
        threads=options.threads,
        force=options.force,
        progress=tell,
        quantizer=options.quantizer,
    )
    made = dict(zip(targets, written, strict=True))
    return replace(
        report,
        ggufs=made.get("ggufs", ()),
        onnx=(made["onnx"],) if "onnx" in made else (),
        folders=(made["folders"],) if "folders" in made else (),
    )


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
