"""Source rows to quantized rows on a pool of threads: every tensor is read once, in chunks.

A chunk is a few hundred thousand elements, so memory is threads x chunk whatever the model's size.
Rows are quantized independently of each other: the bytes do not depend on threads or chunks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import ceil

import numpy as np

from converters.content_hash import content_hash
from converters.encodings import BF16, F16, F32, Encoding, decode_f32
from converters.errors import TensorError
from converters.progress import Progress, silent
from converters.targets.gguf.ggml import Floats, Ggml, Raw
from converters.targets.gguf.plan import OutputTensor
from converters.tensor import Tensor
from converters.transforms import interleave_rope

# 2 MiB as float32: a chunk, its source and its results stay in a core's cache.
CHUNK_ELEMENTS = 512 * 1024
_EXPONENT_BITS = {F16.ggml_type: 0x7C00, BF16.ggml_type: 0x7F80}
_WAKE_SECONDS = 0.2
STAGE = "writing"


@dataclass(frozen=True, slots=True)
class Target:
    """An open file: where each tensor goes, in bytes from its start, and in which type."""

    descriptor: int
    offsets: Mapping[str, int]
    types: Mapping[str, Encoding]


@dataclass(frozen=True, slots=True)
class _Chunk:
    output: OutputTensor
    start: int  # rows
    stop: int


class _Turns:
    """One tensor's hash: chunks come from any thread and are hashed in the order of their rows."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._next_row = 0
        self._turn = threading.Condition()

    def update(self, chunk: _Chunk, raw: Raw, cancelled: threading.Event) -> None:
        with self._turn:
            while self._next_row != chunk.start:
                # The chunk before is in the hands of another thread, unless that one has failed.
                if cancelled.is_set():
                    return
                self._turn.wait(_WAKE_SECONDS)
            self._digest.update(raw.data)
            self._next_row = chunk.stop
            self._turn.notify_all()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Stream:
    """Writes the data of one or more files; ``run`` once."""

    def __init__(
        self,
        outputs: Sequence[OutputTensor],
        targets: Sequence[Target],
        ggml: Ggml,
        *,
        progress: Progress = silent,
    ) -> None:
        self._outputs = outputs
        self._targets = targets
        self._ggml = ggml
        self._progress = progress
        self._chunks = _split(outputs, CHUNK_ELEMENTS)
        self._hashes = {output.name: _Turns() for output in outputs}
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # of the iterator of chunks and the count of bytes
        self._done_bytes = 0
        self._total_bytes = sum(output.source.size_bytes for output in outputs)

    def run(self, threads: int) -> str:
        """The content hash of the source, once every tensor is written.

        Raises what the first failing thread raised, such as ``TensorError`` for a weight that is
        not finite; Ctrl-C ends the other threads after their current chunk.
        """
        with ThreadPoolExecutor(threads, thread_name_prefix="gguf") as pool:
            try:
                running = {pool.submit(self._work) for _ in range(threads)}
                while running:
                    # Python runs the handler of a signal in the main thread only; it must wake up.
                    done, running = wait(running, _WAKE_SECONDS, return_when=FIRST_EXCEPTION)
                    for worker in done:
                        worker.result()
            finally:
                self._cancelled.set()
        weights = {o.source.name: o for o in self._outputs if o.is_weight}
        return content_hash(
            {name: o.source for name, o in weights.items()},
            {name: self._hashes[o.name].hexdigest() for name, o in weights.items()},
        )

    def _work(self) -> None:
        while not self._cancelled.is_set():
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._convert(chunk)

    def _convert(self, chunk: _Chunk) -> None:
        output = chunk.output
        encoding = output.source.encoding
        raw = output.source.read_rows(chunk.start, chunk.stop)
        self._hashes[output.name].update(chunk, raw, self._cancelled)
        if not self._is_finite(raw, encoding):
            raise TensorError(
                f"{output.source.name} holds values that are not finite (NaN or infinity)",
                hint="The weights are damaged; fetch or train them again.",
            )
        made = {encoding: _laid_out(raw, chunk)}
        for target in self._targets:
            wanted = target.types[output.name]
            if wanted not in made:
                made[wanted] = self._quantized(made, output.source, wanted)
            rows = made[wanted]
            write_all(
                target.descriptor, rows, target.offsets[output.name] + chunk.start * rows.shape[1]
            )
        with self._lock:
            self._done_bytes += raw.nbytes
            done = self._done_bytes
        self._progress(STAGE, done, self._total_bytes)

    def _quantized(self, made: dict[Encoding, Raw], source: Tensor, wanted: Encoding) -> Raw:
        """The source's rows in ``made`` as ``wanted``; their float32 values are added to it."""
        if F32 not in made:
            made[F32] = _decode(self._ggml, made[source.encoding], source.encoding).view(np.uint8)
        raw = self._ggml.quantize(wanted, made[F32].view(np.float32))
        if not self._is_finite(raw, wanted):
            raise TensorError(
                f"{source.name}: a value does not fit into {wanted.name}",
                hint="It is too large; bf16 and f32 hold the largest.",
            )
        return raw

    def _is_finite(self, raw: Raw, encoding: Encoding) -> bool:
        """Whether every number, or every block's scale, is finite."""
        if encoding in (F16, BF16):  # told by their exponents
            bits = _EXPONENT_BITS[encoding.ggml_type]
            return bool(np.bitwise_and(raw.view(np.uint16), bits).max(initial=0) != bits)
        if encoding.is_float:
            return bool(np.isfinite(decode_f32(raw, encoding)).all())
        return self._ggml.is_valid(encoding, raw)


def default_threads() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _split(outputs: Iterable[OutputTensor], chunk_elements: int) -> Iterator[_Chunk]:
    """Chunks in the order of rows; where rows move within a head, of whole heads."""
    for output in outputs:
        source = output.source
        unit = source.shape[0] // output.rope_heads if output.rope_heads else 1
        if len(source.shape) == 1:
            unit = 1  # one row, the whole vector
        rows = unit * max(1, ceil(chunk_elements / (source.row_elements * unit)))
        for start in range(0, source.rows, rows):
            yield _Chunk(output, start, min(start + rows, source.rows))


def _laid_out(raw: Raw, chunk: _Chunk) -> Raw:
    """The chunk's rows in the order that the file has them."""
    output = chunk.output
    if not output.rope_heads:
        return raw
    source = output.source
    rows = chunk.stop - chunk.start
    vector = len(source.shape) == 1
    shape = source.shape if vector else (rows, *source.shape[1:])
    heads = output.rope_heads if vector else rows * output.rope_heads // source.shape[0]
    part = Tensor(source.name, shape, source.encoding, lambda start, stop: raw[start:stop])
    return interleave_rope(part, heads).read_rows(0, rows)


def _decode(ggml: Ggml, raw: Raw, encoding: Encoding) -> Floats:
    return decode_f32(raw, encoding) if encoding.name == "f64" else ggml.dequantize(encoding, raw)


def write_all(descriptor: int, raw: Raw, offset: int) -> None:
    """Writes all of ``raw`` at ``offset``; one ``pwrite`` may take only a part."""
    view = np.ascontiguousarray(raw).data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
