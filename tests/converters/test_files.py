"""Files are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from converters.errors import OutputError
from converters.files import (
    atomic_file,
    atomic_files,
    atomic_folder,
    require_free_space,
    sha256_file,
)


def partials(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "partial" in p.name]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.gguf"
    with atomic_file(target, force=False) as partial:
        partial.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert partials(target.parent) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_file(target, force=True) as partial:
        partial.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert partials(tmp_path) == []


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists") as refused, atomic_file(target, force=False):
        pytest.fail("the body ran")
    assert "--force" in refused.value.hint
    assert target.read_bytes() == b"old"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    with pytest.raises(OutputError, match="No space left"), atomic_file(target, force=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    (tmp_path / ".x.gguf.pi-convert-partial").write_bytes(b"half")  # the lock died with the run
    with atomic_file(target, force=False) as partial:
        assert partial.read_bytes() == b""
        partial.write_bytes(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_second_run_on_one_output_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    with atomic_file(target, force=False) as partial:
        partial.write_bytes(b"first")
        with pytest.raises(OutputError, match="another run"), atomic_file(target, force=True):
            pytest.fail("the body ran")
    assert target.read_bytes() == b"first"


def test_all_outputs_of_a_run_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(b"old")
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == paths[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError), atomic_files(paths, force=True) as partials:
        for partial in partials:
            partial.write_bytes(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert paths[0].read_bytes() == b"old"


def test_a_folder_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".m.replaced.pi-convert-partial"
    aside.mkdir()
    (aside / "old").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "m", force=True):
        raise ValueError("stop")
    assert (tmp_path / "m" / "old").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError, match="half"), atomic_folder(target, force=True) as partial:
        (partial / "new").write_text("half")
        raise ValueError("half")
    assert [p.name for p in target.iterdir()] == ["old"]
    with atomic_folder(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert partials(tmp_path) == []


def test_free_space_is_asked_first(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1)
    with pytest.raises(OutputError, match="MiB free"):
        require_free_space(tmp_path, 1 << 60)


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
