"""A GGUF file that takes rows from a stream: each in the order and at the place it has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.encodings import Encoding
from converters.ggml import Raw
from converters.targets.gguf.plan import OutputTensor
from converters.targets.stream import Chunk, StreamedTensor, write_all
from converters.tensor import Tensor
from converters.transforms import interleave_rope


class GgufSink:
    """An open file: where each tensor goes, in bytes from its start, and in which type."""

    def __init__(
        self,
        descriptor: int,
        outputs: Sequence[OutputTensor],
        offsets: Mapping[str, int],
        types: Mapping[str, Encoding],
    ) -> None:
        self.descriptor = descriptor
        self._outputs = {output.source.name: output for output in outputs}
        self._offsets = offsets
        self._types = types

    def encoding_of(self, name: str) -> Encoding | None:
        """The type of the source tensor ``name`` in this file."""
        output = self._outputs.get(name)
        return None if output is None else self._types[output.name]

    def put(self, chunk: Chunk, rows: Raw) -> None:
        """Writes the rows, interleaved where llama.cpp rotates neighbours."""
        output = self._outputs[chunk.tensor.source.name]
        laid_out = _laid_out(output, chunk, rows, self._types[output.name])
        at = self._offsets[output.name] + chunk.start * rows.shape[1]
        write_all(self.descriptor, laid_out, at)


def streamed(outputs: Sequence[OutputTensor]) -> list[StreamedTensor]:
    """The tensors to read, in chunks of whole heads where rows move within a head."""
    return [
        StreamedTensor(output.source, _unit_rows(output), output.is_weight) for output in outputs
    ]


def _unit_rows(output: OutputTensor) -> int:
    shape = output.source.shape
    return shape[0] // output.rope_heads if output.rope_heads and len(shape) > 1 else 1


def _laid_out(output: OutputTensor, chunk: Chunk, rows: Raw, encoding: Encoding) -> Raw:
    if not output.rope_heads:
        return rows
    source, count = output.source, chunk.stop - chunk.start
    vector = len(source.shape) == 1  # one row, the whole vector
    shape = source.shape if vector else (count, *source.shape[1:])
    heads = output.rope_heads if vector else count * output.rope_heads // source.shape[0]
    part = Tensor(source.name, shape, encoding, lambda start, stop: rows[start:stop])
    return interleave_rope(part, heads).read_rows(0, count)
