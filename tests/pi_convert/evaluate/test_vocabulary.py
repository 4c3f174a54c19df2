"""A tokenizer with ids past the embedding, as when another model's lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.sources import open_checkpoint
from pi_convert import cli
from tests.tiny import VOCABULARY, write_tiny, write_tiny_onnx

ROWS = 100  # of 512; every text has bytes past it


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("source") / "Cut")
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(weights[name]) == VOCABULARY
        weights[name] = weights[name][:ROWS].clone()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS}))
    return folder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder whose tokenizer and config were given one token more than the graph has."""
    folder = tmp_path_factory.mktemp("onnx")
    source = open_checkpoint(str(write_tiny(folder / "Tiny")))
    write_tiny_onnx(source.interpolate(8), folder / "Graph")
    file = folder / "Graph" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    plain = {**tokenizer["added_tokens"][0], "special": False}
    tokenizer["added_tokens"].append({**plain, "id": VOCABULARY, "content": "grass is green"})
    file.write_text(json.dumps(tokenizer))
    config = folder / "Graph" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": VOCABULARY + 1}))
    return folder / "Graph"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["perplexity", "GRAPH", "--contexts", "32", "--text", "TEXT"], "another model's"),
        (["perplexity", "GRAPH", "--contexts", "32", "--protocol", "llama.cpp", "--text", "TEXT"],
         "another model's"),
        (["compare", "GRAPH", "GRAPH", "--context", "32", "--text", "TEXT"], "another model's"),
        (["passkey", "GRAPH", "--max-context", "400", "--trials", "1"], "another model's"),
        (["probe", "CUT", "--text", "TEXT"], "it was trained with"),
        (["finetune", "CUT", "--scale", "2", "--text", "TEXT", "--out", "OUT"],
         "it was trained with"),
    ],
    ids=["perplexity", "llama.cpp", "compare", "passkey", "probe", "finetune"],
)  # fmt: skip
def test_ids_past_the_embedding_are_one_error(
    words: list[str],
    hint: str,
    cut: Path,
    graph: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Where the grass is green zebras jump over foxes. " * 60)
    places = {"CUT": cut, "GRAPH": graph, "TEXT": text, "OUT": tmp_path / "out"}
    assert cli.run([str(places.get(word, word)) for word in words]) == 1
    said = capfd.readouterr().err
    assert f"{ROWS if 'CUT' in words else VOCABULARY} rows\nhint: " in said
    assert hint in said
    assert not (tmp_path / "out").exists()
