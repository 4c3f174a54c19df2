"""The GGUF reader against gguf-py's on good files, and against mutated headers."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.containers.gguf import GgufFile, ValueType, read_gguf_file
from converters.errors import ConvertError, SourceError, UnsupportedError

PER_BYTE = 40  # Python objects for a header of one-byte strings
READ_AHEAD = 1 << 20


def write_sample(path: Path) -> Path:
    """A real file of every value type and of several tensor types, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -300)
    writer.add_uint32("llama.context_length", 2**31)
    writer.add_int32("t.i32", -(2**30))
    writer.add_float32("llama.rope.freq_base", 2.2)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "naïve ▁ token")
    writer.add_uint64("t.u64", 2**60)
    writer.add_int64("t.i64", -(2**60))
    writer.add_float64("t.f64", 0.1)
    writer.add_array("t.strings", ["a", "", "ü" * 40, "the end"])
    writer.add_array("t.numbers", [1, -2, 3])
    writer.add_array("t.floats", [0.5, 2.2])
    writer.add_array("t.bools", [True, False])
    generator = np.random.default_rng(0)
    writer.add_tensor("norm.weight", generator.standard_normal(7).astype(np.float32))
    writer.add_tensor("a.weight", generator.standard_normal((3, 5)).astype(np.float16))
    blocks = gguf.quantize(
        generator.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("b.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", generator.standard_normal((2, 3, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("gguf") / "sample.gguf")


def require_same(ours: GgufFile, reader: gguf.GGUFReader) -> None:
    """Every key and tensor as gguf-py reads it."""
    theirs = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.keys) == list(theirs)
    for key, field in theirs.items():
        assert ours.key_types[key] == field.types[0], key
        np.testing.assert_equal(plain(ours.keys[key]), field.contents(), err_msg=key)
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.encoding.ggml_type == tensor.tensor_type
        assert (info.offset, info.size_bytes) == (tensor.data_offset, tensor.n_bytes)


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_every_value_type_reads_as_gguf_py_reads_it(sample: Path) -> None:
    file = read_gguf_file(sample)
    require_same(file, gguf.GGUFReader(sample))
    assert file.architecture == "llama"
    assert file.scoped_keys()["context_length"] == 2**31
    types = {int(kind) for kind in file.key_types.values()}
    assert types == {int(kind) for kind in ValueType}
    assert file.keys["llama.rope.freq_base"] == np.float32(2.2)


def test_tensor_bytes_equal_gguf_pys(sample: Path) -> None:
    file = read_gguf_file(sample)
    for tensor in gguf.GGUFReader(sample).tensors:
        ours = file.tensor(tensor.name)
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(ours.rows, -1)
        np.testing.assert_array_equal(ours.read_rows(0, ours.rows), raw)
        np.testing.assert_array_equal(ours.read_rows(ours.rows - 1, ours.rows), raw[-1:])


def test_the_default_model_reads_as_gguf_py_reads_it(default_gguf: Path) -> None:
    file = read_gguf_file(default_gguf)
    require_same(file, gguf.GGUFReader(default_gguf))
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"].encoding.name == "q8_0"


def patched(sample: Path, tmp_path: Path, edit: Callable[[bytearray], Any]) -> Path:
    data = bytearray(sample.read_bytes())
    edit(data)
    path = tmp_path / "patched.gguf"
    path.write_bytes(data)
    return path


def replace(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        start = data.index(old)
        data[start : start + len(old)] = new

    return edit


def tensor_field(name: str, axes: int, layout: str, after_shape: int, value: int) -> Any:
    """Overwrites the type (offset 0) or offset (offset 4) of a tensor info."""

    def edit(data: bytearray) -> None:
        start = data.index(name.encode()) + len(name) + 4 + 8 * axes + after_shape
        struct.pack_into(layout, data, start, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (replace(b"GGUF", b"GGML"), SourceError, "starts with"),
        (lambda d: struct.pack_into("<I", d, 4, 1), UnsupportedError, "version 1"),
        (lambda d: struct.pack_into(">I", d, 4, 3), UnsupportedError, "big-endian"),
        (lambda d: struct.pack_into("<Q", d, 8, 2**62), SourceError, "tensors are announced"),
        (lambda d: struct.pack_into("<Q", d, 16, 2**62), SourceError, "keys are announced"),
        (replace(b"t.i8", b"t.u8"), SourceError, "key 't.u8' is repeated"),
        (replace("ü".encode(), b"\xff\xfe"), SourceError, "not UTF-8"),
        (replace(b"a.weight", b"b.weight"), SourceError, "b.weight is repeated"),
        (tensor_field("a.weight", 2, "<I", 0, 4), UnsupportedError, "a.weight: tensor type 4"),
        (tensor_field("a.weight", 2, "<I", 0, 12), UnsupportedError, "q4_k blocks"),
        (tensor_field("a.weight", 2, "<Q", 4, 0), SourceError, "overlaps"),
        (tensor_field("a.weight", 2, "<Q", 4, 33), SourceError, "no multiple of 32"),
        (tensor_field("a.weight", 2, "<Q", 4, 1 << 40), SourceError, "of a file of"),
        (lambda d: d.__delitem__(slice(len(d) - 100, None)), SourceError, "of a file of"),
        (lambda d: d.__delitem__(slice(120, None)), SourceError, "is damaged"),
        (lambda d: d.clear(), SourceError, "magic number"),
    ],
)
def test_each_lie_is_named(
    sample: Path, tmp_path: Path, edit: Any, error: type[ConvertError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_gguf_file(patched(sample, tmp_path, edit))


def test_a_lying_array_length_is_refused_before_anything_is_allocated(
    sample: Path, tmp_path: Path
) -> None:
    def edit(data: bytearray) -> None:
        start = data.index(b"t.numbers") + len("t.numbers") + 4 + 4
        struct.pack_into("<Q", data, start, 2**61)

    path = patched(sample, tmp_path, edit)
    with pytest.raises(SourceError, match=r"values of t\.numbers are announced"):
        read_gguf_file(path)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_gguf_file(tmp_path / "none.gguf")
    with pytest.raises(SourceError, match="directory"):
        read_gguf_file(tmp_path)


def test_a_file_that_shrinks_while_read_is_an_error(sample: Path, tmp_path: Path) -> None:
    path = patched(sample, tmp_path, lambda data: None)
    tensor = read_gguf_file(path).tensor("c.weight")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 90)
    with pytest.raises(SourceError, match="became shorter"):
        tensor.read_rows(0, tensor.rows)


HEADER_MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)),
            st.integers(0, 80).map(lambda n: struct.pack("<I", n)),
        ),
    ),
    min_size=1,
    max_size=3,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(mutations=HEADER_MUTATIONS, cut=st.one_of(st.none(), st.floats(0, 1)))
def test_a_mutated_header_is_an_error_or_a_right_result(
    sample: Path, tmp_path: Path, mutations: list[tuple[float, bytes]], cut: float | None
) -> None:
    data = bytearray(sample.read_bytes())
    header_bytes = read_gguf_file(sample).data_offset
    for place, value in mutations:
        start = int(place * header_bytes)
        data[start : start + len(value)] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = read_gguf_file(path)
    except ConvertError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= READ_AHEAD + PER_BYTE * len(data)
    try:
        reader = gguf.GGUFReader(path)
    except (KeyError, ValueError, OSError, UnicodeDecodeError, OverflowError):
        return
    require_same(file, reader)
