"""A tiny model with dropout, and text for it."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from tests.tiny import Shape, write_tiny

# L is 32, so that a window of 64 reaches past it.
SMALL = Shape(hidden=48, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=12, context=32)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    return write_tiny(folder, shape=SMALL, config={"attention_dropout": 0.1})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number, (_, topic) in enumerate(sorted(pydoc_data.topics.topics.items())[:6]):
        (folder / f"{number}.txt").write_text(topic)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> Path:
    """``model`` without dropout, which draws anew in each process and pass."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        if path.name == "config.json":
            content = json.dumps({**json.loads(content), "attention_dropout": 0.0}).encode()
        (folder / path.name).write_bytes(content)
    return folder
