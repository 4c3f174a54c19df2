"""The folders that clients load, the clients, and what transformers says of the same models."""

from __future__ import annotations

import dataclasses
import json
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.clients.browser import Browser
from tests.clients.environments import chromium, node_environment, python_environment
from tests.clients.protocol import Answer, Logits, Program, Request
from tests.clients.reference import Reference
from tests.tiny import Shape, write_tiny

FACTOR, WRONG_FACTOR = 8, 4
NEW_TOKENS = 16
# optimum-onnx takes hidden / heads for head_dim, whatever the config says.
SHAPE = Shape(hidden=192, intermediate=160, layers=2, heads=6, kv_heads=2, head_dim=32)

Folder = Callable[[str, int], Path]
Client = Program | Browser


@dataclass(frozen=True)
class Case:
    """What a model is asked."""

    texts: tuple[str, ...]
    messages: tuple[dict[str, str], ...]
    beams: int


def _topic(name: str, length: int) -> str:
    """The first characters of a topic of Python's documentation."""
    return pydoc_data.topics.topics[name][:length]


CASES = {
    # 37, 113 and 129 tokens
    "default": Case(
        (_topic("while", 150), _topic("assert", 500), _topic("booleans", 500)),
        ({"role": "user", "content": f"Summarise:\n{_topic('booleans', 500)}"},),
        beams=2,
    ),
    # L is 128: two go past it
    "qwen2": Case(
        (_topic("while", 60), _topic("assert", 400), _topic("booleans", 700)),
        ({"role": "user", "content": _topic("lambda", 500)},),
        beams=3,
    ),
}


@dataclass(frozen=True)
class Expected:
    """As ``protocol.Answer``, from transformers 5, and the model itself with ``FACTOR``."""

    reference: Reference
    encoded: list[list[int]]
    continued: list[list[int]]
    beams: list[list[int]]
    prompt: list[int]
    reply: list[int]
    logits: list[Logits]
    wrong_logits: list[Logits]  # with WRONG_FACTOR


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, default_gguf: Path) -> dict[str, Path]:
    """Checkpoints by the names of ``CASES``."""
    folder = write_tiny(
        tmp_path_factory.mktemp("source") / "qwen2",
        architecture="qwen2",
        shape=SHAPE,
        tied=True,
        seed=5,  # one whose greedy choices are clear on these texts
    )
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text("utf-8"))
    settings.write_text(json.dumps(known | {"pad_token": "<|endoftext|>"}), encoding="utf-8")
    return {"default": default_gguf, "qwen2": folder}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> Folder:
    """The folder that one ``pi-convert export`` of a source makes with a factor."""

    @cache
    def make(name: str, factor: int) -> Path:
        return export(sources[name], tmp_path_factory.mktemp(f"{name}-{factor}"), factor)

    return make


def export(source: Path, out: Path, factor: int, *options: str) -> Path:
    """Runs ``pi-convert export`` in a process of its own."""
    chosen = options or ("--precision", "fp32", "--precision", "int4")
    command = [sys.executable, "-m", "pi_convert", "export", str(source), "--to", "onnx"]
    words = [*command, "--scale", str(factor), *chosen, "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def expected(sources: dict[str, Path]) -> Callable[[str], Expected]:
    """What transformers makes of a case with ``FACTOR``."""

    @cache
    def make(name: str) -> Expected:
        reference, case = Reference(sources[name]), CASES[name]
        reference.scale(FACTOR)
        encoded = [reference.encode(text) for text in case.texts]
        prompt = reference.chat(case.messages)
        right = {
            "continued": [reference.continued(ids, NEW_TOKENS) for ids in encoded],
            "beams": [reference.beams(ids, NEW_TOKENS, case.beams) for ids in encoded],
            "reply": reference.continued(prompt, NEW_TOKENS),
            "logits": [reference.logits(ids) for ids in encoded],
        }
        reference.scale(WRONG_FACTOR)
        wrong = [reference.logits(ids) for ids in encoded]
        reference.scale(FACTOR)
        return Expected(reference, encoded, prompt=prompt, **right, wrong_logits=wrong)

    return make


@pytest.fixture(scope="session")
def client_named() -> Callable[[str], Client]:
    """A client by name, installed when it is asked for first."""

    @cache
    def make(name: str) -> Client:
        if name in {"node", "browser"}:
            node = node_environment()
            if name == "browser":
                return Browser(chromium(), node)
            modules = {"CLIENT_MODULES": str(node.modules.parent)}
            return Program(node.binary, "with_node.mjs", modules)
        return Program(python_environment(name), f"with_{name.partition('-')[0]}.py")

    return make


@pytest.fixture
def answer(
    client_named: Callable[[str], Client], folder: Folder, tmp_path: Path
) -> Callable[..., Answer]:
    """What a client makes of a case: ``answer(client, case, factor, ...)``; fields of ``Request``.

    A request has the case's texts, messages and beams unless told otherwise.
    """

    def ask(name: str, case: str, factor: int, **fields: Any) -> Answer:
        whole = dataclasses.asdict(CASES[case]) | {"new_tokens": NEW_TOKENS} | fields
        request = Request(folder(case, factor), **whole)
        return client_named(name).ask(request, tmp_path / f"{name}-{factor}")

    return ask
