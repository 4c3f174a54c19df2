"""Headers that are written: gguf-py, ggml's own types and our strict reader must read them back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.containers.gguf import ValueType, read_gguf_file
from converters.containers.gguf_header import encode_key, lay_out
from converters.encodings import ENCODINGS, F32
from converters.errors import OutputError, UnsupportedError

FLOAT32 = st.floats(width=32, allow_nan=False)
SCALARS = st.one_of(
    st.text(max_size=12),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**63), -1),
    st.integers(2**32, 2**64 - 1),
    FLOAT32,
)
ARRAYS = st.one_of(
    st.lists(st.text(max_size=6), max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(FLOAT32, min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
KEYS = st.dictionaries(st.text("abc.de_", min_size=1, max_size=9), SCALARS | ARRAYS, max_size=6)


def write(path: Path, keys: dict[str, object]) -> Path:
    encoded = {"general.architecture": encode_key("general.architecture", "llama")}
    encoded |= {key: encode_key(key, value) for key, value in keys.items()}
    layout = lay_out(encoded, [("a.weight", (2, 3, 32), F32), ("b", (5,), F32)])
    path.write_bytes(layout.header + bytes(layout.size_bytes - len(layout.header)))
    return path


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(keys=KEYS)
def test_any_key_reads_back(tmp_path: Path, keys: dict[str, object]) -> None:
    path = write(tmp_path / "keys.gguf", keys)
    file, reader = read_gguf_file(path), gguf.GGUFReader(path)
    for key, value in keys.items():
        assert plain(file.keys[key]) == value
        if value != []:  # gguf-py cannot give the contents of an empty array
            assert reader.fields[key].contents() == value
    assert [t.name for t in reader.tensors] == ["a.weight", "b"]
    assert [t.data_offset for t in reader.tensors] == [t.offset for t in file.tensors.values()]


def test_types_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    keys = {
        "u32": 7, "f32": 2.0, "bool": True, "string": "s", "strings": ["a"], "i32s": [1, 3],
        "f32s": [0.5], "i64": -1, "u64": 2**63, "wide": np.array([1], np.uint16),
    }  # fmt: skip
    fields = gguf.GGUFReader(write(tmp_path / "types.gguf", keys)).fields
    found = {key: [int(kind) for kind in fields[key].types] for key in keys}
    array = ValueType.ARRAY
    assert found == {
        "u32": [ValueType.UINT32],
        "f32": [ValueType.FLOAT32],
        "bool": [ValueType.BOOL],
        "string": [ValueType.STRING],
        "strings": [array, ValueType.STRING],
        "i32s": [array, ValueType.INT32],
        "f32s": [array, ValueType.FLOAT32],
        "i64": [ValueType.INT64],
        "u64": [ValueType.UINT64],
        "wide": [array, ValueType.UINT16],
    }


def test_the_same_bytes_as_gguf_pys_writer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.context_length", 8192)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", ""])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 4])
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("x.weight", values)
    writer.add_tensor("norm.weight", values[0, :7].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys = {
        "general.architecture": "llama",
        "llama.context_length": 8192,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "Ġb", ""],
        "tokenizer.ggml.token_type": [1, 3, 4],
    }
    layout = lay_out(
        {key: encode_key(key, value) for key, value in keys.items()},
        [("x.weight", (3, 32), F32), ("norm.weight", (7,), F32)],
    )
    theirs = (tmp_path / "theirs.gguf").read_bytes()
    assert theirs[: len(layout.header)] == layout.header
    assert len(theirs) == layout.size_bytes


def test_what_no_file_could_hold_is_refused() -> None:
    with pytest.raises(OutputError, match="names of 63 bytes"):
        lay_out({}, [("n" * 64, (1,), F32)])
    with pytest.raises(UnsupportedError, match="does not divide"):
        lay_out({}, [("n", (2, 100), ENCODINGS["q4_k"])])
    with pytest.raises(TypeError, match="no GGUF type"):
        encode_key("k", None)
