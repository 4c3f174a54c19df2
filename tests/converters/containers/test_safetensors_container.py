"""The safetensors reader and header against the safetensors library."""

from __future__ import annotations

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters.containers.safetensors import read_safetensors, safetensors_header
from converters.encodings import BF16, F16, F32
from converters.errors import ConvertError, SourceError, UnsupportedError

SHAPES = {"a.weight": (5, 7), "b.bias": (3,), "c.deep": (2, 3, 4), "d.none": (0, 4), "e.one": ()}


def write_sample(path: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_equal_the_librarys(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = write_sample(tmp_path / "m.safetensors", dtype)
    found = read_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == (tuple(expected[name].shape) or (1,))
        assert tensor.elements == expected[name].numel()
        values = tensor.read_f32(0, tensor.rows).reshape(-1)
        assert np.array_equal(values, expected[name].float().numpy().reshape(-1))
    deep = found["c.deep"].read_f32(1, 4)  # rows over all axes but the last
    assert np.array_equal(deep, expected["c.deep"].float().numpy().reshape(6, 4)[1:4])


def test_our_header_is_read_by_the_library(tmp_path: Path) -> None:
    specs = [("x", F32, (3, 2)), ("y", BF16, (5,)), ("ü", F16, (1, 4))]
    raw = {"x": np.arange(6, dtype=np.float32), "y": np.full(5, 0x3F80, np.uint16),
           "ü": np.arange(4, dtype=np.float16)}  # fmt: skip
    header = safetensors_header(specs)
    assert len(header) % 8 == 0
    path = tmp_path / "m.safetensors"
    path.write_bytes(header + b"".join(part.tobytes() for part in raw.values()))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("x").tolist() == [[0, 1], [2, 3], [4, 5]]
        assert file.get_tensor("y").tolist() == [1.0] * 5
        assert file.get_tensor("ü").dtype is torch.float16
    assert read_safetensors(path)["ü"].read_f32(0, 1).tolist() == [[0, 1, 2, 3]]


def test_threads_read_one_descriptor_which_closes_with_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    expected = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    save_file({"w": expected, "v": expected[:4].clone()}, path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    tensors = read_safetensors(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    del tensors["v"]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: tensors["w"].read_f32(i, i + 1)[0], range(512)))
    assert np.array_equal(np.stack(rows), expected.numpy())
    tensors.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")],
)
def test_other_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    save_file({"w.weight": torch.zeros(4, 4).to(dtype)}, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedError, match=rf"w\.weight {named}"):
        read_safetensors(tmp_path / "m.safetensors")


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: list[tuple[str, dict[str, Any] | bytes, int, str]] = [
    ("hole", {"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "hole after a"),
    ("overlap", {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b overlaps a"),
    ("starts late", {"a": entry(4, 12, [2])}, 12, "byte 4"),
    ("past the end", {"a": entry(0, 80, [20])}, 8, "80 bytes of tensors, the file has 8"),
    ("left over", {"a": entry(0, 8, [2])}, 12, "8 bytes of tensors, the file has 12"),
    ("lying shape", {"a": entry(0, 8, [3])}, 8, r"F32 \[3\] does not take 8"),
    ("negative shape", {"a": entry(0, 8, [-2])}, 8, r"shape is \[-2\]"),
    ("bool shape", {"a": entry(0, 4, [True])}, 4, "shape"),
    ("backwards", {"a": entry(8, 0, [2])}, 8, "data_offsets"),
    ("not a dict", {"a": 3}, 0, "expected dtype"),
    ("not JSON", b"{broken", 0, "not valid JSON"),
    ("a list", b"[]", 0, "expected a JSON object"),
    ("twice", b'{"a": {"x": 1, "x": 2}}', 0, "x stands twice"),
    ("bad UTF-8", b'{"\xff": 1}', 0, "not valid JSON"),
    ("deep", b'{"a":' * 100_000, 0, "not valid JSON"),
    ("metadata", {"__metadata__": {"format": 1}}, 0, "__metadata__"),
]


@pytest.mark.parametrize(("label", "header", "size", "message"), BAD_HEADERS)
def test_a_bad_header_is_one_clear_error(
    tmp_path: Path, label: str, header: dict[str, Any] | bytes, size: int, message: str
) -> None:
    path = write_header(tmp_path / "m.safetensors", header, bytes(size))
    with pytest.raises(SourceError, match=message) as error:
        read_safetensors(path)
    assert error.value.hint
    assert str(path) in error.value.message


@pytest.mark.parametrize("size", [0, 7, 8, 40])
def test_a_file_cut_in_its_header_is_an_error(tmp_path: Path, size: int) -> None:
    write_sample(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:size])
    with pytest.raises(SourceError):
        read_safetensors(tmp_path / "m.safetensors")


def test_a_file_cut_after_it_was_opened_is_an_error_at_the_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_sample(path)
    tensor = read_safetensors(path)["a.weight"]
    os.truncate(path, path.stat().st_size - 8 - 2 * (3 + 24 + 1))
    with pytest.raises(SourceError, match="bytes are missing"):
        tensor.read_rows(0, tensor.rows)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_the_library_refuses_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Any mutation is an error or tensors inside the file; never looser than the library."""
    path = tmp_path / "m.safetensors"
    write_sample(path)
    mutated = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(mutated[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated[: data.draw(st.integers(0, len(mutated)) | st.just(len(mutated)))])
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        with pytest.raises(ConvertError):
            read_safetensors(path)
        return
    try:
        tensors = read_safetensors(path)
    except ConvertError:
        return
    assert tensors.keys() == names
    for tensor in tensors.values():
        assert tensor.read_rows(0, tensor.rows).nbytes == tensor.size_bytes
