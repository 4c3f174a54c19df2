"""Right exports of tiny models, made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from converters.checkpoint import Checkpoint
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert.evaluate.texts import Document
from tests.tiny import ODD, Shape, with_context, write_tiny

# L and L' are small, so that every window is.
TINY = with_context(ODD, 128)
# All widths are multiples of 256, so that q4_k_m holds q4_k and q6_k tensors. llama.cpp's qwen2
# takes no head size of its own: heads x head_dim has to be the hidden size there.
BLOCKS = Shape(hidden=256, intermediate=512, layers=3, heads=8, kv_heads=2, head_dim=64)
QWEN2_BLOCKS = dataclasses.replace(BLOCKS, head_dim=32)


@dataclass(frozen=True)
class Export:
    """A right export and what it was made from."""

    source: Checkpoint
    path: Path
    scale: float


Exporter = Callable[..., Export]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """``export(ftype, architecture=..., scale=..., tied=...)``: one file for equal arguments."""
    made: dict[tuple[object, ...], Export] = {}

    def make(
        ftype: str,
        *,
        architecture: str = "llama",
        scale: float = 8.0,
        tied: bool = False,
        shape: Shape | None = None,
        rope: dict[str, object] | None = None,
    ) -> Export:
        blocks = QWEN2_BLOCKS if architecture == "qwen2" else BLOCKS
        size = shape or (TINY if ftype in ("f32", "f16", "bf16") else blocks)
        key = (ftype, architecture, scale, tied, size, str(rope))
        if key not in made:
            folder = tmp_path_factory.mktemp("export")
            model = folder / f"tiny-{architecture}"
            write_tiny(model, architecture=architecture, shape=size, tied=tied, rope=rope)
            source = open_checkpoint(str(model))
            checkpoint = source.interpolate(scale)
            (artifact,) = write_gguf(checkpoint, plan_gguf(checkpoint, [ftype]), folder / "out")
            made[key] = Export(source, artifact.path, scale)
        return made[key]

    return make


@pytest.fixture
def short_text() -> tuple[Document, ...]:
    """Enough tokens for every window of a tiny model."""
    text = "RoPE turns each pair of a query by its position; 12 and 345 are numbers.\n\n  x = 7\n"
    return tuple(Document(f"text {i}", f"{i}. {text * 4}") for i in range(12))


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Link 3 on fewer tokens, for tests that are about another link."""
    monkeypatch.setattr("pi_convert.verify.tokenizer.MINIMUM_TOKENS", 2000)
    monkeypatch.setattr("pi_convert.verify.tokenizer.UNICODE_TOKENS", 1000)
