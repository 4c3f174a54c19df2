"""Hub ids: a prepared cache without a network, and what is said when it is not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from converters.errors import SourceError
from converters.sources import open_checkpoint
from converters.sources.hub import fetch_hub
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


ADAPTER = "other-org/Tiny-LoRA"
RANK, ALPHA = 2, 3
CHANGED = "model.layers.1.self_attn.o_proj.weight"


def factors() -> dict[str, torch.Tensor]:
    """LoRA factors of one weight as PEFT stores them."""
    prefix = f"base_model.model.{CHANGED.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(3)
    return {
        f"{prefix}.lora_A.weight": torch.randn(RANK, 144, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(144, RANK, generator=generator),
    }


def write_adapter(folder: Path, **keys: object) -> Path:
    """An adapter on the cached hub id, pickled, as LongLoRA's are."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "some-org/Tiny-1M-Chat"}
    config |= {"r": RANK, "lora_alpha": ALPHA, **keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(factors(), folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("v1.0", 1), (OLDER, 1)])
def test_a_cached_adapter_is_merged_into_the_base_of_its_revision(
    cache: Path, tmp_path: Path, revision: str | None, seed: int
) -> None:
    model = cache / "models--other-org--Tiny-LoRA"
    write_adapter(model / "snapshots" / COMMIT, revision=revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    found = open_checkpoint(ADAPTER)
    assert (found.origin.label, found.origin.kind) == (ADAPTER, "adapter")
    assert found.origin.revision == COMMIT
    assert found.card.name == "Tiny-LoRA"
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / f"source{seed}").glob("*.safetensors"):
        stored |= load_file(path)
    a, b = factors().values()
    expected = stored[CHANGED] + b @ a * (ALPHA / RANK)
    tensor = found.tensors[CHANGED]
    value = tensor.read_f32(0, tensor.rows)
    assert np.allclose(value, expected.numpy(), rtol=0, atol=1e-5)  # float32, sums of 2 products


def test_a_base_on_disk_stands_for_its_revision(cache: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "some-org" / "Tiny-1M-Chat", seed=2)
    write_adapter(tmp_path / "tuned", revision="v1.0")
    name = "model.embed_tokens.weight"
    found = open_checkpoint("tuned").tensors[name]
    expected = load_file(tmp_path / "some-org" / "Tiny-1M-Chat" / "model.safetensors")[name]
    assert np.array_equal(found.read_f32(0, found.rows), expected.numpy())


PLAIN = ("config.json", "tokenizer.json", "README.md")
TUNED = ("adapter_config.json", "tokenizer.json")


@pytest.mark.parametrize(
    ("there", "left"),
    [
        ((*PLAIN, "model.safetensors"), ("pytorch_model.bin", "optimizer.bin")),
        ((*PLAIN, "model-00001-of-00001.safetensors", "model.safetensors.index.json"),
         ("pytorch_model-00001-of-00001.bin",)),
        ((*PLAIN, "pytorch_model.bin"), ("training_args.bin", "optimizer.pt", "tf_model.h5")),
        ((*PLAIN, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"), ()),
        ((*TUNED, "adapter_model.safetensors"), ("adapter_model.bin", "training_args.bin")),
        ((*TUNED, "adapter_model.safetensors", "trainable_params.bin"), ("adapter_model.bin",)),
        ((*TUNED, "adapter_model.bin", "trainable_params.bin"), ("training_args.bin",)),
    ],
)  # fmt: skip
def test_pickles_are_downloaded_for_want_of_safetensors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    left: tuple[str, ...],
) -> None:
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    revisions = []

    def snapshot_download(hub_id: str, *, revision: str | None, **patterns: Any) -> str:
        revisions.append(revision)
        for name in filter_repo_objects([*there, *left, "onnx/model.safetensors"], **patterns):
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    origin = fetch_hub("some-org/Tiny")
    assert {path.name for path in origin.path.iterdir()} == set(there)
    assert revisions in ([None], [None, COMMIT])


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
