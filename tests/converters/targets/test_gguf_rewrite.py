"""``rewrite_gguf``: other keys, every other byte as it was."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Type

from converters.containers.gguf import read_gguf_file
from converters.errors import OutputError, SourceError
from converters.targets.gguf import rewrite as rewriting
from converters.targets.gguf.rewrite import rewrite_gguf
from tests.headers import LINEAR, PLAIN, write_header

FACTOR = "llama.rope.scaling.factor"
CONTEXT = "llama.context_length"
# Every value type, none of which a rewrite may touch.
ODDITIES: dict[str, tuple[Any, Type, tuple[Type, ...]]] = {
    "odd.u8": (7, Type.UINT8, ()),
    "odd.i64": (-(2**40), Type.INT64, ()),
    "odd.f64": (0.1, Type.FLOAT64, ()),
    "odd.nan": (float("nan"), Type.FLOAT32, ()),
    "odd.strings": (["", "ä", "x" * 300], Type.ARRAY, (Type.STRING,)),
    "odd.floats": ([float("nan"), 1.5], Type.ARRAY, (Type.FLOAT32,)),
    "odd.bools": ([True, False], Type.ARRAY, (Type.BOOL,)),
}


@pytest.fixture
def odd_file(tmp_path: Path) -> Path:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    writer.add_uint32(CONTEXT, 128)
    for key, (value, kind, element) in ODDITIES.items():
        writer.add_key_value(key, value, kind, *element)
    writer.add_string("last", "key")
    random = np.random.default_rng(3)
    for index, shape in enumerate([(5,), (3, 7), (64, 32)]):
        writer.add_tensor(f"t{index}", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def value(reader: gguf.GGUFReader, key: str) -> object:
    return reader.get_field(key).contents()


def raw_key(reader: gguf.GGUFReader, key: str) -> bytes:
    return b"".join(part.tobytes() for part in reader.fields[key].parts)


def own_keys(reader: gguf.GGUFReader) -> list[str]:
    return [key for key in reader.fields if not key.startswith("GGUF.")]


def test_only_what_was_asked_changes(odd_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = rewrite_gguf(read_gguf_file(odd_file), out, {CONTEXT: 1024, FACTOR: 2.2})
    before, after = gguf.GGUFReader(odd_file), gguf.GGUFReader(out)
    assert value(after, CONTEXT) == 1024
    assert value(after, FACTOR) == np.float32(2.2)
    assert after.fields[CONTEXT].types == [Type.UINT32]
    assert after.fields[FACTOR].types == [Type.FLOAT32]
    kept = [key for key in own_keys(before) if key != CONTEXT]
    assert [raw_key(after, key) for key in kept] == [raw_key(before, key) for key in kept]
    order = own_keys(after)
    assert order.index(FACTOR) == order.index(CONTEXT) + 1
    assert [key for key in order if key != FACTOR] == own_keys(before)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, list(old.shape)) == (new.name, list(new.shape))
        assert new.data_offset % 128 == 0
        np.testing.assert_array_equal(old.data, new.data)
        assert result.tensor_hashes[old.name] == hashlib.sha256(old.data.tobytes()).hexdigest()
    assert result.size_bytes == out.stat().st_size
    assert {change.key: (change.before, change.after) for change in result.changes} == {
        CONTEXT: (128, 1024),
        FACTOR: (None, 2.2),
    }


def test_keys_are_removed_and_nothing_changed_is_the_same_file(tmp_path: Path) -> None:
    source = write_header(tmp_path / "a.gguf", keys=LINEAR)
    same = rewrite_gguf(read_gguf_file(source), tmp_path / "b.gguf", {FACTOR: 8.0})
    assert same.changes == ()
    assert same.path.read_bytes() == source.read_bytes()
    rewrite_gguf(read_gguf_file(source), tmp_path / "c.gguf", {FACTOR: None, "llama.no": None})
    assert FACTOR not in gguf.GGUFReader(tmp_path / "c.gguf").fields


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    source = read_gguf_file(write_header(tmp_path / "a.gguf"))
    changes = {CONTEXT: 512, "llama.rope.scaling.type": "linear", FACTOR: 4.0, "general.x": True}
    outs = [rewrite_gguf(source, tmp_path / f"{i}.gguf", changes).path for i in range(2)]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_trailing_bytes_are_kept(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes() + b"more")
    out = rewrite_gguf(read_gguf_file(path), tmp_path / "b.gguf", {CONTEXT: 64}).path
    assert out.read_bytes().endswith(b"more")


def test_bytes_are_written_where_the_kernel_cannot_copy(
    odd_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_gguf_file(odd_file)
    direct = rewrite_gguf(source, tmp_path / "kernel.gguf", {CONTEXT: 64}).path.read_bytes()

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert rewrite_gguf(source, tmp_path / "x.gguf", {CONTEXT: 64}).path.read_bytes() == direct


def test_a_damaged_copy_is_found_and_removed(
    odd_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one flipped bit of one weight."""
    real = rewriting._copy

    def flip(reader: int, writer: int, *rest: Any) -> None:
        real(reader, writer, *rest)
        end = os.lseek(writer, 0, os.SEEK_CUR)
        with os.fdopen(os.dup(writer), "r+b") as file:
            file.seek(end - 1)
            file.write(b"\x01")

    monkeypatch.setattr(rewriting, "_copy", flip)
    with pytest.raises(OutputError, match="t2 differs"):
        rewrite_gguf(read_gguf_file(odd_file), tmp_path / "out.gguf", {CONTEXT: 64})
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf", keys=PLAIN)
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(OutputError, match="file to repair"):
            rewrite_gguf(read_gguf_file(path), out, {CONTEXT: 64}, force=True)


def test_an_existing_output_stays_without_force(tmp_path: Path) -> None:
    source = read_gguf_file(write_header(tmp_path / "a.gguf"))
    out = tmp_path / "b.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        rewrite_gguf(source, out, {CONTEXT: 64})
    assert out.read_bytes() == b"mine"
    rewrite_gguf(source, out, {CONTEXT: 64}, force=True)
    assert gguf.GGUFReader(out).get_field(CONTEXT).contents() == 64


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    source = read_gguf_file(write_header(tmp_path / "a.gguf"))
    with pytest.raises(OutputError, match="32 bits"):
        rewrite_gguf(source, tmp_path / "b.gguf", {CONTEXT: 2**32})
    with pytest.raises(ValueError, match="alignment"):
        rewrite_gguf(source, tmp_path / "b.gguf", {"general.alignment": 64})
    assert not (tmp_path / "b.gguf").exists()


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    source = read_gguf_file(path)
    os.truncate(path, source.size_bytes - 64)
    with pytest.raises(SourceError, match="missing at the end"):
        rewrite_gguf(source, tmp_path / "b.gguf", {CONTEXT: 64})
    assert not (tmp_path / "b.gguf").exists()
