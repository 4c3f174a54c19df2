"""Rules about tensor infos and general metadata; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from converters.architectures import Architecture, HParams, architectures
from converters.architectures.hparams import read_gguf_hparams
from converters.architectures.spec import UNTIED, check_tensors
from converters.errors import SourceError
from converters.rope import gguf as spelling
from pi_convert.audit import llamacpp
from pi_convert.audit.findings import Finding, note, wrong
from pi_convert.audit.header import Header, plain
from pi_convert.audit.tokenizer_rules import EMBEDDING

FILE_TYPE = "general.file_type"
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_LOCAL_PATH = re.compile(r"^(?:/[^/\s]|~/|[A-Za-z]:[\\/]|file:)")
_MAX_PATH = 4096
_EXPORT = "Export again from the original checkpoint with pi-convert export."

# enum llama_ftype -> the types that most of a file's weights may have. Rows that do not divide
# into 256 fall back (llama-quant.cpp): Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0, others as listed.
FILE_TYPES: Mapping[int, tuple[str, frozenset[str]]] = {
    number: (name, frozenset(types.split()))
    for number, name, types in (
        (0, "F32", "f32"),
        (1, "F16", "f16"),
        (2, "Q4_0", "q4_0"),
        (3, "Q4_1", "q4_1"),
        (7, "Q8_0", "q8_0"),
        (8, "Q5_0", "q5_0"),
        (9, "Q5_1", "q5_1"),
        (10, "Q2_K", "q2_k q3_k q4_0"),
        (11, "Q3_K_S", "q3_k q4_0"),
        (12, "Q3_K_M", "q3_k q4_0"),
        (13, "Q3_K_L", "q3_k q4_0"),
        (14, "Q4_K_S", "q4_k q5_0"),
        (15, "Q4_K_M", "q4_k q5_0"),
        (16, "Q5_K_S", "q5_k q5_1"),
        (17, "Q5_K_M", "q5_k q5_1"),
        (18, "Q6_K", "q6_k q8_0"),
        (19, "IQ2_XXS", "iq2_xxs iq4_nl"),
        (20, "IQ2_XS", "iq2_xs iq4_nl"),
        (21, "Q2_K_S", "q2_k q4_0"),
        (22, "IQ3_XS", "iq3_s iq3_xxs iq4_nl"),
        (23, "IQ3_XXS", "iq3_xxs iq4_nl"),
        (24, "IQ1_S", "iq1_s iq4_nl"),
        (25, "IQ4_NL", "iq4_nl"),
        (26, "IQ3_S", "iq3_s iq4_nl"),
        (27, "IQ3_M", "iq3_s iq4_nl"),
        (28, "IQ2_S", "iq2_xs iq2_s iq4_nl"),
        (29, "IQ2_M", "iq2_s iq4_nl"),
        (30, "IQ4_XS", "iq4_xs iq4_nl"),
        (31, "IQ1_M", "iq1_m iq4_nl"),
        (32, "BF16", "bf16"),
        (36, "TQ1_0", "tq1_0 q4_0"),
        (37, "TQ2_0", "tq2_0 q4_0"),
        (38, "MXFP4_MOE", "mxfp4 q8_0"),
        (39, "NVFP4", "nvfp4"),
        (40, "Q1_0", "q1_0"),
        (41, "Q2_0", "q2_0"),
    )
}


def layout(header: Header) -> Iterator[Finding]:
    """Tensors lie one after another as ggml demands; names fit; nothing trails."""
    file = header.file
    expected = file.data_offset
    for tensor in file.tensors.values():
        if tensor.offset != expected:
            yield wrong(
                "tensors.offset",
                f"{tensor.name} starts at byte {tensor.offset}",
                f"byte {expected}: ggml refuses gaps and another order",
                _EXPORT,
            )
            break
        expected += -(-tensor.size_bytes // file.alignment) * file.alignment
    else:
        if file.size_bytes > expected:
            trailing = f"{file.size_bytes - expected} bytes after the last tensor"
            yield note("tensors.trailing-bytes", trailing, "nothing")
    long = [name for name in file.tensors if len(name.encode()) > llamacpp.MAX_TENSOR_NAME]
    if long:
        yield wrong(
            "tensors.name",
            f"{len(long)} names longer than {llamacpp.MAX_TENSOR_NAME} bytes, such as {long[0]}",
            "shorter names: ggml refuses the file",
            _EXPORT,
        )


def described_architecture(header: Header) -> Architecture | None:
    """The description of the file's architecture, None where there is none that fits."""
    if header.whole("expert_count"):
        return None  # Mixtral is of architecture llama too, with other tensors
    return next((a for a in architectures() if a.gguf_name == header.architecture), None)


def complete(header: Header) -> Iterator[Finding]:
    """Every tensor the architecture has is there, in shape, and none besides."""
    architecture = described_architecture(header)
    if not header.file.tensors:
        yield note("tensors.none", "no tensors", "a model's; this file holds a vocabulary at most")
    elif header.is_split:
        yield note("file.split", "one file of several", "audited alone: tensors are not counted")
    elif architecture is None:
        yield from _blocks(header)
    else:
        yield from _fit(header, architecture)


def _fit(header: Header, architecture: Architecture) -> Iterator[Finding]:
    file = header.file
    where = header.architecture
    names = file.tensors.keys()
    try:
        hparams = hparams_of(header, architecture)
        if hparams is None:
            yield wrong("tensors.fit", f"{EMBEDDING} is missing", "the embedding", _EXPORT)
            return
        groups = architecture.groups_present(names, gguf=True)
        expected = {gguf: s for _, gguf, s, _ in architecture.expected_tensors(hparams, groups)}
        found = {
            name: tensor.shape
            for name, tensor in file.tensors.items()
            if name != spelling.DIVISORS_TENSOR
        }
        check_tensors(expected, found, where)
    except SourceError as error:
        yield wrong("tensors.fit", error.message, "the architecture's own tensors", error.hint)


def hparams_of(header: Header, architecture: Architecture) -> HParams | None:
    """The sizes; None without an embedding. Raises ``SourceError`` for bad keys."""
    embedding = header.file.tensors.get(EMBEDDING)
    if embedding is None:
        return None
    untied = UNTIED in architecture.groups_present(header.file.tensors, gguf=True)
    return read_gguf_hparams(
        header.keys,
        vocab_size=embedding.shape[0],
        tied_embeddings=not untied,
        where=header.architecture,
    )


def _blocks(header: Header) -> Iterator[Finding]:
    stated = header.whole("block_count")
    indices = {int(m[1]) for name in header.file.tensors if (m := _BLOCK.match(name))}
    if stated is None or not indices:
        return
    if max(indices) >= stated:
        yield wrong(
            "tensors.blocks",
            f"{header.shown('block_count')}, and tensors of block {max(indices)}",
            f"blocks 0 to {stated - 1}",
            _EXPORT,
        )
    elif len(indices) < stated - _predicting_layers(header):
        yield wrong(
            "tensors.blocks",
            f"{header.shown('block_count')}, and tensors of {len(indices)} blocks",
            "tensors for every block",
            _EXPORT,
        )


def _predicting_layers(header: Header) -> int:
    """Layers that predict further tokens: counted in block_count, left out of some files."""
    return header.whole("nextn_predict_layers") or 0


def file_type(header: Header) -> Iterator[Finding]:
    """general.file_type names the type that most weights have."""
    stated = header.file.keys.get(FILE_TYPE)
    common = dominating_type(header)
    if common is None:
        return
    if not isinstance(stated, int):
        yield note("file-type.missing", f"{FILE_TYPE} is missing", f"the type's number ({common})")
    elif stated in FILE_TYPES and common not in FILE_TYPES[stated][1]:
        yield note(
            "file-type.mismatch",
            f"{FILE_TYPE} = {stated} ({FILE_TYPES[stated][0]}), most weights are {common}",
            "the type that most weights have; programs show it, none loads by it",
        )


def dominating_type(header: Header) -> str | None:
    """The encoding of most weights in the blocks; None where there is no matrix."""
    elements: Counter[str] = Counter()
    for tensor in header.file.tensors.values():
        if len(tensor.shape) > 1 and _BLOCK.match(tensor.name):
            size = 1
            for axis in tensor.shape:
                size *= axis
            elements[tensor.encoding.name] += size
    return elements.most_common(1)[0][0] if elements else None


def local_paths(header: Header) -> Iterator[Finding]:
    """No metadata value is a path of the machine that made the file."""
    for key, value in header.file.keys.items():
        if not isinstance(value, str) or len(value) >= _MAX_PATH or "\n" in value:
            continue
        if _LOCAL_PATH.match(value):
            yield note(
                "metadata.local-path",
                f"{key} = {plain(value)}",
                "no path of the maker's machine: it tells about it, and bytes differ by it",
            )
