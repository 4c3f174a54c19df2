"""Sources with values changed at random: one clear error or a checkpoint, nothing else.

Whatever is raised besides ``ConvertError`` fails these tests, and so does one that names no way on.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.containers.gguf import read_gguf_file
from converters.errors import ConvertError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf
from converters.targets.huggingface import folder_config, tokenizer_files
from pi_convert.audit.description import describe
from pi_convert.audit.repair import plan_repair
from pi_convert.audit.rules import audit_path
from pi_convert.report.audit import audit_json, audit_text
from pi_convert.report.description import description_json, description_text
from tests.tiny import write_tiny
from tests.tiny_gguf import write_tiny_gguf

EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.5, 1e30, "", "x", "\ud800", "\0",
    "linear", "<|im_end|>", [], [1], ["x"], [[1]], [None], {}, {"content": 5}, {"type": "BPE"},
)  # fmt: skip
FILES = {
    "config.json": {"rope_scaling": {"type": "linear", "factor": 2.0}, "model_max_length": 256},
    "tokenizer.json": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}],
        }
    },
    "tokenizer_config.json": {
        "add_bos_token": None,
        "added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": True}},
    },
    "generation_config.json": {"temperature": 0.7, "top_k": 20, "eos_token_id": [1, 2]},
    "special_tokens_map.json": {"bos_token": {"content": "<|im_start|>", "lstrip": False}},
    "added_tokens.json": {"<|im_end|>": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that is read."""
    path = write_tiny(tmp_path_factory.mktemp("mutated") / "Tiny-Model")
    for name, keys in FILES.items():
        file = path / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | keys))
    export(str(path))  # negative control: unchanged, it is right
    return path


def export(reference: str) -> None:
    """All of an export but reading and writing the weights."""
    checkpoint = open_checkpoint(reference).interpolate(8)
    plan_gguf(checkpoint, ["q8_0"], allow_requantize=True)
    folder_config(checkpoint)
    tokenizer_files(checkpoint.vocabulary, checkpoint.rope.context)


def require_clear(error: ConvertError) -> None:
    assert "\n" not in error.message
    assert len(error.message) < 1500
    assert error.hint, error.message


@EXAMPLES
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 2**32))
def test_a_changed_value_in_a_folder_is_one_clear_error_or_harmless(
    folder: Path, name: str, seed: int
) -> None:
    file = folder / name
    right = file.read_bytes()
    draw = random.Random(seed)
    content = json.loads(right)
    place, key = draw.choice(list(values(content, draw)))
    if draw.random() < 0.2:
        del place[key]
    else:
        place[key] = draw.choice(STRANGE)
    file.write_text(json.dumps(content))
    try:
        export(str(folder))
    except ConvertError as error:
        require_clear(error)
    finally:
        file.write_bytes(right)


def values(node: Any, draw: random.Random) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of values at any depth; a few of a long list's."""
    if not isinstance(node, dict | list):
        return
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    for key in keys if len(keys) < 40 else draw.sample(keys, 10):
        yield node, key
        yield from values(node[key], draw)


@EXAMPLES
@given(
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3),
    value=st.one_of(
        st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)),
        st.integers(0, 80).map(lambda n: struct.pack("<I", n)),
        st.binary(min_size=1, max_size=4),
    ),
)
def test_a_gguf_with_changed_bytes_is_one_clear_error_or_harmless(
    folder: Path, tmp_path: Path, places: list[float], value: bytes
) -> None:
    right = tmp_path / "right.gguf"
    if not right.exists():
        write_tiny_gguf(right, folder)
    data = bytearray(right.read_bytes())
    size = read_gguf_file(right).data_offset
    for place in places:  # keys before the vocabulary and tensor infos after it, mostly
        at = int((place * 2) ** 4 / 2 * size if place < 0.5 else size - (1 - place) * 4000)
        data[at : at + len(value)] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    audit = audit_path(path)
    assert audit_text(audit)
    json.dumps(audit_json(audit), allow_nan=False)
    for use in (export, show, repair):
        try:
            use(str(path))
        except ConvertError as error:
            require_clear(error)


def show(path: str) -> None:
    description = describe(path)
    assert description_text(description)
    json.dumps(description_json(description), allow_nan=False)


def repair(path: str) -> None:
    plan_repair(read_gguf_file(Path(path)), 4.0, None)
