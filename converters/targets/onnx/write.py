"""Plans to a finished ONNX folder: whole and checked, or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from converters.checkpoint import Checkpoint
from converters.errors import OutputError
from converters.files import atomic_folder, require_free_space, sha256_file
from converters.ggml import load_ggml
from converters.progress import Progress, silent
from converters.targets.onnx.clients import GRAPHS, client_files
from converters.targets.onnx.graph import build_graph
from converters.targets.onnx.metadata import record
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.plan import OnnxPlan
from converters.targets.onnx.preflight import require_writable
from converters.targets.onnx.readback import check_graph
from converters.targets.onnx.sink import OnnxSink
from converters.targets.stream import Stream, StreamedTensor, default_threads


@dataclass(frozen=True, slots=True)
class OnnxArtifact:
    """A folder that was written: SHA-256 in hex by file, and the size of all files."""

    path: Path
    files: Mapping[str, str]
    size_bytes: int
    plans: tuple[OnnxPlan, ...]


def require_replaceable(out: Path) -> None:
    """Raises ``OutputError`` where replacing the folder ``out`` would lose more than an export."""
    if not out.is_dir():
        return
    suffixes = {".json", ".jinja", ".model", ".txt"}
    strange = sorted(p.name for p in out.iterdir() if p.suffix not in suffixes and p.name != GRAPHS)
    graphs = out / GRAPHS
    if graphs.is_dir():
        strange += sorted(
            p.name for p in graphs.iterdir() if p.suffix not in (".onnx", ".onnx_data")
        )
    if strange or (any(out.iterdir()) and not graphs.is_dir()):
        raise OutputError(
            f"{out} holds other things than an ONNX export: {', '.join(strange[:5])}",
            hint="Move them away, or give another --out: --force replaces the whole folder.",
        )


class WriteSettings(TypedDict, total=False):
    """How a folder is written; what is left out has the default."""

    options: GraphOptions | None  # None: its defaults
    threads: int | None  # None: every core
    force: bool  # False
    progress: Progress  # silent


def write_onnx(
    checkpoint: Checkpoint,
    plans: Sequence[OnnxPlan],
    out: Path,
    **settings: Unpack[WriteSettings],
) -> OnnxArtifact:
    """Writes the files of ``plans`` into the folder ``out``; each source tensor is read once.

    The bytes depend on the source, the options and the build of ggml alone. Raises ``OutputError``
    where the folder cannot be written, exists without ``force`` or reads back wrong,
    ``UnsupportedError`` for options or tables that no runtime takes, and ``TensorError`` for
    weights that are not finite or that a precision cannot hold.
    """
    options = settings.get("options") or GraphOptions()
    for plan in plans:
        require_writable(plan, options)
    require_replaceable(out)
    with atomic_folder(out, force=settings.get("force", False)) as partial:
        require_free_space(partial, sum(plan.data_bytes for plan in plans))
        graphs = partial / GRAPHS
        graphs.mkdir()
        source_hash = _write_data(checkpoint, plans, graphs, settings)
        for plan in plans:
            _write_graph(checkpoint, plan, options, graphs, source_hash)
        for name, content in client_files(checkpoint, plans).items():
            (partial / name).write_bytes(content)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(partial)): sha256_file(path) for path in files}
        size_bytes = sum(path.stat().st_size for path in files)
    return OnnxArtifact(out, hashes, size_bytes, tuple(plans))


def _write_data(
    checkpoint: Checkpoint,
    plans: Sequence[OnnxPlan],
    folder: Path,
    settings: WriteSettings,
) -> str:
    with contextlib.ExitStack() as stack:
        sinks = []
        for plan in plans:
            path = folder / plan.precision.data_name
            sinks.append(OnnxSink(stack.enter_context(_descriptor(path, plan.data_bytes)), plan))
        for sink in sinks:
            sink.write_tables(checkpoint)
        tensors = [StreamedTensor(tensor) for tensor in checkpoint.tensors.values()]
        progress = settings.get("progress", silent)
        stream = Stream(tensors, sinks, load_ggml(), progress=progress)
        return stream.run(settings.get("threads") or default_threads())


def _write_graph(
    checkpoint: Checkpoint, plan: OnnxPlan, options: GraphOptions, folder: Path, source_hash: str
) -> None:
    import onnx_ir as ir

    properties = record(checkpoint, plan, source_hash, load_ggml().fingerprint())
    model = build_graph(checkpoint, plan, options, properties)
    path = folder / plan.precision.file_name
    ir.save(model, path)
    check_graph(path, checkpoint, plan)


@contextlib.contextmanager
def _descriptor(path: Path, size_bytes: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)
