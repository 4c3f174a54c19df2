"""A zoo of bad inputs: how to build each, and what must be said about it.

``CASES`` is for everything that takes a MODEL: opening it, exporting it, the command line. Each
case is one fault in an otherwise right checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import ODD, write_tiny
from tests.tiny_gguf import write_tiny_gguf


@dataclass(frozen=True)
class Case:
    """``build`` makes the input in an empty folder and gives the MODEL to pass.

    Every text of ``says`` stands in the error's message. ``found_on`` is "open", or "write" where
    the values have to be read for it.
    """

    name: str
    build: Callable[[Path], str]
    says: tuple[str, ...]
    found_on: str = "open"


def _tiny(folder: Path, **options: Any) -> Path:
    return write_tiny(folder / "Tiny-Model", **options)


def _config(**keys: Any) -> Callable[[Path], str]:
    """A folder whose config.json has other keys; None removes one."""

    def build(folder: Path) -> str:
        return str(_tiny(folder, config=keys))

    return build


def _scaling(**block: Any) -> Callable[[Path], str]:
    return _config(rope_scaling=block)


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], str]:
    """A folder whose weights were changed."""

    def build(folder: Path) -> str:
        path = _tiny(folder)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return str(path)

    return build


def _bytes(change: Callable[[bytes], bytes], name: str) -> Callable[[Path], str]:
    """A folder of which one file's bytes were changed."""

    def build(folder: Path) -> str:
        path = _tiny(folder)
        (path / name).write_bytes(change((path / name).read_bytes()))
        return str(path)

    return build


def _index(file: str) -> Callable[[Path], str]:
    """Three shards, and an index that says a tensor is in ``file``."""

    def build(folder: Path) -> str:
        path = _tiny(folder, shards=3)
        (folder / "outside.safetensors").write_bytes(
            (path / "model-00001-of-00003.safetensors").read_bytes()
        )
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = file
        index.write_text(json.dumps(content))
        return str(path)

    return build


def _without(name: str) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        path = _tiny(folder)
        (path / name).unlink()
        return str(path)

    return build


def _without_tokenizer(folder: Path) -> str:
    path = _tiny(folder)
    for file in path.glob("tokenizer*"):
        file.unlink()
    return str(path)


def _tokenizer_past_the_embedding(folder: Path) -> str:
    path = _tiny(folder)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    added = dict(tokenizer["added_tokens"][0], id=512, content="<|one too many|>")
    tokenizer["added_tokens"].append(added)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(path)


def _json_file(name: str, **keys: Any) -> Callable[[Path], str]:
    """A folder in which one JSON file has other keys at the top; it is made where it is not."""

    def build(folder: Path) -> str:
        path = _tiny(folder) / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | keys))
        return str(path.parent)

    return build


def _vocab(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    """A folder whose tokenizer.json was changed; ``change`` gets all of it."""

    def build(folder: Path) -> str:
        path = _tiny(folder) / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return str(path.parent)

    return build


def _id(value: object) -> Callable[[Path], str]:
    """A folder whose tokenizer.json gives the token "a" another id."""
    return _vocab(lambda t: t["model"]["vocab"].update({"a": value}))


def _extra_file(name: str, data: bytes) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        path = _tiny(folder)
        (path / name).write_bytes(data)
        return str(path)

    return build


def _spoilt(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(ODD.head_dim)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _pi_in_buffers(tensors: dict[str, torch.Tensor]) -> None:
    exponents = torch.arange(0, ODD.head_dim, 2).float() / ODD.head_dim
    for layer in range(ODD.layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = 1.0 / 10000.0**exponents / 4.0


def _not_finite(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"][5, 7] = value

    return change


def _adapter(folder: Path) -> str:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    return str(folder / "adapter")


def _pickles(folder: Path) -> str:
    path = _tiny(folder)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    return str(path)


def _gguf(change: Callable[[bytes], bytes] | None = None, **keys: Any) -> Callable[[Path], str]:
    """A GGUF whose keys or bytes were changed."""

    def build(folder: Path) -> str:
        source = _tiny(folder)
        scoped = {name.replace("__", "."): value for name, value in keys.items()}
        path = write_tiny_gguf(folder / "tiny.gguf", source, keys=scoped)
        if change is not None:
            path.write_bytes(change(path.read_bytes()))
        return str(path)

    return build


def _in_info_of_the_final_norm(data: bytes, after: int, value: bytes) -> bytes:
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + after
    return data[:at] + value + data[at + len(value) :]


def _lying_offset(data: bytes) -> bytes:
    """The offset, which follows axes, one axis and the type, past the end of the file."""
    return _in_info_of_the_final_norm(data, 4 + 8 + 4, struct.pack("<Q", 1 << 40))


def _unknown_tensor_type(data: bytes) -> bytes:
    return _in_info_of_the_final_norm(data, 4 + 8, struct.pack("<I", 4096))


CASES = (
    # Files
    Case("truncated safetensors", _bytes(lambda b: b[:-1000], "model.safetensors"),
         ("model.safetensors", "the header announces", "the file has")),
    Case("safetensors cut in the header", _bytes(lambda b: b[:100], "model.safetensors"),
         ("model.safetensors", "a header of")),
    Case("corrupt safetensors header", _bytes(lambda b: b[:20] + b"\xff" + b[21:],
         "model.safetensors"), ("model.safetensors", "not valid JSON")),
    Case("empty safetensors", _bytes(lambda b: b"", "model.safetensors"),
         ("model.safetensors", "0 bytes")),
    Case("index naming a missing file", _index("model-00009-of-00003.safetensors"),
         ("index.json", "missing files: model-00009-of-00003.safetensors")),
    Case("index naming a file outside", _index("../outside.safetensors"),
         ("index.json", "'../outside.safetensors', outside the folder")),
    Case("index naming an absolute path", _index("/etc/passwd"),
         ("index.json", "'/etc/passwd', outside the folder")),
    Case("index naming another shard", _index("model-00001-of-00003.safetensors"),
         ("index.json", "model.norm.weight is not in model-00001", "is not listed")),
    Case("no weights", _without("model.safetensors"), ("neither model.safetensors nor",)),
    Case("no config", _without("config.json"), ("no config.json",)),
    Case("config is not JSON", _bytes(lambda b: b[:-5], "config.json"),
         ("config.json", "not valid JSON")),
    Case("config is a list", _bytes(lambda b: b"[" + b + b"]", "config.json"),
         ("config.json", "expected a JSON object")),
    Case("config has a key twice",
         _bytes(lambda b: b.replace(b"{", b'{"rope_theta": 1e6,', 1), "config.json"),
         ("config.json", "rope_theta stands twice")),
    Case("config has NaN", _config(rms_norm_eps=float("nan")), ("config.json", "NaN")),
    Case("adapter", _adapter, ("adapter_config.json", "peft_type is None")),
    Case("pickled weights", _pickles, ("pytorch_model.bin", "refused by torch")),
    # RoPE
    Case("factor is a string", _scaling(type="linear", factor="8"),
         ("rope_scaling.factor is '8'",)),
    Case("factor is missing", _scaling(type="linear"), ("rope_scaling.factor is missing",)),
    Case("factor is below one", _scaling(type="linear", factor=0.5),
         ("rope_scaling.factor is 0.5",)),
    Case("factor is zero", _scaling(type="linear", factor=0), ("rope_scaling.factor is 0",)),
    Case("factor is negative", _scaling(type="linear", factor=-8.0),
         ("rope_scaling.factor is -8.0",)),
    Case("factor is true", _scaling(type="linear", factor=True), ("rope_scaling.factor is True",)),
    Case("factor and no type", _scaling(factor=8.0), ("rope_scaling has factor and no rope_type",)),
    Case("unknown type", _scaling(type="ntk", factor=8.0), ("RoPE of type 'ntk'",)),
    Case("type is a number", _scaling(rope_type=3, factor=8.0), ("RoPE type 3",)),
    Case("type is a list", _scaling(type=["linear"], factor=8.0), ("RoPE type ['linear']",)),
    *(
        Case(f"type {kind}", _scaling(rope_type=kind, factor=8.0), (f"RoPE of type '{kind}'",))
        for kind in ("dynamic", "yarn", "longrope")
    ),
    Case("misspelt key", _scaling(type="linear", factor=8.0, orignal_max_position_embeddings=128),
         ("orignal_max_position_embeddings",)),
    Case("contradictory factors",
         _config(rope_scaling={"type": "linear", "factor": 8.0},
                 rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
         ("contradictory values", "rope_parameters.factor 4", "rope_scaling.factor 8")),
    Case("contradictory types",
         _config(rope_scaling={"type": "linear", "factor": 8.0},
                 rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
         ("contradictory RoPE types",)),
    Case("contradictory thetas",
         _config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
         ("contradictory values", "rope_parameters.rope_theta 500000", "rope_theta 10000")),
    Case("contradictory contexts",
         _config(rope_scaling={"type": "linear", "factor": 4.0},
                 original_max_position_embeddings=128, max_position_embeddings=4096),
         ("max_position_embeddings is 4096", "a context of 512")),
    Case("theta is a string", _config(rope_theta="1e4"), ("rope_theta is '1e4'",)),
    Case("theta is zero", _config(rope_theta=0), ("rope_theta is 0",)),
    Case("theta is huge", _config(rope_theta=10**400), ("rope_theta is too large",)),
    Case("factor is huge", _scaling(type="linear", factor=1e30), ("the factor is 1e+30",)),
    Case("factor of the default type", _scaling(rope_type="default", factor=8.0),
         ("type is default, but a factor of 8",)),
    Case("norm epsilon is huge", _config(rms_norm_eps=10**400), ("rms_norm_eps is",)),
    Case("context beyond 32 bits", _config(max_position_embeddings=2**31),
         ("max_position_embeddings is",)),
    Case("RoPE over half a head", _config(partial_rotary_factor=0.5),
         ("partial_rotary_factor is 0.5",)),
    Case("a value of a million characters", _config(rope_theta="1" * 10**6),
         ("rope_theta is '111", "…")),
    Case("no context", _config(max_position_embeddings=None),
         ("max_position_embeddings is missing",)),
    Case("context is a fraction", _config(max_position_embeddings=128.5),
         ("max_position_embeddings is 128.5",)),
    Case("llama3 lacks a key", _scaling(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                        original_max_position_embeddings=8192),
         ("rope_scaling.high_freq_factor is missing",)),
    Case("PI in the buffers only", _tensors(_pi_in_buffers),
         ("holds the frequencies of factor 4, the config says 1",)),
    # Sizes and tensors
    Case("unknown architecture", _config(architectures=["FalconForCausalLM"]),
         ("architecture FalconForCausalLM",)),
    Case("no architecture", _config(architectures=None, model_type=None), ("architecture None",)),
    Case("sizes are missing", _config(num_hidden_layers=None, hidden_size="96"),
         ("num_hidden_layers is missing", "hidden_size is '96'")),
    *(
        Case(f"{layers} layers", _config(num_hidden_layers=layers),
             (f"num_hidden_layers is {layers}",))
        for layers in (2_000_000, 2**31 - 1)
    ),
    Case("GGUF with more layers than there can be", _gguf(llama__block_count=50_000_000),
         ("block_count is 50000000",)),
    Case("heads do not divide", _config(num_key_value_heads=4), ("6 heads do not divide",)),
    Case("other activation", _config(hidden_act="gelu"), ("hidden_act is 'gelu'",)),
    Case("tensors missing, unexpected and misshaped", _tensors(_spoilt),
         ("1 missing: model.norm.weight", "1 unexpected: model.layers.0.self_attn.q_norm.weight",
          "1 wrongly shaped: model.layers.1.mlp.up_proj.weight [144, 160], expected [160, 144]")),
    Case("vocabulary of another size", _config(vocab_size=500),
         ("lm_head.weight [512, 144], expected [500, 144]",)),
    Case("tied to another head", _config(tie_word_embeddings=True),
         ("lm_head.weight is not model.embed_tokens.weight",)),
    Case("8-bit floats", _tensors(lambda t: t.update(
         {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)})),
         ("model.norm.weight F8_E4M3",)),
    Case("NaN weights", _tensors(_not_finite(float("nan"))),
         ("model.layers.0.self_attn.o_proj.weight",), found_on="write"),
    Case("infinite weights", _tensors(_not_finite(float("-inf"))),
         ("model.layers.0.self_attn.o_proj.weight",), found_on="write"),
    # Tokenizers
    Case("no tokenizer", _without_tokenizer, ("tokenizer",)),
    Case("tokenizer past the embedding", _tokenizer_past_the_embedding,
         ("ids up to 512", "512 rows")),
    *(
        Case(f"token id {value!r}", _id(value), ("tokenizer.json", f"'a' has id {value!r}"))
        for value in (-2, "5", 5.0, True, None)
    ),
    Case("two tokens with one id", _id(20), ("tokenizer.json", "id 20 is given to")),
    Case("added token with a negative id",
         _vocab(lambda t: t["added_tokens"][0].update(id=-1)), ("tokenizer.json", "has id -1")),
    Case("added token with the id of another",
         _vocab(lambda t: t["added_tokens"].append(dict(t["added_tokens"][0], id=20,
                                                        content="<|other|>"))),
         ("tokenizer.json", "'<|other|>' has id 20", "gives to")),
    Case("added token is a text", _vocab(lambda t: t["added_tokens"].append("<s>")),
         ("tokenizer.json", "added_tokens has '<s>'")),
    Case("added tokens are a number", _vocab(lambda t: t.update(added_tokens=5)),
         ("tokenizer.json", "added_tokens is 5")),
    Case("merges are numbers", _vocab(lambda t: t["model"].update(merges=[1])),
         ("tokenizer.json", "merge 1 does not have two parts")),
    Case("merges are pairs of numbers", _vocab(lambda t: t["model"].update(merges=[[1, 2]])),
         ("tokenizer.json", "merge [1, 2] does not have two parts")),
    Case("merge of what is no token",
         _vocab(lambda t: t["model"]["merges"].append(["a", "nonsense"])),
         ("tokenizer.json", "'nonsense' is no token")),
    Case("half of a surrogate pair",
         _json_file("tokenizer_config.json", chat_template="\ud83d alone"),
         ("tokenizer_config.json", "half of a surrogate pair")),
    *(
        Case(f"tokenizer.json {depth} deep", _extra_file("tokenizer.json",
             b'{"model":' + b"[" * depth + b"]" * depth + b"}"), ("tokenizer.json",))
        for depth in (100, 1_000, 200_000)
    ),
    Case("chat template is not UTF-8", _extra_file("chat_template.jinja", b"\xff"),
         ("chat_template.jinja: not UTF-8",)),
    Case("chat templates are texts", _json_file("tokenizer_config.json", chat_template=["x"]),
         ("tokenizer_config.json: chat_template has an entry",)),
    Case("chat template is a number", _json_file("tokenizer_config.json", chat_template=5),
         ("tokenizer_config.json: chat_template is int",)),
    Case("special tokens are true",
         _json_file("tokenizer_config.json", additional_special_tokens=True),
         ("tokenizer_config.json: additional_special_tokens is True",)),
    Case("added_tokens_decoder with a long id",
         _json_file("tokenizer_config.json", added_tokens_decoder={"1" * 5000: {"content": "x"}}),
         ("tokenizer_config.json: added_tokens_decoder has an entry",)),
    # GGUF
    Case("GGUF of another format", _gguf(lambda b: b"GGML" + b[4:]), ("GGML",)),
    Case("GGUF truncated", _gguf(lambda b: b[:-5000]), ("tiny.gguf",)),
    Case("GGUF cut in the header", _gguf(lambda b: b[:3000]), ("tiny.gguf",)),
    Case("GGUF lying about an offset", _gguf(_lying_offset), ("output_norm.weight",)),
    Case("GGUF lying about a count",
         _gguf(lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:]), ("tensors are announced",)),
    Case("GGUF factor switched off",
         _gguf(llama__rope__scaling__type="none", llama__rope__scaling__factor=8.0),
         ("rope.scaling.type is none, but a factor of 8",)),
    Case("GGUF with yarn", _gguf(llama__rope__scaling__type="yarn"), ("yarn",)),
    Case("GGUF with a theta of 0", _gguf(llama__rope__freq_base=0.0), ("rope.freq_base is 0",)),
    Case("GGUF with an attention factor of 0", _gguf(llama__rope__scaling__attn_factor=0.0),
         ("rope.scaling.attn_factor is 0",)),
    Case("GGUF with a string factor", _gguf(llama__rope__scaling__factor="8"),
         ("rope.scaling.factor is '8'",)),
    Case("GGUF with an array for a number", _gguf(llama__embedding_length=[7] * 5000),
         ("embedding_length is array([7, 7, 7",)),
    Case("GGUF with a tensor type that is none", _gguf(_unknown_tensor_type),
         ("tensor output_norm.weight: tensor type 4096",)),
    Case("GGUF with an unknown pre-tokenizer", _gguf(tokenizer__ggml__pre="nonsense"),
         ("tokenizer.ggml.pre is 'nonsense'",)),
    Case("GGUF part of several", _gguf(split__count=2), ("one of 2 parts",)),
    # References
    Case("nothing there", lambda folder: str(folder / "nowhere"), ("no such folder or file",)),
)  # fmt: skip
