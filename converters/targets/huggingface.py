"""A Hugging Face folder: safetensors, and a config.json that every reader takes for one RoPE.

Tensors of a float source are copied byte for byte unless a type is asked for; quantized ones are
decoded, to float32 unless a type is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from converters.architectures.hparams import write_config_hparams
from converters.checkpoint import Checkpoint, ModelCard
from converters.containers.safetensors import DTYPE_OF_ENCODING, read_safetensors
from converters.containers.strict_json import parse_json_object, read_json_object
from converters.encodings import ENCODINGS, F32, Encoding
from converters.errors import OutputError
from converters.files import Output, sized_file, sync_and_hash
from converters.rope import RopeParameters
from converters.rope.config import RopeContext, read_config, write_config
from converters.targets.shards import (
    MAX_SHARD_BYTES,
    Shard,
    ShardSink,
    StoredTensor,
    plan_shards,
    shard_index,
)
from converters.targets.stream import StreamedTensor
from converters.targets.writing import RunSettings, write_targets
from converters.tokenizers import Vocabulary, build_tokenizer_files

DTYPES = ("f32", "f16", "bf16")
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_DTYPE_KEYS = ("torch_dtype", "dtype")  # transformers 4's and 5's
# Further spellings of L' that a config may carry; vLLM takes the smallest of all.
_CONTEXT_KEYS = ("max_sequence_length", "model_max_length", "max_seq_len", "seq_length")
SPECIAL_ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_README = "README.md"


@dataclass(frozen=True, slots=True)
class FolderArtifact:
    """A folder that was written: SHA-256 in hex by file name, and the size of all files."""

    path: Path
    files: Mapping[str, str]
    size_bytes: int


def require_replaceable(out: Path, checkpoint: Checkpoint) -> None:
    """Raises ``OutputError`` where replacing the folder ``out`` would lose more than an export."""
    if not out.is_dir():
        return
    if out.resolve() == checkpoint.origin.path.resolve():
        raise OutputError(f"{out} is the source itself", hint="Give another --out.")
    strange = sorted(p.name for p in out.iterdir() if not belongs_to_checkpoint(p))
    if strange:
        raise OutputError(
            f"{out} holds other things than a checkpoint: {', '.join(strange[:5])}",
            hint="Move them away, or give another --out: --force replaces the whole folder.",
        )


def belongs_to_checkpoint(path: Path) -> bool:
    """Whether a checkpoint's folder has a file of that name: what an export may replace."""
    suffixes = {".json", ".safetensors", ".jinja", ".model"}
    named = path.name in ("README.md", "merges.txt") or path.name.startswith("LICENSE")
    return path.is_file() and (named or path.suffix in suffixes)


@dataclass(frozen=True, slots=True)
class FolderTarget:
    """``checkpoint`` in the folder ``out``.

    ``dtype`` is f32, f16 or bf16; None copies float tensors byte for byte. Before the folder gets
    its name its RoPE and its list of tensors are read back.
    """

    checkpoint: Checkpoint
    out: Path
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    @property
    def outputs(self) -> list[Output]:
        """The folder."""
        return [Output(self.out, is_folder=True)]

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(item.size_bytes for item in self._stored())

    def require_writable(self) -> None:
        """Raises ``OutputError`` for an unknown ``dtype``.

        And where replacing the folder would lose more than an export.
        """
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OutputError(f"dtype {self.dtype!r}", hint=f"Expected one of {', '.join(DTYPES)}.")
        require_replaceable(self.out, self.checkpoint)

    @contextmanager
    def open(self, partials: Sequence[Path]) -> Iterator[_FolderWriting]:
        """The shards as holes of their final size, their headers written."""
        (folder,) = partials
        shards = plan_shards(self._stored(), max_bytes=self.max_shard_bytes)
        with ExitStack() as stack:
            sinks = []
            for shard in shards:
                file = sized_file(folder / shard.name, shard.size_bytes)
                sinks.append(ShardSink(stack.enter_context(file), shard))
            tensors = [StreamedTensor(tensor) for tensor in self.checkpoint.tensors.values()]
            yield _FolderWriting(self, folder, shards, sinks, tensors)

    @property
    def encoding(self) -> Encoding | None:
        """What every tensor is put into; None: what it has in the source."""
        return ENCODINGS[self.dtype] if self.dtype else None

    def _stored(self) -> list[StoredTensor]:
        return [
            StoredTensor(tensor, _encoding(tensor.encoding, self.encoding, self.checkpoint))
            for tensor in self.checkpoint.tensors.values()
        ]


@dataclass(frozen=True, slots=True)
class _FolderWriting:
    target: FolderTarget
    folder: Path
    shards: tuple[Shard, ...]
    sinks: Sequence[ShardSink]
    tensors: Sequence[StreamedTensor]

    def finish(self, source_hash: str) -> FolderArtifact:
        target = self.target
        small = files_beside_tensors(target.checkpoint, target.encoding)
        if len(self.shards) > 1:
            small[_INDEX] = shard_index(self.shards)
        for name, data in small.items():
            (self.folder / name).write_bytes(data)
        _read_back(self.folder, target.checkpoint, self.shards)
        files = sorted(self.folder.iterdir())
        hashes = dict(zip((f.name for f in files), sync_and_hash(files), strict=True))
        return FolderArtifact(target.out, hashes, sum(file.stat().st_size for file in files))


def write_folder(
    checkpoint: Checkpoint,
    out: Path,
    dtype: str | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **settings: Unpack[RunSettings],
) -> FolderArtifact:
    """Writes ``checkpoint`` to the folder ``out``; see ``FolderTarget`` and ``write_targets``."""
    target = FolderTarget(checkpoint, out, dtype, max_shard_bytes)
    (artifact,) = write_targets([target], **settings)
    return artifact


def folder_config(checkpoint: Checkpoint, encoding: Encoding | None = None) -> dict[str, object]:
    """The config.json: the source's own with its RoPE replaced, or one made from the sizes.

    ``encoding`` is what the tensors are written in; None leaves what the source says.
    """
    config = dict(checkpoint.config) or _new_config(checkpoint)
    for key, value in write_config(checkpoint.rope).items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    for key in _CONTEXT_KEYS:
        if config.get(key) is not None:
            config[key] = checkpoint.rope.context
    if encoding is not None:
        stated = [key for key in _DTYPE_KEYS if key in config] or list(_DTYPE_KEYS)
        config |= dict.fromkeys(stated, _TORCH_NAMES[encoding.name])
    return config


def _encoding(source: Encoding, chosen: Encoding | None, checkpoint: Checkpoint) -> Encoding:
    if chosen is not None:
        return chosen
    return F32 if checkpoint.origin.kind == "gguf" else source


def _new_config(checkpoint: Checkpoint) -> dict[str, object]:
    architecture = checkpoint.architecture
    spelling = architecture.huggingface[0]
    ids = checkpoint.vocabulary.special_ids
    flags = {flag: group in checkpoint.groups for flag, group in architecture.flags.items()}
    return {
        "architectures": [spelling.class_name],
        "model_type": spelling.model_type,
        **architecture.expects,
        **write_config_hparams(checkpoint.hparams),
        **flags,
        **{key: ids[name] for name, key in SPECIAL_ID_KEYS.items() if name in ids},
        **dict.fromkeys(_DTYPE_KEYS, _TORCH_NAMES[F32.name]),
    }


def files_beside_tensors(
    checkpoint: Checkpoint, encoding: Encoding | None = None
) -> dict[str, bytes]:
    """Config, tokenizer, README and what else the source has, by name.

    ``encoding`` is what the tensors are written in; None leaves what the source says.
    """
    files = dict(checkpoint.side_files)
    if _README not in files and (readme := _readme(checkpoint.card)):
        files[_README] = readme
    files |= tokenizer_files(checkpoint.vocabulary, checkpoint.rope.context)
    files[_CONFIG] = _json(folder_config(checkpoint, encoding))
    return files


def tokenizer_files(vocabulary: Vocabulary, context: int) -> dict[str, bytes]:
    """The source's own files where it has some, with the context they state brought up to date."""
    files = dict(vocabulary.files) or build_tokenizer_files(vocabulary)
    if _TOKENIZER_CONFIG in files:
        settings = parse_json_object(files[_TOKENIZER_CONFIG], _TOKENIZER_CONFIG)
        files[_TOKENIZER_CONFIG] = _json({**settings, "model_max_length": context})
    return files


def _readme(card: ModelCard) -> bytes:
    """A model card with what is known, so that licence and origin travel with the weights."""
    import yaml

    known = {
        "model_name": card.name,
        "license": card.license,
        "language": list(card.languages),
        "tags": list(card.tags),
        "base_model": list(card.base_models),
    }
    front = yaml.safe_dump({k: v for k, v in known.items() if v}, sort_keys=False)
    return f"---\n{front}---\n# {card.name}\n".encode()


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _read_back(folder: Path, checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> None:
    """Raises ``OutputError`` unless the folder's own bytes give the RoPE and tensors meant."""
    found = _read_rope(folder, checkpoint)
    if found != dataclasses.replace(checkpoint.rope, evidence=()):
        raise OutputError(
            f"{_CONFIG} reads back as {found}, expected {checkpoint.rope}",
            hint="Nothing was written. Please report this as a bug.",
        )
    for shard in shards:
        tensors = read_safetensors(folder / shard.name)
        for item in shard.tensors:
            tensor = tensors.get(item.tensor.name)
            if tensor is None or (tensor.shape, tensor.encoding) != (
                item.tensor.shape,
                item.encoding,
            ):
                raise OutputError(
                    f"{shard.name}: {item.tensor.name} does not read back as"
                    f" {DTYPE_OF_ENCODING[item.encoding.name]} {list(item.tensor.shape)}",
                    hint="Nothing was written. Please report this as a bug.",
                )


def _read_rope(folder: Path, checkpoint: Checkpoint) -> RopeParameters:
    about = RopeContext(
        where=_CONFIG,
        rotary_dim=checkpoint.hparams.head_dim,
        default_theta=checkpoint.architecture.default_theta,
    )
    return dataclasses.replace(read_config(read_json_object(folder / _CONFIG), about), evidence=())
