"""Files are whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from converters import files
from converters.errors import OutputError
from converters.files import (
    atomic_file,
    atomic_files,
    atomic_folder,
    require_free_space,
    sha256_file,
)

WRITE_WHEN_STDIN_ENDS = """
import sys
from pathlib import Path
from converters import files
with getattr(files, sys.argv[1])(Path(sys.argv[2]), force=True) as partial:
    file = partial / "x" if partial.is_dir() else partial
    file.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
    file.write_bytes(b"whole")
"""


def another_run(kind: str, target: Path) -> subprocess.Popen[str]:
    """A process that is in the midst of writing ``target``; it ends when its stdin does."""
    run = subprocess.Popen(
        [sys.executable, "-c", WRITE_WHEN_STDIN_ENDS, kind, str(target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "writing\n"
    return run


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def partials(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "partial" in p.name]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.gguf"
    with atomic_file(target, force=False) as partial:
        partial.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert partials(target.parent) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.EIO, "EIO")])
@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_an_error_leaves_none_of_the_folders_that_were_made(
    tmp_path: Path, kind: str, error: type[BaseException]
) -> None:
    (tmp_path / "mine").mkdir()
    target = tmp_path / "mine" / "b" / "c" / "x"
    with pytest.raises(BaseException), getattr(files, kind)(target, force=False):  # noqa: B017, PT011
        assert target.parent.is_dir()  # negative control
        raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_folders_that_somebody_else_uses_by_now_stay(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x"
    with pytest.raises(ValueError, match="stop"), atomic_file(target, force=False):
        (tmp_path / "a" / "theirs").write_text("theirs")
        raise ValueError("stop")
    assert contents(tmp_path / "a") == {"theirs": "theirs"}


def test_ctrl_c_amid_making_folders_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def interrupted(self: Path, mode: int = 0o777) -> None:
        mkdir(self, mode)
        if self.name == "b":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    target = tmp_path / "a" / "b" / "c" / "x"
    with pytest.raises(KeyboardInterrupt), atomic_file(target, force=False):
        pytest.fail("the body ran")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_above_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    target = tmp_path / "file" / "deep" / "x"
    refused = pytest.raises(OutputError, match=f"{target}: Not a directory")
    with refused, atomic_file(target, force=False):
        pytest.fail("the body ran")


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_what_is_said_of_the_partial_names_the_output(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    with pytest.raises(OutputError) as raised, getattr(files, kind)(target, force=False) as partial:
        assert ".pi-convert-partial" in str(partial)  # negative control
        raise OutputError(f"{partial}/config.json: wrong", hint=f"See {partial.name}.")
    assert raised.value.message == str(raised.value.args[0]) == f"{target}/config.json: wrong"
    assert raised.value.hint == "See x."
    inside = [OSError(errno.EIO, "I/O error", str(partial / "y")), OSError(errno.EIO, "I/O error")]
    for error in inside:
        with pytest.raises(OutputError) as raised, getattr(files, kind)(target, force=False):
            raise error
        assert str(target) in raised.value.message
        assert "partial" not in str(raised.value)


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


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_a_second_process_is_refused_and_harms_nothing(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    run = another_run(kind, target)
    refused = pytest.raises(OutputError, match=f"another run is writing {target}")
    with refused as error, getattr(files, kind)(target, force=True):
        pytest.fail("the body ran")
    assert "--out" in error.value.hint
    assert len(partials(tmp_path)) == 1  # the first run's
    run.communicate()
    assert run.returncode == 0
    assert (target if kind == "atomic_file" else target / "x").read_text() == "whole"
    assert partials(tmp_path) == []


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_the_lock_dies_with_a_killed_process(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    run = another_run(kind, target)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert len(partials(tmp_path)) == 1
    with getattr(files, kind)(target, force=False) as partial:
        assert (list(partial.iterdir()) if partial.is_dir() else partial.read_text()) in ([], "")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_another_run_finished_meanwhile_needs_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.gguf"
    monkeypatch.setattr(files, "_lock", lambda descriptor, path: path.write_text("theirs"))
    with pytest.raises(OutputError, match="exists"), atomic_file(target, force=False):
        pytest.fail("the body ran")
    assert contents(tmp_path) == {"x.gguf": "theirs"}


def fail_at_rename(
    monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, *, after: bool
) -> None:
    """The rename of that number raises ``error``, before or after it was done."""
    count = 0

    def wrapped(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def rename(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count != number:
                return real(self, target)
            if after:
                real(self, target)
            raise error

        return rename

    monkeypatch.setattr(Path, "rename", wrapped(Path.rename))
    monkeypatch.setattr(Path, "replace", wrapped(Path.replace))


FAILURES = {
    "ctrl-c": (KeyboardInterrupt(), KeyboardInterrupt),
    "error": (OSError(errno.EIO, os.strerror(errno.EIO)), OutputError),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_failure_at_any_rename_keeps_every_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, failure: str, after: bool,
    links: bool,
) -> None:  # fmt: skip
    old = {"a": "old a", "c": "old c"}  # nothing at b
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **k: Path("/nowhere").stat())
    error, expected = FAILURES[failure]
    with pytest.raises(expected), atomic_files([tmp_path / n for n in "abc"], force=True) as made:
        for partial in made:
            partial.write_text("new")
        fail_at_rename(monkeypatch, number, error, after=after)
    assert contents(tmp_path) == old


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_in_the_swap_of_folders_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, failure: str, after: bool
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "x").write_text("old")
    error, expected = FAILURES[failure]
    with pytest.raises(expected), atomic_folder(target, force=True) as partial:
        (partial / "x").write_text("new")
        fail_at_rename(monkeypatch, number, error, after=after)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert contents(target) == {"x": "old"}


def test_several_files_appear_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with atomic_files([tmp_path / "a", tmp_path / "b"], force=True) as made:
        for partial in made:
            partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert contents(tmp_path) == {"a": "new", "b": "new"}


def test_what_a_killed_run_had_replaced_is_removed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("new")
    (tmp_path / ".x.replaced.pi-convert-partial").write_text("old")
    with atomic_file(tmp_path / "x", force=True) as partial:
        partial.write_text("newer")
    assert contents(tmp_path) == {"x": "newer"}


def test_a_rollback_that_fails_says_where_the_old_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    aside = tmp_path / ".model.replaced.pi-convert-partial"
    error, expected = FAILURES["error"]
    with (
        pytest.raises(expected, match="not moved back") as raised,
        atomic_folder(target, force=True),
    ):
        fail_at_rename(monkeypatch, 2, error, after=False)
        monkeypatch.setattr(files, "_rolled_back", lambda output, had_old: False)
    assert str(aside) in str(raised.value)
    assert "Nothing was written" not in str(raised.value)
    assert aside.is_dir()


def test_fsync_failing_after_the_rename_says_that_the_file_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = files._sync

    def fail_for_the_folder(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(files, "_sync", fail_for_the_folder)
    in_place = pytest.raises(OutputError, match="in place and whole")
    with in_place as error, atomic_file(tmp_path / "x", force=False) as partial:
        partial.write_text("new")
    assert "Nothing was written" not in str(error.value)
    assert contents(tmp_path) == {"x": "new"}


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/source.safetensors"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError("libggml.so: cannot open shared object file"),
    ],
    ids=["source", "pipe", "library"],
)
def test_an_error_of_something_else_is_raised_as_it_is(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "x", force=False):  # noqa: PT011
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_asked_first(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1)
    with pytest.raises(OutputError, match="MiB free"):
        require_free_space(tmp_path, 1 << 60)
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match=f"{tmp_path}/not/there: .* MiB free"):
        require_free_space(tmp_path / "not" / "there", 1 << 60)


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
