"""``inspect`` and ``export`` point to ``probe`` where a config looks stripped, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters.sources.huggingface import FINETUNE_RECORD
from pi_convert.commands.export import command as export
from pi_convert.commands.inspect import command as inspect
from tests.headers import write_header
from tests.tiny import write_tiny

SIGNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("Vicuna-v1.5-16k", {}, "it is called Vicuna-v1.5-16k and its context is 128"),
    "name of old": ("x", {"_name_or_path": "a/longchat-7b-32K"}, "called longchat-7b-32K"),
    "config's length": ("x", {"max_sequence_length": 1024}, "max_sequence_length is 1,024"),
    "tokenizer's length": ("x", {}, "the tokenizer's model_max_length is 512"),
    "original context": ("x", {"original_max_position_embeddings": 64}, "embeddings is 64"),
    "LongChat": ("x", {"rope_condense_ratio": 8}, "rope_condense_ratio is 8"),
    "theta": ("x", {"max_position_embeddings": 32768}, "context of 32,768 is more than"),
    "record": ("x", {}, f"{FINETUNE_RECORD} records 8"),
}
UNTUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("tiny", {}),
    "tokens and examples": ("tiny-135m-52k-1.16k-16kb", {}),
    "as long as its name": ("tiny-32k", {"max_position_embeddings": 32768, "rope_theta": 1e6}),
    "scaled": ("tiny-16k", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    "LLaMA 2": ("llama", {"max_position_embeddings": 4096}),
}


def notes(folder: Path, *more: str) -> list[str]:
    shown = CliRunner().invoke(inspect, [str(folder), "--json"])
    found: list[str] = json.loads(shown.stdout)["notes"]
    text = CliRunner().invoke(inspect, [str(folder)]).stdout
    assert all(f"note: {note}\n" in text for note in found)
    words = [str(folder), "--to", "gguf", "--scale", "2", "--quantize", "f16", "--dry-run", *more]
    exported = CliRunner().invoke(export, [*words, "--json"])
    assert json.loads(exported.stdout)["notices"] == found
    said = CliRunner().invoke(export, words).stdout
    assert all(note in said for note in found)
    return found


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_gives_one_line(sign: str, tmp_path: Path) -> None:
    name, config, said = SIGNS[sign]
    folder = write_tiny(tmp_path / name, config=config)
    if sign == "tokenizer's length":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 512}))
    if sign == "record":
        (folder / FINETUNE_RECORD).write_text('{"factor": 8.0}')
    (note,) = notes(folder)
    assert said in note
    assert "`pi-convert probe`" in note
    assert "\n" not in note
    missing = CliRunner().invoke(export, [str(folder), "--to", "gguf"])
    assert missing.exit_code == 2
    assert "`pi-convert probe`" in missing.output


@pytest.mark.parametrize("case", UNTUNED)
def test_no_sign_gives_none(case: str, tmp_path: Path) -> None:
    name, config = UNTUNED[case]
    assert notes(write_tiny(tmp_path / name, config=config)) == []


def test_the_default_model_gives_none(default_gguf: Path) -> None:
    assert notes(default_gguf, "--allow-requantize") == []


def test_a_gguf_is_judged_by_its_name_and_keys(tmp_path: Path) -> None:
    file = write_header(tmp_path / "x-16k.Q4_K_M.gguf")
    (note,) = json.loads(CliRunner().invoke(inspect, [str(file), "--json"]).stdout)["notes"]
    assert "it is called x-16k.Q4_K_M.gguf and its context is" in note
