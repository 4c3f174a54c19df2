"""GGUF files for tests, written by gguf-py and llama.cpp: none of our writing code takes part."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

# (value, gguf-py's value type); the array's element type follows in arrays
Value = tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes as the file has them."""

    shape: tuple[int, ...]  # outermost first, elements
    type: gguf.GGMLQuantizationType
    raw: np.ndarray  # uint8, (rows, row bytes)

    def values(self) -> np.ndarray:
        """float32, in shape."""
        if self.type == gguf.GGMLQuantizationType.F32:
            return self.raw.view(np.float32).reshape(self.shape).copy()
        return gguf.dequantize(self.raw, self.type).reshape(self.shape)

    def with_values(self, values: np.ndarray) -> StoredTensor:
        """The same tensor with other float values."""
        data = gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), self.type)
        raw = data.view(np.uint8).reshape(self.raw.shape)
        return dataclasses.replace(self, raw=raw)


@dataclass
class EditableGguf:
    """All of a GGUF file, to be edited and written again."""

    keys: dict[str, Value]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"][0])

    def key(self, name: str) -> Any:
        return self.keys[f"{self.architecture}.{name}"][0]

    def set(self, name: str, value: Any) -> None:
        """Sets a key of the architecture; type by the Python value."""
        self.set_key(f"{self.architecture}.{name}", value)

    def set_key(self, name: str, value: Any) -> None:
        if name in self.keys:
            _, kind, sub = self.keys[name]
        else:
            kind, sub = _kind_of(value), None
        self.keys[name] = (value, kind, sub)

    def remove(self, name: str) -> None:
        self.keys.pop(f"{self.architecture}.{name}", None)


def read_editable(path: Path) -> EditableGguf:
    reader = gguf.GGUFReader(path)
    keys: dict[str, Value] = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        keys[name] = (field.contents(), field.types[0], sub)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(rows, -1).copy()
        tensors[tensor.name] = StoredTensor(shape, tensor.tensor_type, raw)
    return EditableGguf(keys, tensors)


def write_editable(file: EditableGguf, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, file.architecture)
    for name, (value, kind, sub) in file.keys.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, sub)
    for name, tensor in file.tensors.items():
        if tensor.type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor.raw.view(np.float32).reshape(tensor.shape))
        elif tensor.type == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, tensor.raw.view(np.float16).reshape(tensor.shape))
        else:
            byte_shape = (*tensor.shape[:-1], tensor.raw.shape[-1])
            writer.add_tensor(name, tensor.raw.reshape(byte_shape), raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit(source: Path, target: Path, change: Callable[[EditableGguf], None]) -> Path:
    """``source`` with one change, written to ``target``."""
    file = read_editable(source)
    change(file)
    return write_editable(file, target)


def edit_rope(source: Path, target: Path, keys: Mapping[str, Any]) -> Path:
    """Other RoPE keys (without prefix; None removes) on the same bytes."""
    shutil.copy(source, target)

    def change(file: EditableGguf) -> None:
        for name, value in keys.items():
            if value is None:
                file.remove(name)
            else:
                file.set(name, value)

    return edit(source, target, change)


def llama_cpp_quantize(source: Path, target: Path, ftype: str) -> Path:
    """llama.cpp's own quantization of an f32 or f16 file; ``ftype`` such as q4_k_m."""
    import ctypes
    import os

    from llama_cpp import llama_cpp

    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype.upper()}")
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    assert code == 0, (source, ftype, code)
    _KEPT.append(log)
    return target


_KEPT: list[Any] = []  # log callbacks that llama.cpp may still call


def _kind_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    return gguf.GGUFValueType.STRING


def write_plain_gguf(folder: Path, path: Path, rope_keys: Mapping[str, Any]) -> Path:
    """A tests.tiny folder as a GGUF in f16, its RoPE as ``rope_keys`` say."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in rope_keys.items():
        writer.add_key_value(f"{architecture}.{key}", value, _kind_of(value))
    _write_tokenizer(writer, folder)
    for name, values in sorted(load_file(folder / "model.safetensors").items()):
        heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config["num_key_value_heads"],
        }.get(name.split(".")[-2], 0)
        if heads and architecture == "llama":
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        writer.add_tensor(
            _gguf_name(name, config["num_hidden_layers"]),
            values.astype(np.float16 if values.ndim > 1 else np.float32),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str, layers: int) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(ids[config["bos_token"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_unk_token_id(ids[config["unk_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])
