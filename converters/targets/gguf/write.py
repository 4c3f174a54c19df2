"""Plans to finished GGUF files: all of them whole and checked, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.gguf_header import Layout
from converters.files import atomic_files, refuse_existing, require_free_space, sha256_file
from converters.ggml import load_ggml
from converters.progress import Progress, silent
from converters.targets.gguf.plan import GgufPlan
from converters.targets.gguf.readback import check_file
from converters.targets.gguf.sink import GgufSink, streamed
from converters.targets.stream import Stream, default_threads, write_all


@dataclass(frozen=True, slots=True)
class GgufArtifact:
    """A finished file. ``tensor_types`` counts tensors by type."""

    path: Path
    quantize: str
    size_bytes: int
    sha256: str
    tensor_types: Mapping[str, int]
    fallbacks: tuple[str, ...]


def write_gguf(
    checkpoint: Checkpoint,
    plans: Sequence[GgufPlan],
    out: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> tuple[GgufArtifact, ...]:
    """The files of ``plans`` in the folder ``out``; each source tensor is read once.

    The bytes depend on the source and on the build of ggml alone, not on ``threads``. Before a file
    gets its name it is read back and its RoPE compared. Raises ``OutputError`` where a file exists
    (without ``force``), is being written by another run, does not fit or was written wrong, and
    ``TensorError`` for weights that are not finite; then no file of the run is left behind.
    """
    if not plans:
        return ()
    paths = [out / plan.file_name for plan in plans]
    for path in paths:
        refuse_existing(path, force=force)
    require_free_space(_nearest_folder(out), sum(plan.size_bytes for plan in plans))
    with _no_empty_folder_left(out), atomic_files(paths, force=force) as partials:
        layouts = _write_data(
            checkpoint,
            plans,
            partials,
            threads=threads or default_threads(),
            progress=progress,
        )
        for partial, layout in zip(partials, layouts, strict=True):
            check_file(partial, checkpoint, layout.tensors)
        hashes = _sync_and_hash(partials)
    return tuple(
        GgufArtifact(path, plan.quantize, plan.size_bytes, sha256, plan.type_counts, plan.fallbacks)
        for path, plan, sha256 in zip(paths, plans, hashes, strict=True)
    )


def _write_data(
    checkpoint: Checkpoint,
    plans: Sequence[GgufPlan],
    partials: Sequence[Path],
    *,
    threads: int,
    progress: Progress,
) -> list[Layout]:
    with contextlib.ExitStack() as stack:
        sinks = []
        for plan, partial in zip(plans, partials, strict=True):
            layout = plan.layout()
            descriptor = stack.enter_context(_descriptor(partial, layout.size_bytes))
            offsets = {tensor.name: tensor.offset for tensor in layout.tensors.values()}
            sinks.append(GgufSink(descriptor, plan.outputs, offsets, plan.tensor_types))
        tensors = streamed(plans[0].outputs)
        stream = Stream(tensors, sinks, load_ggml(), progress=progress)
        source_hash = stream.run(threads)
        # The header comes last: until then the file has no magic number and nothing loads it.
        layouts = [plan.layout(source_hash) for plan in plans]
        for sink, layout in zip(sinks, layouts, strict=True):
            write_all(sink.descriptor, np.frombuffer(layout.header, np.uint8), 0)
    return layouts


@contextlib.contextmanager
def _no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Removes ``folder`` again on an error, where it did not exist before and holds nothing."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _descriptor(path: Path, size_bytes: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_and_hash(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, taken while the disk is busy with it."""
    with ThreadPoolExecutor(2 * len(paths)) as pool:
        synced = [pool.submit(_sync, path) for path in paths]
        hashes = [pool.submit(sha256_file, path) for path in paths]
        for future in synced:
            future.result()
        return [future.result() for future in hashes]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest_folder(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
