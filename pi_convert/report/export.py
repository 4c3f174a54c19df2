"""What ``export`` read, planned and wrote, as text and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.checkpoint import Checkpoint
from converters.errors import ConvertError
from converters.targets.gguf import GgufArtifact, GgufPlan
from converters.targets.huggingface import FolderArtifact
from pi_convert.report.console import size, table
from pi_convert.report.rope import evidence_lines, rope_json, rope_text
from pi_convert.report.runlines import run_lines, run_text

if TYPE_CHECKING:  # loading the verdict loads all of verification, and ONNX is an extra
    from converters.targets.onnx import OnnxArtifact, OnnxPlan
    from pi_convert.verify.verdict import Verdict

SCHEMA_VERSION = 1
_NAMED = 3  # tensors named of many; --json has all

QUALITY_NOTE = (
    "Position Interpolation without fine-tuning costs quality: `pi-convert verify` of a GGUF or"
    "\nONNX export measures it, as the KL against factor 1 on the same tokens. A short"
    "\nfine-tuning mends it: `pi-convert finetune`."
)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """One run of ``export``; empty tuples for what was not asked for or did not happen yet."""

    source: Checkpoint
    checkpoint: Checkpoint
    scale: float
    plans: tuple[GgufPlan, ...] = ()
    onnx_plans: tuple[OnnxPlan, ...] = ()
    out: Path = Path()  # the folder to write to
    folder: Path | None = None  # where a safetensors folder would go
    notices: tuple[str, ...] = ()  # what to know before anything is written
    obstacles: tuple[ConvertError, ...] = ()  # outputs that exist and would not be replaced
    ggufs: tuple[GgufArtifact, ...] = ()
    folders: tuple[FolderArtifact, ...] = ()
    onnx: tuple[OnnxArtifact, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    seconds: float = 0.0

    @property
    def onnx_folder(self) -> Path:
        """Where an ONNX folder would go, beside a safetensors folder of the same name."""
        return self.out / f"{self.checkpoint.artifact_name}-ONNX"


def header_text(report: ExportReport) -> str:
    """What was read, and the RoPE before and after."""
    source = report.source
    stored = sum(tensor.size_bytes for tensor in source.tensors.values())
    kinds = Counter(tensor.encoding.name for tensor in source.tensors.values())
    rows = [
        [
            "read",
            f"{source.origin.label}: {source.architecture.name},"
            f" {source.parameters / 1e6:,.1f} M parameters, {len(source.tensors)} tensors"
            f" ({counts(kinds)}), {size(stored)}",
        ],
        ["RoPE before", rope_text(source.rope)],
        ["RoPE after", rope_text(report.checkpoint.rope)],
        ["told by", "; ".join(evidence_lines(source.rope))],
        *(["note", notice] for notice in report.notices),
    ]
    return _rows(rows)


def dry_run_text(report: ExportReport) -> str:
    """What would be written or replaced, and what stands in the way."""
    rows = []
    for plan in report.plans:
        path = report.out / plan.file_name
        what = f"{path}  {size(plan.size_bytes)} ({counts(plan.type_counts)}){_replacing(path)}"
        rows += [["would write", what], *fallback_rows(plan.fallbacks)]
    if report.folder is not None:
        rows.append(["would write", f"{report.folder}/{_replacing(report.folder)}"])
    for onnx in report.onnx_plans:
        place = report.onnx_folder / "onnx" / onnx.precision.file_name
        kinds = counts(_onnx_types(onnx))
        rows.append(["would write", f"{place}  {size(onnx.data_bytes)} ({kinds})"])
        rows += fallback_rows(onnx.fallbacks)
    rows += [["would stop", f"{error.message}. {error.hint}"] for error in report.obstacles]
    return "\n".join([_rows(rows), "dry run: nothing was written"])


def _replacing(path: Path) -> str:
    return ", in place of the one that exists" if path.exists() else ""


def written_text(report: ExportReport) -> str:
    """Sizes, hashes and time of what was written, and the lines that run it."""
    rows = []
    for gguf in report.ggufs:
        rows += [
            ["wrote", f"{gguf.path}  {size(gguf.size_bytes)} ({counts(gguf.tensor_types)})"],
            ["sha256", gguf.sha256],
            *fallback_rows(gguf.fallbacks),
        ]
    for folder in report.folders:
        rows.append(["wrote", f"{folder.path}/  {size(folder.size_bytes)}"])
        rows += [["sha256", f"{digest}  {name}"] for name, digest in folder.files.items()]
    for onnx_folder in report.onnx:
        rows += _onnx_rows(onnx_folder)
        rows.append(["load it in", "onnxruntime-genai, optimum, transformers.js: docs/clients.md"])
    parts = [_rows([*rows, ["time", f"{report.seconds:.1f} s"]])]
    context = report.checkpoint.rope.context
    for gguf in report.ggufs[:1]:
        parts += ["", run_text(run_lines(gguf.path, report.checkpoint.hparams, context), context)]
    if len(report.ggufs) > 1:
        parts.append("  and the other files likewise")
    if report.scale != 1:
        parts += ["", QUALITY_NOTE]
    return "\n".join(parts)


def _onnx_types(plan: OnnxPlan) -> Counter[str]:
    return Counter(encoding.name for encoding in plan.encodings.values())


def _onnx_rows(folder: OnnxArtifact) -> list[list[str]]:
    rows = [["wrote", f"{folder.path}/  {size(folder.size_bytes)}"]]
    for plan in folder.plans:
        kinds = f"{counts(_onnx_types(plan))}; {plan.table_rows:,} positions"
        if folder.plans[1:] and plan is folder.plans[0]:
            kinds += "; the one that onnxruntime-genai opens"
        rows.append([plan.precision.name, f"onnx/{plan.precision.file_name}  {kinds}"])
        rows += fallback_rows(plan.fallbacks)
    return rows + [["sha256", f"{digest}  {name}"] for name, digest in folder.files.items()]


def _rows(rows: list[list[str]]) -> str:
    """Every block of export's text in the same two columns."""
    return table([[label.ljust(11), value] for label, value in rows])


def counts(kinds: Mapping[str, int]) -> str:
    """q4_1 210, f32 61, q8_0 1: most frequent first."""
    return ", ".join(
        f"{name} {count}" for name, count in sorted(kinds.items(), key=lambda item: -item[1])
    )


def fallback_rows(fallbacks: tuple[str, ...]) -> list[list[str]]:
    """Tensors whose rows fit no block of the wanted type, a row for each pair of types."""
    by_change: dict[str, list[str]] = {}
    for line in fallbacks:
        name, change = line.split(": ", 1)
        by_change.setdefault(change, []).append(name)
    rows = []
    for change, names in by_change.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        rows.append(["fell back", f"{change}: {', '.join(names[:_NAMED])}{more}"])
    return rows


def export_json(report: ExportReport) -> dict[str, object]:
    """The same for machines; paths as given, bytes as numbers."""
    source = report.source
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {
            "label": source.origin.label,
            "kind": source.origin.kind,
            "revision": source.origin.revision,
            "architecture": source.architecture.name,
            "parameters": source.parameters,
            "rope": rope_json(source.rope),
        },
        "scale": report.scale,
        "rope": rope_json(report.checkpoint.rope),
        "notices": list(report.notices),
        "obstacles": [error.message for error in report.obstacles],
        "planned": [
            {
                "format": "gguf",
                "path": str(report.out / plan.file_name),
                "quantize": plan.quantize,
                "size_bytes": plan.size_bytes,
                "tensor_types": plan.type_counts,
                "fallbacks": list(plan.fallbacks),
            }
            for plan in report.plans
        ]
        + [
            {
                "format": "onnx",
                "path": str(report.onnx_folder / "onnx" / onnx.precision.file_name),
                "precision": onnx.precision.name,
                "size_bytes": onnx.data_bytes,
                "tensor_types": dict(_onnx_types(onnx)),
                "fallbacks": list(onnx.fallbacks),
            }
            for onnx in report.onnx_plans
        ]
        + [
            {"format": "safetensors", "path": str(folder)}
            for folder in [report.folder]
            if folder is not None
        ],
        "artifacts": [_gguf_json(report, gguf) for gguf in report.ggufs]
        + [
            {
                "format": "safetensors",
                "path": str(folder.path),
                "size_bytes": folder.size_bytes,
                "files": dict(folder.files),
            }
            for folder in report.folders
        ]
        + [
            {
                "format": "onnx",
                "path": str(onnx.path),
                "precisions": [plan.precision.name for plan in onnx.plans],
                "size_bytes": onnx.size_bytes,
                "files": dict(onnx.files),
            }
            for onnx in report.onnx
        ],
        "verdicts": [verdict.to_json() for verdict in report.verdicts],
        "seconds": round(report.seconds, 2),
    }


def _gguf_json(report: ExportReport, gguf: GgufArtifact) -> dict[str, object]:
    lines = run_lines(gguf.path, report.checkpoint.hparams, report.checkpoint.rope.context)
    return {
        "format": "gguf",
        "path": str(gguf.path),
        "quantize": gguf.quantize,
        "size_bytes": gguf.size_bytes,
        "sha256": gguf.sha256,
        "tensor_types": dict(gguf.tensor_types),
        "fallbacks": list(gguf.fallbacks),
        "run": {
            "context": lines.context,
            "kv_cache_bytes": lines.kv_cache_bytes,
            "llama_cli": lines.llama_cli,
            "llama_server": lines.llama_server,
            "ollama": lines.ollama,
        },
    }
