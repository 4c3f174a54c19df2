"""Writing ONNX folders: the same bytes always, whole or not there, and read back first."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from converters.checkpoint import Checkpoint
from converters.encodings import F32
from converters.errors import ConvertError, OutputError, SourceError
from converters.files import sha256_file
from converters.sources import open_checkpoint
from converters.targets import stream
from converters.targets.onnx import (
    PRECISIONS,
    GraphOptions,
    WeightOptions,
    plan_onnx,
    readback,
    sink,
    write_onnx,
)
from converters.targets.onnx import write as onnx_write
from converters.targets.onnx.plan import EMBEDDING
from converters.tensor import Tensor
from tests.broken.cases import CASES, Case
from tests.converters.targets.onnx.decoders import FUSED, Decoder, some_tokens, tiny
from tests.tiny import Shape

BLOCKS = WeightOptions(block_size=128, asymmetric=True)


def export(checkpoint: Checkpoint, out: Path, *precisions: str, **settings: Any) -> dict[str, str]:
    """SHA-256 by file, of blocks of every size and kind."""
    plans = [plan_onnx(checkpoint, name, BLOCKS) for name in precisions]
    write_onnx(checkpoint, plans, out, **settings)
    return hashes(out)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(files)}


@pytest.mark.parametrize(("threads", "chunk"), [(4, None), (1, None), (2, 700), (3, 1)])
def test_bytes_do_not_depend_on_threads_or_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, chunk: int | None
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED, dtype="bf16")
    everything = export(checkpoint, tmp_path / "expected", *PRECISIONS, threads=1)
    assert len([name for name in everything if name.endswith("_data")]) == len(PRECISIONS)
    if chunk is not None:
        monkeypatch.setattr(stream, "CHUNK_ELEMENTS", chunk)
    assert export(checkpoint, tmp_path / "found", *PRECISIONS, threads=threads) == everything


def test_a_file_is_the_same_whatever_is_written_beside_it(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    together = export(checkpoint, tmp_path / "all", *PRECISIONS)
    for name, precision in PRECISIONS.items():
        alone = export(checkpoint, tmp_path / name, name)
        for file in (precision.file_name, precision.data_name):
            assert alone[f"onnx/{file}"] == together[f"onnx/{file}"]


def test_hashes_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    plan = plan_onnx(checkpoint, "int4")
    artifact = write_onnx(checkpoint, [plan], tmp_path / "o")
    assert dict(artifact.files) == hashes(tmp_path / "o")
    assert artifact.size_bytes == sum(p.stat().st_size for p in (tmp_path / "o").rglob("*.*"))
    assert plan.data_bytes == (tmp_path / "o" / "onnx" / "model_q4.onnx_data").stat().st_size


def test_an_existing_folder_stays_unless_forced(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    before = export(checkpoint, tmp_path / "o", "int4")
    with pytest.raises(OutputError, match=r"exists"):
        export(checkpoint, tmp_path / "o", "int8")
    assert hashes(tmp_path / "o") == before
    assert export(checkpoint, tmp_path / "o", "int8", force=True) != before
    (tmp_path / "o" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        export(checkpoint, tmp_path / "o", "int8", force=True)
    assert (tmp_path / "o" / "notes.md").read_text() == "mine"


def failing(checkpoint: Checkpoint, name: str, error: BaseException) -> Checkpoint:
    def read_raw(start: int, stop: int) -> npt.NDArray[np.uint8]:
        raise error

    tensors = dict(checkpoint.tensors)
    tensors[name] = dataclasses.replace(tensors[name], read_raw=read_raw)
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("error", [SourceError("the disk went away"), KeyboardInterrupt()])
def test_a_failing_read_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    before = export(checkpoint, tmp_path / "a" / "o", "int4")
    broken = failing(checkpoint, "model.layers.1.mlp.gate_proj.weight", error)
    with pytest.raises(type(error)):
        export(broken, tmp_path / "a" / "o", "fp32", "int4", force=True)
    assert hashes(tmp_path / "a" / "o") == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["o"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    monkeypatch.setattr(stream.os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(checkpoint, tmp_path / "a" / "o", "int4")
    assert not (tmp_path / "a").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    everything = export(checkpoint, tmp_path / "expected", "int4", "fp16")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    assert export(checkpoint, tmp_path / "found", "int4", "fp16") == everything


TABLE_FAULTS = {
    "another factor": lambda cos, sin: (cos[::2].repeat(2, axis=0)[: len(cos)], sin),
    "swapped": lambda cos, sin: (sin, cos),
    "one entry": lambda cos, sin: (cos, np.where(np.arange(sin.size).reshape(sin.shape) == 77,
                                                 sin + sin.dtype.type(0.01), sin)),
    "amplified": lambda cos, sin: (cos * cos.dtype.type(0.99), sin * sin.dtype.type(0.99)),
}  # fmt: skip


@pytest.mark.parametrize("fault", TABLE_FAULTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_wrong_table_read_back_removes_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, fault: str
) -> None:
    right = sink.table_chunks

    def wrong(rope: Any, rows: int, dtype: Any) -> Any:
        for start, cos, sin in right(rope, rows, dtype):
            yield start, *TABLE_FAULTS[fault](cos, sin)

    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    monkeypatch.setattr(sink, "table_chunks", wrong)
    with pytest.raises(OutputError, match=r"is not the table of \"?linear\"? RoPE"):
        export(checkpoint, tmp_path / "a" / "o", precision)
    assert not (tmp_path / "a").exists()


def test_a_graph_that_onnx_refuses_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = onnx_write.build_graph

    def broken(*arguments: Any) -> Any:
        model = build(*arguments)
        model.graph.node(0).replace_input_with(0, ir.Value(name="nowhere"))
        return model

    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    monkeypatch.setattr(onnx_write, "build_graph", broken)
    with pytest.raises(OutputError, match="checker refuses it"):
        export(checkpoint, tmp_path / "a" / "o", "fp32")
    assert not (tmp_path / "a").exists()


def test_a_failing_check_of_the_second_file_removes_both_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    before = export(checkpoint, tmp_path / "o", "fp32")
    check = readback.check_graph

    def fail_for_int4(path: Path, *rest: Any) -> None:
        check(path, *rest)
        if path.name == "model_q4.onnx":
            raise OutputError("found wrong")

    monkeypatch.setattr(onnx_write, "check_graph", fail_for_int4)
    with pytest.raises(OutputError, match="found wrong"):
        export(checkpoint, tmp_path / "o", "fp32", "int4", force=True)
    assert hashes(tmp_path / "o") == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "o"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_error_and_nothing_is_written(tmp_path: Path, case: Case) -> None:
    (tmp_path / "in").mkdir()
    reference = case.build(tmp_path / "in")
    with pytest.raises(ConvertError) as error:
        checkpoint = open_checkpoint(reference)
        assert case.found_on == "write"  # negative control: it opens
        export(checkpoint.interpolate(8), tmp_path / "a" / "o", "fp32", "int4")
    for text in case.says:
        assert text in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint
    assert not (tmp_path / "a").exists()


MEASURE = """
import sys
from pathlib import Path
from converters.sources import open_checkpoint
from converters.targets.onnx import WeightOptions, plan_onnx, write_onnx
checkpoint = open_checkpoint(sys.argv[1]).interpolate(8.0)
options = WeightOptions(block_size=128, asymmetric=True, requantize=True)
plans = [plan_onnx(checkpoint, name, options) for name in ("fp32", "int4")]
write_onnx(checkpoint, plans, Path(sys.argv[2]), threads=2)
heavy = {"torch", "llama_cpp", "transformers", "onnxruntime"}
assert not heavy & sys.modules.keys(), "loaded in vain"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])  # ru_maxrss would start at that of the process that forked
"""


def test_memory_stays_flat_and_no_heavy_library_is_loaded(
    default_gguf: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(default_gguf), str(tmp_path / "o")],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    peak_kib = int(done.stdout)
    assert peak_kib <= 250 * 1024  # the float32 file alone is 529 MiB


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_more_than_2_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Zeros for most of the embedding, which stay a hole in the file; other weights lie behind."""
    rows = {"fp32": 4_400_000, "int8": 16_000_000}[precision]
    shape = Shape(128, 160, 1, heads=4, kv_heads=2, head_dim=32, context=64)
    checkpoint = tiny(tmp_path / "m", shape=shape, tied=False)
    small = checkpoint.tensors[EMBEDDING]
    head = small.read_rows(0, small.rows)

    def read_raw(start: int, stop: int) -> npt.NDArray[np.uint8]:
        raw = np.zeros((stop - start, 4 * shape.hidden), np.uint8)
        found = head[start : min(stop, len(head))]
        raw[: len(found)] = found
        return raw

    wide = Tensor(EMBEDDING, (rows, shape.hidden), F32, read_raw)
    large = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, EMBEDDING: wide})
    write = sink.write_all

    def sparse(descriptor: int, raw: npt.NDArray[np.uint8], offset: int) -> None:
        if raw.any():
            write(descriptor, raw, offset)

    monkeypatch.setattr(sink, "write_all", sparse)
    plan = plan_onnx(large, precision)
    assert plan.data_bytes > 2**31
    write_onnx(large, [plan], tmp_path / "large")
    expected = plan_onnx(checkpoint, precision)
    write_onnx(checkpoint, [expected], tmp_path / "small")
    tokens = some_tokens(40)[None]
    found, right = (
        Decoder(tmp_path / name / "onnx" / plan.precision.file_name).feed(tokens)
        for name in ("large", "small")
    )
    np.testing.assert_array_equal(found, right)
    offsets = [
        int(entry.value)
        for tensor in onnx.load(
            tmp_path / "large" / "onnx" / plan.precision.file_name, load_external_data=False
        ).graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert max(offsets) > 2**31


def test_a_graph_of_last_logits_is_the_same_but_for_its_end(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    data = []
    for last in (False, True):
        out = tmp_path / str(last)
        write_onnx(checkpoint, [plan_onnx(checkpoint, "int4")], out, GraphOptions(last_logits=last))
        data.append(sha256_file(out / "onnx" / "model_q4.onnx_data"))
    assert data[0] == data[1]  # one data file may serve both graphs
