"""Plans to a finished ONNX folder: whole and checked, or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from converters.checkpoint import Checkpoint
from converters.errors import OutputError
from converters.files import Output, hash_files, sized_file, sync_and_hash, synced
from converters.ggml import load_ggml
from converters.targets.huggingface import belongs_to_checkpoint
from converters.targets.onnx.clients import GRAPHS, client_files
from converters.targets.onnx.graph import build_graph
from converters.targets.onnx.metadata import record
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.plan import OnnxPlan
from converters.targets.onnx.preflight import require_writable
from converters.targets.onnx.readback import check_graph
from converters.targets.onnx.sink import OnnxSink
from converters.targets.stream import StreamedTensor
from converters.targets.writing import RunSettings, write_targets


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
    strange = sorted(
        p.name for p in out.iterdir() if p.name != GRAPHS and not belongs_to_checkpoint(p)
    )
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


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    """The files of ``plans`` in the folder ``out``.

    The bytes depend on the source, the options and the build of ggml alone.
    """

    checkpoint: Checkpoint
    plans: Sequence[OnnxPlan]
    out: Path
    options: GraphOptions = field(default_factory=GraphOptions)

    @property
    def outputs(self) -> list[Output]:
        """The folder."""
        return [Output(self.out, is_folder=True)]

    @property
    def size_bytes(self) -> int:
        """Of all data files."""
        return sum(plan.data_bytes for plan in self.plans)

    def require_writable(self) -> None:
        """Raises ``UnsupportedError`` for options or tables that no runtime takes.

        ``OutputError`` where replacing the folder would lose more than an export.
        """
        for plan in self.plans:
            require_writable(plan, self.options)
        require_replaceable(self.out)

    @contextmanager
    def open(self, partials: Sequence[Path]) -> Iterator[_OnnxWriting]:
        """The data files, their tables written."""
        (folder,) = partials
        graphs = folder / GRAPHS
        graphs.mkdir()
        with ExitStack() as stack:
            sinks = []
            for plan in self.plans:
                data = graphs / plan.precision.data_name
                descriptor = stack.enter_context(sized_file(data, plan.data_bytes))
                sinks.append(OnnxSink(descriptor, plan))
                sinks[-1].write_tables(self.checkpoint)
            tensors = [StreamedTensor(tensor) for tensor in self.checkpoint.tensors.values()]
            yield _OnnxWriting(self, folder, sinks, tensors)


@dataclass(frozen=True, slots=True)
class _OnnxWriting:
    target: OnnxTarget
    folder: Path
    sinks: Sequence[OnnxSink]
    tensors: Sequence[StreamedTensor]

    def finish(self, source_hash: str) -> OnnxArtifact:
        target = self.target
        data = [self.folder / GRAPHS / plan.precision.data_name for plan in target.plans]
        with synced(data):  # which takes the disk as long as all else here
            hashes = self._named(data, hash_files(data))
            for plan in target.plans:
                data_hash = hashes[f"{GRAPHS}/{plan.precision.data_name}"]
                self._write_graph(plan, source_hash, data_hash)
            for name, content in client_files(target.checkpoint, target.plans).items():
                (self.folder / name).write_bytes(content)
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            others = sorted(set(files) - set(data))
            hashes |= self._named(others, sync_and_hash(others))
        size_bytes = sum(path.stat().st_size for path in files)
        return OnnxArtifact(
            target.out, dict(sorted(hashes.items())), size_bytes, tuple(target.plans)
        )

    def _named(self, paths: Sequence[Path], hashes: Sequence[str]) -> dict[str, str]:
        """Hashes by the files' paths inside the folder."""
        names = [str(path.relative_to(self.folder)) for path in paths]
        return dict(zip(names, hashes, strict=True))

    def _write_graph(self, plan: OnnxPlan, source_hash: str, data_hash: str) -> None:
        import onnx_ir as ir

        checkpoint = self.target.checkpoint
        options, quantizer = self.target.options, load_ggml().fingerprint()
        properties = record(
            checkpoint, plan, options,
            source_hash=source_hash, data_hash=data_hash, quantizer=quantizer,
        )  # fmt: skip
        model = build_graph(checkpoint, plan, options, properties)
        path = self.folder / GRAPHS / plan.precision.file_name
        ir.save(model, path)
        check_graph(path, checkpoint, plan)


def write_onnx(
    checkpoint: Checkpoint,
    plans: Sequence[OnnxPlan],
    out: Path,
    options: GraphOptions | None = None,
    **settings: Unpack[RunSettings],
) -> OnnxArtifact:
    """Writes the files of ``plans`` into the folder ``out``; see ``write_targets``."""
    target = OnnxTarget(checkpoint, plans, out, options or GraphOptions())
    (artifact,) = write_targets([target], **settings)
    return artifact
