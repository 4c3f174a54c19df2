"""Any number of targets written in one reading of the source: all of them, or none.

A target says where it goes and how large it is, opens its partial files as sinks of the stream, and
finishes them once the last row is written. What it finishes with is its artifact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from math import lcm
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar, Unpack

from converters.files import Output, atomic_outputs, require_free_space, require_replaceable
from converters.ggml import Choice, load_quantizer
from converters.progress import Progress, silent
from converters.targets.stream import Sink, Stream, StreamedTensor, default_threads

A_co = TypeVar("A_co", covariant=True)
A = TypeVar("A")


class Writing(Protocol[A_co]):
    """A target whose partial files are open."""

    @property
    def tensors(self) -> Sequence[StreamedTensor]:
        """The tensors that its sinks take rows of."""

    @property
    def sinks(self) -> Sequence[Sink]:
        """One for each file."""

    def finish(self, source_hash: str) -> A_co:
        """Completes the files and reads them back, after the last row.

        Raises ``OutputError`` where they are not what was meant.
        """


class Target(Protocol[A_co]):
    """What one target will write."""

    @property
    def outputs(self) -> Sequence[Output]:
        """The files or folders that appear together."""

    @property
    def size_bytes(self) -> int:
        """Of all its files, to within what headers and small files take."""

    def require_writable(self) -> None:
        """Raises ``ConvertError`` where writing would lose something, or cannot be done."""

    def open(self, partials: Sequence[Path]) -> AbstractContextManager[Writing[A_co]]:
        """The files, ready for rows, at ``partials`` in place of ``outputs``."""


class RunSettings(TypedDict, total=False):
    """How a run writes; what is left out has the default."""

    threads: int | None  # None: every core
    force: bool  # replace what exists; False
    progress: Progress  # silent
    quantizer: Choice | None  # see ``load_quantizer``


def write_targets(targets: Sequence[Target[A]], **settings: Unpack[RunSettings]) -> tuple[A, ...]:
    """The artifacts of ``targets``; each source tensor is read once.

    The bytes depend on the source and on the build of ggml alone, not on ``threads``. Raises
    ``OutputError`` where an output exists without ``force``, is being written by another run, does
    not fit or was written wrong, and ``TensorError`` for weights that are not finite or that a type
    cannot hold; then no file of the run is left behind.
    """
    force = settings.get("force", False)
    for target in targets:
        require_target(target, force=force)
    if not targets:
        return ()
    require_space(targets)
    outputs = [output for target in targets for output in target.outputs]
    with atomic_outputs(outputs, force=force) as partials, ExitStack() as stack:
        left = iter(partials)
        writing = [
            stack.enter_context(target.open([next(left) for _ in target.outputs]))
            for target in targets
        ]
        tensors = _merged(tensor for one in writing for tensor in one.tensors)
        sinks = [sink for one in writing for sink in one.sinks]
        quantizer = load_quantizer(settings.get("quantizer"))
        stream = Stream(tensors, sinks, quantizer, progress=settings.get("progress", silent))
        source_hash = stream.run(settings.get("threads") or default_threads())
        return tuple(one.finish(source_hash) for one in writing)


def require_target(target: Target[A], *, force: bool) -> None:
    """Raises ``ConvertError`` where ``target`` cannot be written or must not be replaced."""
    for output in target.outputs:
        require_replaceable(output, force=force)
    target.require_writable()


def require_space(targets: Iterable[Target[A]]) -> None:
    """Raises ``OutputError`` unless every folder has room for all that goes there."""
    needed: dict[Path, int] = defaultdict(int)
    for target in targets:
        needed[target.outputs[0].path.parent] += target.size_bytes
    for folder, size_bytes in needed.items():
        require_free_space(folder, size_bytes)


def _merged(tensors: Iterable[StreamedTensor]) -> list[StreamedTensor]:
    """Each tensor once, in chunks that suit every target."""
    by_name: dict[str, StreamedTensor] = {}
    for tensor in tensors:
        found = by_name.setdefault(tensor.source.name, tensor)
        unit = lcm(found.unit_rows, tensor.unit_rows)
        by_name[tensor.source.name] = StreamedTensor(found.source, unit, found.is_weight)
    return list(by_name.values())
