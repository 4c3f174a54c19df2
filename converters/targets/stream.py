"""Source rows to quantized rows on a pool of threads: every tensor is read once, in chunks.

Any number of files take what is made of a chunk, each in its own encoding and its own order. A
chunk is a few hundred thousand elements, so memory is threads x chunk whatever the model's size.
Rows are quantized independently of each other: the bytes do not depend on threads or chunks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np

from converters.content_hash import content_hash
from converters.encodings import BF16, F16, F32, Encoding, decode_f32
from converters.errors import TensorError
from converters.ggml import Floats, Ggml, Quantizer, Raw
from converters.progress import Progress, silent
from converters.tensor import Tensor

# 2 MiB as float32: a chunk, its source and its results stay in a core's cache.
CHUNK_ELEMENTS = 512 * 1024
_EXPONENT_BITS = {F16.ggml_type: 0x7C00, BF16.ggml_type: 0x7F80}
_WAKE_SECONDS = 0.2
STAGE = "writing"


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor to read: in chunks of ``unit_rows`` rows or a multiple of them."""

    source: Tensor
    unit_rows: int = 1
    is_weight: bool = True  # False: made by us, no part of the source's hash


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a tensor."""

    tensor: StreamedTensor
    start: int
    stop: int


class Sink(Protocol):
    """A file that takes the rows of some tensors; called from several threads at once."""

    def encoding_of(self, name: str) -> Encoding | None:
        """What the tensor ``name`` is written in; None where the file has no such tensor."""

    def put(self, chunk: Chunk, rows: Raw) -> None:
        """Takes the chunk's rows in that encoding, in the source's order."""


class _Turns:
    """One tensor's hash: chunks come from any thread and are hashed in the order of their rows."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._next_row = 0
        self._turn = threading.Condition()

    def update(self, chunk: Chunk, raw: Raw, cancelled: threading.Event) -> None:
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
        tensors: Sequence[StreamedTensor],
        sinks: Sequence[Sink],
        quantizer: Quantizer,
        *,
        progress: Progress = silent,
    ) -> None:
        self._tensors = tensors
        self._sinks = sinks
        self._quantizer, self._ggml = quantizer, quantizer.ggml
        self._progress = progress
        self._chunks = _split(tensors, CHUNK_ELEMENTS)
        self._hashes = {tensor.source.name: _Turns() for tensor in tensors}
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # of the iterator of chunks and the count of bytes
        self._done_bytes = 0
        self._total_bytes = sum(tensor.source.size_bytes for tensor in tensors)

    def run(self, threads: int) -> str:
        """The content hash of the source, once every tensor is written.

        Raises what the first failing thread raised, such as ``TensorError`` for a weight that is
        not finite; Ctrl-C ends the other threads after their current chunk.
        """
        with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
            try:
                running = {pool.submit(self._work) for _ in range(threads)}
                while running:
                    # Python runs the handler of a signal in the main thread only; it must wake up.
                    done, running = wait(running, _WAKE_SECONDS, return_when=FIRST_EXCEPTION)
                    for worker in done:
                        worker.result()
            finally:
                self._cancelled.set()
        weights = {t.source.name: t.source for t in self._tensors if t.is_weight}
        return content_hash(weights, {n: self._hashes[n].hexdigest() for n in weights})

    def _work(self) -> None:
        while not self._cancelled.is_set():
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._convert(chunk)

    def _convert(self, chunk: Chunk) -> None:
        source = chunk.tensor.source
        raw = source.read_rows(chunk.start, chunk.stop)
        self._hashes[source.name].update(chunk, raw, self._cancelled)
        if not self._is_finite(raw, source.encoding):
            bad = (
                n for n in range(len(raw)) if not self._is_finite(raw[n : n + 1], source.encoding)
            )
            raise TensorError(
                f"{source.name} holds NaN or Inf in row {chunk.start + next(bad)}",
                hint="The weights are damaged; fetch or train them again.",
            )
        made = {source.encoding: raw}
        for sink in self._sinks:
            wanted = sink.encoding_of(source.name)
            if wanted is None:
                continue
            if wanted not in made:
                made[wanted] = self._quantized(made, source, wanted)
            sink.put(chunk, made[wanted])
        with self._lock:
            self._done_bytes += raw.nbytes
            done = self._done_bytes
        self._progress(STAGE, done, self._total_bytes)

    def _quantized(self, made: dict[Encoding, Raw], source: Tensor, wanted: Encoding) -> Raw:
        """The source's rows in ``made`` as ``wanted``; their float32 values are added to it."""
        if F32 not in made:
            made[F32] = _decode(self._ggml, made[source.encoding], source.encoding).view(np.uint8)
        raw = self._quantizer.quantize(wanted, made[F32].view(np.float32))
        if not self._is_finite(raw, wanted):
            largest = float(np.abs(made[F32].view(np.float32)).max())
            raise TensorError(
                f"{source.name} holds {largest:g}, which {wanted.name} cannot hold",
                hint="bf16 and f32 hold the largest values.",
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


def _split(tensors: Iterable[StreamedTensor], chunk_elements: int) -> Iterator[Chunk]:
    """Chunks in the order of rows."""
    for tensor in tensors:
        source, unit = tensor.source, tensor.unit_rows
        rows = unit * max(1, ceil(chunk_elements / (source.row_elements * unit)))
        for start in range(0, source.rows, rows):
            yield Chunk(tensor, start, min(start + rows, source.rows))


def _decode(ggml: Ggml, raw: Raw, encoding: Encoding) -> Floats:
    return decode_f32(raw, encoding) if encoding.name == "f64" else ggml.dequantize(encoding, raw)


def write_all(descriptor: int, raw: Raw, offset: int) -> None:
    """Writes all of ``raw`` at ``offset``; one ``pwrite`` may take only a part."""
    view = np.ascontiguousarray(raw).data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
