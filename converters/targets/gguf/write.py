"""Plans to finished GGUF files: all of them whole and checked, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from converters.checkpoint import Checkpoint
from converters.files import Output, sized_file, sync_and_hash
from converters.targets.gguf.plan import GgufPlan
from converters.targets.gguf.readback import check_file
from converters.targets.gguf.sink import GgufSink, streamed
from converters.targets.stream import StreamedTensor, write_all
from converters.targets.writing import RunSettings, write_targets


@dataclass(frozen=True, slots=True)
class GgufArtifact:
    """A finished file. ``tensor_types`` counts tensors by type."""

    path: Path
    quantize: str
    size_bytes: int
    sha256: str
    tensor_types: Mapping[str, int]
    fallbacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GgufTarget:
    """The files of ``plans`` in the folder ``out``. Before they get their names they are read back
    and their RoPE compared.
    """

    checkpoint: Checkpoint
    plans: Sequence[GgufPlan]
    out: Path

    @property
    def outputs(self) -> list[Output]:
        """One file a plan."""
        return [Output(self.out / plan.file_name) for plan in self.plans]

    @property
    def size_bytes(self) -> int:
        """Of all files, exactly."""
        return sum(plan.size_bytes for plan in self.plans)

    def require_writable(self) -> None:
        """A plan that exists can be written."""

    @contextmanager
    def open(self, partials: Sequence[Path]) -> Iterator[_GgufWriting]:
        """The files as holes of their final size."""
        with ExitStack() as stack:
            sinks = []
            for plan, partial in zip(self.plans, partials, strict=True):
                layout = plan.layout()
                descriptor = stack.enter_context(sized_file(partial, layout.size_bytes))
                offsets = {tensor.name: tensor.offset for tensor in layout.tensors.values()}
                sinks.append(GgufSink(descriptor, plan.outputs, offsets, plan.tensor_types))
            yield _GgufWriting(self, partials, sinks, streamed(self.plans[0].outputs))


@dataclass(frozen=True, slots=True)
class _GgufWriting:
    target: GgufTarget
    partials: Sequence[Path]
    sinks: Sequence[GgufSink]
    tensors: Sequence[StreamedTensor]

    def finish(self, source_hash: str) -> tuple[GgufArtifact, ...]:
        target = self.target
        for plan, sink, partial in zip(target.plans, self.sinks, self.partials, strict=True):
            # The header comes last: until then the file has no magic number and nothing loads it.
            layout = plan.layout(source_hash)
            write_all(sink.descriptor, np.frombuffer(layout.header, np.uint8), 0)
            check_file(partial, target.checkpoint, layout.tensors)
        finished = zip(target.outputs, target.plans, sync_and_hash(self.partials), strict=True)
        return tuple(
            GgufArtifact(
                output.path, plan.quantize, plan.size_bytes, sha256, plan.type_counts,
                plan.fallbacks,
            )
            for output, plan, sha256 in finished
        )  # fmt: skip


def write_gguf(
    checkpoint: Checkpoint,
    plans: Sequence[GgufPlan],
    out: Path,
    **settings: Unpack[RunSettings],
) -> tuple[GgufArtifact, ...]:
    """The files of ``plans`` in the folder ``out``; see ``write_targets``."""
    if not plans:
        return ()
    target = GgufTarget(checkpoint, plans, out)
    (artifacts,) = write_targets([target], **settings)
    return artifacts
