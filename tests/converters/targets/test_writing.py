"""Several targets in one run: the source is read once, and all outputs appear or none does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import Checkpoint
from converters.errors import OutputError
from converters.files import sha256_file
from converters.sources import open_checkpoint
from converters.targets.gguf import GgufTarget, plan_gguf, write_gguf
from converters.targets.huggingface import FolderTarget, write_folder
from converters.targets.onnx import OnnxTarget, plan_onnx, write_onnx
from converters.targets.onnx import write as onnx_write
from converters.targets.writing import Target, write_targets
from tests.tiny import ODD, write_tiny
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(params=["folder", "gguf"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    source = write_tiny(
        tmp_path / "m", shape=ODD, dtype="bf16" if request.param == "folder" else "f32"
    )
    if request.param == "gguf":
        source = write_tiny_gguf(tmp_path / "m.gguf", source)
    return open_checkpoint(str(source)).interpolate(4)


def every_target(checkpoint: Checkpoint, out: Path) -> list[Target[Any]]:
    return [
        GgufTarget(checkpoint, plan_gguf(checkpoint, ["q8_0", "f16"], allow_requantize=True), out),
        OnnxTarget(checkpoint, [plan_onnx(checkpoint, p) for p in ("fp32", "int4")], out / "onnx"),
        FolderTarget(checkpoint, out / "folder"),
    ]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def counted(checkpoint: Checkpoint, rows: Counter[tuple[str, int]]) -> Checkpoint:
    """The same checkpoint, which counts how often each row is read."""

    def counting(name: str, read: Any) -> Any:
        def read_raw(start: int, stop: int) -> Any:
            rows.update((name, row) for row in range(start, stop))
            return read(start, stop)

        return read_raw

    tensors = {
        name: dataclasses.replace(tensor, read_raw=counting(name, tensor.read_raw))
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def test_each_row_of_the_source_is_read_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows: Counter[tuple[str, int]] = Counter()
    write_targets(every_target(counted(checkpoint, rows), tmp_path / "out"), threads=2)
    assert set(rows.values()) == {1}
    assert len(rows) == sum(tensor.rows for tensor in checkpoint.tensors.values())


def test_together_the_same_bytes_as_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_targets(every_target(checkpoint, tmp_path / "together"), threads=2)
    alone = tmp_path / "alone"
    write_gguf(
        checkpoint,
        plan_gguf(checkpoint, ["q8_0", "f16"], allow_requantize=True),
        alone,
        threads=1,
    )
    write_onnx(
        checkpoint,
        [plan_onnx(checkpoint, "fp32"), plan_onnx(checkpoint, "int4")],
        alone / "onnx",
        threads=1,
    )
    write_folder(checkpoint, alone / "folder", threads=1)
    assert hashes(tmp_path / "together") == hashes(alone)


def test_one_that_fails_leaves_none(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "onnx" / "onnx").mkdir(parents=True)
    (out / "onnx" / "config.json").write_text("old")

    def refuse(path: Path, *_: object) -> None:
        raise OutputError(f"{path.name}: read back wrong")

    monkeypatch.setattr(onnx_write, "check_graph", refuse)
    with pytest.raises(OutputError, match="read back wrong"):
        write_targets(every_target(checkpoint, out), force=True)
    assert [p for p in out.rglob("*") if p.is_file()] == [out / "onnx" / "config.json"]
    monkeypatch.undo()
    write_targets(every_target(checkpoint, out), force=True)  # negative control
    assert (out / "folder" / "config.json").is_file()
    assert (out / "onnx" / "config.json").read_text() != "old"


def test_nothing_to_write_is_nothing() -> None:
    assert write_targets([]) == ()


def test_an_onnx_export_of_a_folder_with_a_card_can_be_replaced(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", shape=ODD)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# m\n")
    checkpoint = open_checkpoint(str(folder)).interpolate(4)
    plans = [plan_onnx(checkpoint, "fp32")]
    write_onnx(checkpoint, plans, tmp_path / "o")
    assert (tmp_path / "o" / "README.md").is_file()
    write_onnx(checkpoint, plans, tmp_path / "o", force=True)
    (tmp_path / "o" / "notes.docx").write_text("mine")
    with pytest.raises(OutputError, match=r"other things than an ONNX export: notes\.docx"):
        write_onnx(checkpoint, plans, tmp_path / "o", force=True)
