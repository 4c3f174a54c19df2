"""``inspect``: what it says is what the files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from converters.errors import SourceError
from converters.rope import Llama3Scaling, RopeParameters
from pi_convert.commands.inspect import command
from tests.headers import LINEAR, PLAIN, SIZES, SPM, write_header
from tests.tiny import ODD, write_tiny


def inspected(path: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, [str(path), "--json", *options])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["schema_version"] == 1
    return document


def evidence(document: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    return {e["name"]: (e["told_by"], e["assumed"]) for e in document["rope"]["evidence"]}


def test_a_factor_near_a_whole_number_is_not_shown_as_one(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 1.0000001}}
    folder = write_tiny(tmp_path / "tiny", rope=rope)
    file = write_header(tmp_path / "x.gguf", keys={**LINEAR, "rope.scaling.factor": 7.9999995})
    for path, factor in ((folder, "1.0000001"), (file, "7.9999995")):
        text = CliRunner().invoke(command, [str(path)]).output
        assert f"effective factor  {factor}\n" in text


def test_a_folder(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 512}
    folder = write_tiny(tmp_path / "tiny", shape=ODD, rope=rope, dtype="bf16")
    found = inspected(folder)
    assert (found["container"], found["architecture"]) == ("folder", "llama")
    assert found["rope"]["kind"] == "linear"
    assert found["rope"]["factor"] == 4.0
    assert (found["rope"]["original_context"], found["rope"]["context"]) == (128, 512)
    assert evidence(found)["L"][1] is True  # max_position_embeddings alone does not tell
    assert [t["type"] for t in found["tensors"]] == ["bf16"]
    assert found["size_bytes"] == 2 * found["parameters"]
    cache = {item["context"]: item["size_bytes"] for item in found["kv_cache_bytes"]}
    assert cache[512] == 2 * ODD.layers * ODD.kv_heads * ODD.head_dim * 2 * 512
    assert found["tokenizer"]["size"] == 512
    assert found["tokenizer"]["pre"] == "smollm"
    assert found["tokenizer"]["has_chat_template"] is True


def test_the_option_replaces_the_assumption(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 128}
    folder = write_tiny(tmp_path / "tiny", shape=ODD, rope=rope)
    found = inspected(folder, "--original-context", "128")
    assert (found["rope"]["original_context"], found["rope"]["context"]) == (128, 512)
    assert evidence(found)["L"] == ("--original-context", False)


def test_the_default_model_against_gguf_py(default_gguf: Path) -> None:
    found = inspected(default_gguf)
    reader = gguf.GGUFReader(default_gguf)
    assert found["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    assert found["size_bytes"] == sum(int(t.n_bytes) for t in reader.tensors)
    assert found["file_bytes"] == default_gguf.stat().st_size
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        name = tensor.tensor_type.name.lower()
        counts[name] = counts.get(name, 0) + 1
    assert {t["type"]: t["count"] for t in found["tensors"]} == counts
    assert found["rope"]["theta"] == 100000.0
    assert found["rope"]["context"] == 8192
    assert found["tokenizer"]["special_ids"]["eos"] == 2
    assert found["notes"] == []


def test_text_says_the_effective_factor_and_assumptions(tmp_path: Path) -> None:
    keys = {**LINEAR, "rope.scaling.original_context_length": None}
    path = write_header(tmp_path / "a.gguf", "gemma", keys, tokenizer=SPM)
    result = CliRunner().invoke(command, [str(path)])
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[1]: line for line in result.output.splitlines() if "  " in line}
    assert lines["effective factor"].split()[-1] == "8"
    assert "(assumption)" in lines["L"]
    assert "from gemma.context_length" in lines["L'"]


@pytest.mark.parametrize(
    ("architecture", "keys", "kind", "factor", "contexts"),
    [
        ("gemma", PLAIN, "default", 1.0, (128, 128)),
        ("phi3", LINEAR, "linear", 8.0, (128, 1024)),
        ("llama", {**LINEAR, "rope.scaling.type": "none"}, "default", 1.0, (128, 1024)),
        ("llama", {**LINEAR, "rope.scaling.type": "yarn"}, "yarn", 8.0, (128, 1024)),
        ("nobody", {**LINEAR, "rope.scaling.factor": 2.2}, "linear", 2.2, (128, 1024)),
    ],
)
def test_a_gguf_that_cannot_be_exported_is_described_from_its_keys(
    tmp_path: Path,
    architecture: str,
    keys: dict[str, Any],
    kind: str,
    factor: float,
    contexts: tuple[int, int],
) -> None:
    found = inspected(write_header(tmp_path / "a.gguf", architecture, keys))
    assert found["architecture"] == architecture
    rope = found["rope"]
    assert (rope["kind"], rope["factor"]) == (kind, factor)
    assert (rope["original_context"], rope["context"]) == contexts
    assert "described from its keys only" in found["notes"][0]
    assert found["kv_cache_bytes"][-1] == {
        "context": contexts[1],
        "size_bytes": 2 * 2 * 2 * 16 * 2 * contexts[1],
    }


def test_a_described_gguf_says_the_same_either_way(tmp_path: Path) -> None:
    found = inspected(write_header(tmp_path / "a.gguf", keys=LINEAR))
    assert found["notes"] == []
    assert (found["rope"]["original_context"], found["rope"]["context"]) == (128, 1024)
    assert evidence(found)["L"][1] is False


def test_llama3_is_named(tmp_path: Path) -> None:
    llama3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    divisors = RopeParameters(10000.0, 16, 1, 1, llama3=llama3).frequency_divisors()
    keys = {**PLAIN, "context_length": 131072}
    path = write_header(tmp_path / "a.gguf", keys=keys, tensors={"rope_freqs.weight": divisors})
    assert inspected(path)["rope"]["kind"] == "llama3"


def test_no_rope_no_cache_no_tokenizer(tmp_path: Path) -> None:
    path = write_header(
        tmp_path / "a.gguf", "gpt2", {**SIZES, "attention.head_count": None}, tokenizer={}
    )
    found = inspected(path)
    assert found["rope"] is None
    assert found["tokenizer"] is None
    assert found["kv_cache_bytes"] == []
    text = CliRunner().invoke(command, [str(path)]).output
    assert "RoPE: none" in text
    assert "Tokenizer: none" in text


def test_heads_that_differ_by_layer(tmp_path: Path) -> None:
    keys = {**PLAIN, "attention.head_count_kv": [2, 4], "attention.key_length": 16}
    found = inspected(write_header(tmp_path / "a.gguf", "gemma", keys))
    assert found["kv_cache_bytes"][0]["size_bytes"] == (2 + 4) * 2 * 16 * 2 * 128


def test_our_record_and_the_window_are_shown(tmp_path: Path) -> None:
    path = write_header(
        tmp_path / "a.gguf",
        keys={**LINEAR, "attention.sliding_window": 64},
        general={"pi_convert.version": "0.1.0", "pi_convert.source.name": "org/name"},
    )
    found = inspected(path)
    assert found["record"]["pi_convert.source.name"] == "org/name"
    assert found["sliding_window"] == 64
    text = CliRunner().invoke(command, [str(path)]).output
    assert "pi_convert.source.name" in text
    assert "attention window" in text


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model at all, not at all"])
def test_what_cannot_be_read_is_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.gguf"):
        inspected(path)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A file whose data is a hole is described as fast as its header is read."""
    path = write_header(tmp_path / "a.gguf", "gemma", tensors={"w": np.zeros((2, 4), np.float32)})
    header = gguf.GGUFReader(path).data_offset
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:header])
    with path.open("r+b") as file:
        file.truncate(size)
    assert inspected(path)["file_bytes"] == size
