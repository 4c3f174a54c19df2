"""Writing GGUF files: the same bytes always, whole or not there, and right when read back."""

from __future__ import annotations

import _thread
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import Checkpoint
from converters.content_hash import content_hash, tensor_hash
from converters.errors import OutputError, SourceError, TensorError
from converters.files import sha256_file
from converters.ggml import load_ggml
from converters.sources import open_checkpoint
from converters.targets import stream
from converters.targets.gguf import metadata, plan_gguf, readback, write_gguf
from converters.tensor import Tensor
from tests.tiny import ODD, ODD4, Shape, write_tiny

WIDE2 = Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=1, head_dim=64)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def opened(folder: Path, **tiny: Any) -> Checkpoint:
    return open_checkpoint(str(write_tiny(folder, **tiny)))


def export(checkpoint: Checkpoint, out: Path, *types: str, **options: Any) -> list[Path]:
    artifacts = write_gguf(checkpoint, plan_gguf(checkpoint, types), out, **options)
    return [artifact.path for artifact in artifacts]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1 << 30), (2, 700), (3, 20_000), (2, 1)])
def test_bytes_do_not_depend_on_threads_or_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, chunk: int
) -> None:
    checkpoint = opened(tmp_path / "m", shape=WIDE2, dtype="bf16").interpolate(2.2)
    expected = export(checkpoint, tmp_path / "expected", "q4_k_m", "f16", threads=2)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", chunk)
    found = export(checkpoint, tmp_path / "found", "q4_k_m", "f16", threads=threads)
    assert list(map(sha256_file, found)) == list(map(sha256_file, expected))


def test_vectors_are_permuted_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD, config={"attention_bias": True})
    (expected,) = export(checkpoint, tmp_path / "expected", "f32")
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 10)
    (found,) = export(checkpoint, tmp_path / "found", "f32", threads=2)
    assert sha256_file(found) == sha256_file(expected)
    bias = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.self_attn.q_proj.bias"]
    pairs = bias.reshape(ODD.heads, 2, ODD.head_dim // 2).swapaxes(1, 2).reshape(-1)
    written = {t.name: t.data for t in gguf.GGUFReader(found).tensors}["blk.0.attn_q.bias"]
    np.testing.assert_array_equal(written, pairs.numpy())


def test_types_of_one_run_equal_single_runs_and_each_tensor_is_read_once(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD4, dtype="f16")
    types = ("f16", "q8_0", "q4_k_m", "bf16")
    single = {kind: export(checkpoint, tmp_path / kind, kind)[0] for kind in types}
    read: list[int] = []

    def counted(tensor: Tensor) -> Tensor:
        def read_raw(start: int, stop: int) -> npt.NDArray[np.uint8]:
            read.append((stop - start) * tensor.row_bytes)
            return tensor.read_raw(start, stop)

        return dataclasses.replace(tensor, read_raw=read_raw)

    watched = dataclasses.replace(
        checkpoint, tensors={name: counted(t) for name, t in checkpoint.tensors.items()}
    )
    together = export(watched, tmp_path / "together", *types)
    assert sum(read) == sum(tensor.size_bytes for tensor in checkpoint.tensors.values())
    for path, kind in zip(together, types, strict=True):
        assert sha256_file(path) == sha256_file(single[kind])


def test_the_files_say_what_they_came_from(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "Tiny-1M", shape=ODD, shards=3).interpolate(8)
    plans = plan_gguf(checkpoint, ["Q8_0", "q8_0", "f16"])
    artifacts = write_gguf(checkpoint, plans, tmp_path / "out")
    assert [a.path.name for a in artifacts] == ["Tiny-1M-PI8-Q8_0.gguf", "Tiny-1M-PI8-F16.gguf"]
    hashes = {name: tensor_hash(tensor) for name, tensor in checkpoint.tensors.items()}
    for plan, artifact in zip(plans, artifacts, strict=True):
        assert artifact.path.stat().st_size == artifact.size_bytes == plan.size_bytes
        assert artifact.sha256 == sha256_file(artifact.path)
        fields = gguf.GGUFReader(artifact.path).fields
        assert fields["pi_convert.source.name"].contents() == "Tiny-1M"
        assert fields["pi_convert.source.sha256"].contents() == content_hash(
            checkpoint.tensors, hashes
        )
        assert fields["pi_convert.quantizer"].contents() == load_ggml().fingerprint()
        assert str(tmp_path).encode() not in artifact.path.read_bytes()


@pytest.mark.parametrize("factor", [1.0, 1.1, 2.2, 3.0, 8.0])
def test_gguf_py_reads_the_rope_back(tmp_path: Path, factor: float) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD).interpolate(factor)
    (path,) = export(checkpoint, tmp_path / "out", "f16")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    assert fields["llama.context_length"] == int(ODD.context * factor + 1e-6)
    assert fields["llama.rope.scaling.original_context_length"] == ODD.context
    assert fields["llama.rope.scaling.type"] == ("none" if factor == 1 else "linear")
    assert fields.get("llama.rope.scaling.factor") == (None if factor == 1 else np.float32(factor))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_llama3_frequencies_become_a_tensor(tmp_path: Path, factor: float) -> None:
    config = {"rope_scaling": LLAMA3, "max_position_embeddings": 16384}
    checkpoint = opened(tmp_path / "m", shape=ODD, rope=config).interpolate(factor)
    (path,) = export(checkpoint, tmp_path / "out", "q8_0")
    reader = gguf.GGUFReader(path)
    freqs = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    assert freqs.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(freqs.data, checkpoint.rope.frequency_divisors())
    assert ("llama.rope.scaling.factor" in reader.fields) == (factor != 1)


DAMAGE: dict[str, Callable[[torch.Tensor], None]] = {
    "nan": lambda w: w[-1, 3].fill_(float("nan")),
    "inf": lambda w: w[0, 0].fill_(float("inf")),
    "-inf": lambda w: w[7, -1].fill_(float("-inf")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("dtype", "kind"), [
    ("f32", "f32"), ("f32", "f16"), ("bf16", "bf16"), ("bf16", "q4_k_m"), ("f16", "f16"),
    ("f16", "q8_0"),
])  # fmt: skip
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, dtype: str, kind: str, damage: str
) -> None:
    folder = write_tiny(tmp_path / "m", shape=ODD, dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    DAMAGE[damage](weights["model.layers.1.self_attn.k_proj.weight"])
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(TensorError, match=r"1\.self_attn\.k_proj\.weight holds NaN or Inf in row"):
        export(checkpoint, tmp_path / "out", "q4_0", kind)
    assert not (tmp_path / "out").exists()


def test_a_value_too_large_for_f16_is_an_error(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", shape=ODD)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][2, 2] = 70000.0
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(TensorError, match=r"up_proj\.weight holds 70000, which f16 cannot hold"):
        export(checkpoint, tmp_path / "out", "f16")
    export(checkpoint, tmp_path / "out", "bf16")


def test_an_existing_file_stays_unless_forced(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    out = tmp_path / "out"
    (path,) = export(checkpoint, out, "q8_0")
    before = sha256_file(path)
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        export(checkpoint, out, "f16", "q8_0")
    assert (path.read_bytes(), left_in(out)) == (b"mine", [path.name])
    export(checkpoint, out, "q8_0", force=True)
    assert sha256_file(path) == before


def broken_after(checkpoint: Checkpoint, name: str, error: BaseException) -> Checkpoint:
    def read_raw(start: int, stop: int) -> npt.NDArray[np.uint8]:
        raise error

    tensors = dict(checkpoint.tensors)
    tensors[name] = dataclasses.replace(tensors[name], read_raw=read_raw)
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_read_is_raised_as_itself_and_the_old_files_stay(
    tmp_path: Path, threads: int
) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    out = tmp_path / "out"
    paths = export(checkpoint, out, "f16", "q8_0")
    before = list(map(sha256_file, paths))
    name = "model.layers.1.mlp.gate_proj.weight"
    broken = broken_after(checkpoint, name, SourceError("the disk went away"))
    with pytest.raises(SourceError, match="the disk went away"):
        export(broken, out, "f16", "q8_0", "q4_0", force=True, threads=threads)
    assert left_in(out) == sorted(path.name for path in paths)
    assert list(map(sha256_file, paths)) == before


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)

    def full(descriptor: int, data: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(checkpoint, tmp_path / "out", "f16", "q8_0")
    assert left_in(tmp_path / "out") == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    (expected,) = export(checkpoint, tmp_path / "expected", "q8_0")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    (found,) = export(checkpoint, tmp_path / "found", "q8_0")  # header and data
    assert sha256_file(found) == sha256_file(expected)


def test_a_failure_between_two_files_leaves_the_old_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    paths = export(checkpoint, tmp_path / "out", "f16", "q8_0")
    for path in paths:
        path.write_bytes(path.name.encode())
    replace = Path.replace

    def fail_for_the_second(self: Path, target: Path) -> Path:
        if target == paths[1] and "replaced" not in self.name:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_second)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", "f16", "q8_0", force=True)
    assert [path.read_bytes() for path in paths] == [path.name.encode() for path in paths]
    assert left_in(tmp_path / "out") == sorted(path.name for path in paths)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.factor", 8.0001),
        ("rope.scaling.type", "none"),
        ("rope.freq_base", 10001.0),
        ("context_length", 128),
        ("rope.scaling.original_context_length", 64),
    ],
)
def test_a_wrong_frequency_read_back_removes_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    right = metadata.write_gguf_rope
    monkeypatch.setattr(metadata, "write_gguf_rope", lambda rope: {**right(rope), key: value})
    checkpoint = opened(tmp_path / "m", shape=ODD).interpolate(8)
    with pytest.raises(OutputError, match=r"reads (other frequencies|the contexts)"):
        export(checkpoint, tmp_path / "out", "f16")
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("other", ["gguf-py", "ggml"])
def test_each_reader_judges_a_file_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    right, name = metadata.write_gguf_rope, f"_read_with_{other.replace('-', '_')}"
    checkpoint = opened(tmp_path / "m", shape=ODD).interpolate(8)
    seen = getattr(readback, "_read_with_gguf_py" if other == "ggml" else "_read_with_ggml")
    monkeypatch.setattr(readback, name, seen)  # the other one reads twice, this one never
    monkeypatch.setattr(metadata, "write_gguf_rope", lambda r: {**right(r), "rope.freq_base": 1e3})
    judge = "ggml" if other == "gguf-py" else "gguf-py"
    with pytest.raises(OutputError, match=f"{judge} reads other frequencies"):
        export(checkpoint, tmp_path / "out", "f16")


@pytest.mark.parametrize("length", [1, readback._LONG_ARRAY + 1])
def test_long_arrays_are_stepped_over_and_the_rest_is_gguf_pys(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"é{i}" for i in range(length)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * length)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tensor("a", np.ones((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    full, seen = gguf.GGUFReader(path), readback._read_with_gguf_py(path, "llama")
    assert seen.keys == {"rope.freq_base": 10000.0}
    assert seen.tensors == [("a", 0, full.tensors[0].data_offset, 3 * 32 * 4)]


def test_ctrl_c_stops_the_pool_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path / "m", shape=WIDE2)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 256)
    interrupted = threading.Event()
    shares = [0.0]

    def progress(stage: str, done: int, total: int) -> None:
        if interrupted.is_set():
            shares.append(done / total)
        else:
            interrupted.set()
            _thread.interrupt_main()
        time.sleep(0.02)  # so that finishing all chunks would take a minute

    threads_before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", "q4_k_m", threads=2, progress=progress)
    assert max(shares) < 0.5  # a loaded machine wakes the main thread seconds late
    assert threading.active_count() == threads_before
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_byte_of_the_source_once(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shape=ODD)
    seen: list[tuple[str, int, int]] = []
    export(
        checkpoint, tmp_path / "out", "f16", "q8_0",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    total = sum(tensor.size_bytes for tensor in checkpoint.tensors.values())
    assert max(done for _, done, _ in seen) == total
    assert {(stage, t) for stage, _, t in seen} == {("writing", total)}


MEASURE = """
import sys
from pathlib import Path
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
checkpoint = open_checkpoint(sys.argv[1]).interpolate(8.0)
plans = plan_gguf(checkpoint, ["f16", "q8_0"], allow_requantize=True)
write_gguf(checkpoint, plans, Path(sys.argv[2]), threads=2)
assert not {"torch", "llama_cpp", "transformers"} & sys.modules.keys(), "loaded in vain"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])  # ru_maxrss would start at that of the process that forked
"""


def test_memory_stays_flat_and_no_heavy_library_is_loaded(
    default_gguf: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(default_gguf), str(tmp_path / "out")],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    peak_kib = int(done.stdout)
    assert peak_kib <= 200 * 1024  # the f16 file alone is 258 MiB
