"""Hub ids: a prepared cache without a network, and what is said when it is not there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converters.errors import SourceError
from converters.sources import open_checkpoint
from tests.tiny import write_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out: snapshots of links into blobs, and refs."""
    root = tmp_path / "hub"
    model = root / "models--some-org--Tiny-1M-Chat"
    for commit, seed in ((COMMIT, 0), (OLDER, 1)):
        source = write_tiny(tmp_path / f"source{seed}", seed=seed, shards=2)
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (model / "blobs").mkdir(exist_ok=True)
        for file in source.iterdir():
            blob = model / "blobs" / f"{seed}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "refs" / "v1.0").write_text(OLDER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_cached_snapshot_needs_no_network(cache: Path) -> None:
    checkpoint = open_checkpoint("some-org/Tiny-1M-Chat")
    assert checkpoint.origin.label == "some-org/Tiny-1M-Chat"
    assert checkpoint.origin.kind == "hub"
    assert checkpoint.origin.revision == COMMIT
    assert checkpoint.card.name == "Tiny-1M-Chat"
    assert checkpoint.card.organization in ("some-org", "Some Org")
    tensor = checkpoint.tensors["model.norm.weight"]
    assert tensor.read_f32(0, 1).shape == (1, 144)


def test_a_revision_is_another_snapshot(cache: Path) -> None:
    name = "model.embed_tokens.weight"
    values = []
    for revision, commit in ((None, COMMIT), ("v1.0", OLDER), (OLDER, OLDER)):
        checkpoint = open_checkpoint("some-org/Tiny-1M-Chat", revision=revision)
        assert checkpoint.origin.revision == commit
        values.append(checkpoint.tensors[name].read_rows(0, 4).tobytes())
    assert values[0] != values[1] == values[2]


def test_offline_and_not_cached_is_one_clear_error(cache: Path) -> None:
    with pytest.raises(SourceError) as error:
        open_checkpoint("some-org/Missing")
    assert "some-org/Missing: there is no such folder here" in error.value.message
    assert "not in the cache" in error.value.message
    assert "HF_HUB_OFFLINE is set" in error.value.message
    assert "hf download some-org/Missing" in error.value.hint
    with pytest.raises(SourceError, match=r"at revision v9\.9"):
        open_checkpoint("some-org/Tiny-1M-Chat", revision="v9.9")


def test_a_snapshot_that_lacks_a_file_says_which(cache: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    (cache / "models--some-org--Tiny-1M-Chat" / "snapshots" / COMMIT / shard).unlink()
    with pytest.raises(SourceError, match=shard):
        open_checkpoint("some-org/Tiny-1M-Chat")


def test_a_folder_of_that_name_comes_first(cache: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "some-org" / "Tiny-1M-Chat", seed=2)
    assert open_checkpoint("some-org/Tiny-1M-Chat").origin.kind == "folder"
    with pytest.raises(SourceError, match="has no revision v1"):
        open_checkpoint("some-org/Tiny-1M-Chat", revision="v1")


@pytest.mark.parametrize(
    "reference", ["./tiny", "/nowhere/tiny", "a/b/c", "tiny", "tiny.gguf", "models/tiny.gguf"]
)
def test_what_is_neither_names_the_three_forms(cache: Path, reference: str) -> None:
    with pytest.raises(SourceError) as error:
        open_checkpoint(reference)
    assert reference in error.value.message
    for form in ("folder", ".gguf file", "hub id"):
        assert form in error.value.hint


def test_a_plain_file_is_no_model(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="neither a folder nor"):
        open_checkpoint("model.safetensors")


def test_opening_a_folder_loads_no_torch(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    code = (
        "import sys; from converters.sources import open_checkpoint;"
        f"open_checkpoint({str(folder)!r});"
        "print(sorted({'torch', 'transformers', 'llama_cpp'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
