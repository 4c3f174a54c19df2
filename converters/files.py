"""Files that are whole or not there: a temporary sibling, fsync, rename; and hashing.

The temporary sibling is locked while a run writes to it, so that a second run on the same output is
refused. A process that was killed leaves at most one such sibling per output, and it leaves no
lock; the next run removes it, and moves back what the killed one had just set aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from converters.errors import ConvertError, OutputError, os_hint

_log = logging.getLogger(__name__)
_SUFFIX = ".pi-convert-partial"
_HASH_CHUNK_BYTES = 8 << 20
_AT_ONCE = 4  # files
_OTHER_OUT = "Give another --out."


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def synced(paths: Sequence[Path]) -> Iterator[None]:
    """Files go to the disk while the block runs, and are there when it ends."""
    with ThreadPoolExecutor(max(1, min(len(paths), _AT_ONCE))) as pool:
        jobs = [pool.submit(_sync, path) for path in paths]
        yield
        for job in jobs:
            job.result()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file in hex."""
    with ThreadPoolExecutor(max(1, min(len(paths), _AT_ONCE))) as pool:
        return list(pool.map(sha256_file, paths))


def sync_and_hash(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file in hex, taken while the disk is busy with it."""
    with synced(paths):
        return hash_files(paths)


@contextlib.contextmanager
def sized_file(path: Path, size_bytes: int) -> Iterator[int]:
    """A descriptor to write to of a file of ``size_bytes``, all of it a hole where it is new."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


def require_free_space(folder: Path, size_bytes: int) -> None:
    """Raises ``OutputError`` unless ``folder``, there or yet to be made, has room for that."""
    free = shutil.disk_usage(_nearest(folder)).free
    if free < size_bytes:
        raise OutputError(
            f"{folder}: {size_bytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB free",
            hint="Free some space or give another --out.",
        )


def require_makable(folder: Path) -> None:
    """Raises ``OutputError`` unless ``folder`` is one to write to, or can be made where it lies."""
    there = _nearest(folder)
    start = "" if there == folder.absolute() else f"{folder}: "
    if not there.is_dir():
        raise OutputError(f"{start}{there} is no folder", hint=_OTHER_OUT)
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{start}{there} is not writable", hint=_OTHER_OUT)


def _nearest(path: Path) -> Path:
    """``path`` or the nearest one above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises ``OutputError`` where ``path`` exists and ``force`` is not given."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists", hint="Give --force to replace it, or write elsewhere.")


def require_replaceable(output: Output, *, force: bool) -> None:
    """Raises ``OutputError`` where ``output`` exists without ``force``, or as another kind."""
    refuse_existing(output.path, force=force)
    if output.path.exists() and output.path.is_dir() is not output.is_folder:
        kind = "file" if output.is_folder else "folder"
        raise OutputError(f"{output.path} is a {kind}", hint=_OTHER_OUT)


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool) -> Iterator[Path]:
    """An empty temporary sibling to write to; on success it is fsynced and becomes ``path``.

    Write into the sibling, do not replace it: it carries the lock. On any error, Ctrl-C included,
    it is removed and what stood at ``path`` stays. Raises ``OutputError`` where another run is
    writing ``path``, and in place of an ``OSError`` that is about the output.
    """
    with atomic_files([path], force=force) as (partial,):
        yield partial


@contextlib.contextmanager
def atomic_files(paths: Sequence[Path], *, force: bool) -> Iterator[list[Path]]:
    """As ``atomic_file`` for several: either all of them get their names or none does."""
    with atomic_outputs([Output(path) for path in paths], force=force) as partials:
        yield partials


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """As ``atomic_file`` for a folder. A folder that is replaced is removed after the swap."""
    with atomic_outputs([Output(path, is_folder=True)], force=force) as (partial,):
        yield partial


@dataclass(frozen=True, slots=True)
class Output:
    """A file or folder to write. A run writes into ``partial``, which becomes ``path``."""

    path: Path
    is_folder: bool = False

    @property
    def partial(self) -> Path:
        """The temporary sibling."""
        return self.path.with_name(f".{self.path.name}{_SUFFIX}")

    @property
    def replaced(self) -> Path:
        """Where the old one waits until all outputs of the run have their names."""
        return self.path.with_name(f".{self.path.name}.replaced{_SUFFIX}")


@contextlib.contextmanager
def atomic_outputs(outputs: Sequence[Output], *, force: bool) -> Iterator[list[Path]]:
    """As ``atomic_files`` and ``atomic_folder`` for any number of both: all of them or none."""
    for output in outputs:
        require_replaceable(output, force=force)
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(_claimed(output))
            refuse_existing(output.path, force=force)  # another run may just have finished it
        try:
            yield [output.partial for output in outputs]
            for output in outputs:
                _sync_all(output.partial)
            _commit(outputs)
        except OSError as error:
            place = _place_of(error, outputs)
            if place is None:
                raise
            raise _explain(error, place) from error
        except ConvertError as error:
            _name_outputs(error, outputs)
            raise
        _settle(outputs)


@contextlib.contextmanager
def _claimed(output: Output) -> Iterator[None]:
    """The partial, empty and locked; removed at the end unless it has become the output."""
    with _folders_above(output):
        try:
            descriptor = _open_locked(output)
        except OSError as error:
            raise _explain(error, output.path) from error
        try:
            try:
                _recover(output)
                _empty(output.partial, descriptor)
            except OSError as error:
                raise _explain(error, output.path) from error
            yield
        finally:
            _release(output, descriptor)


def _release(output: Output, descriptor: int) -> None:
    try:
        if _is_at(descriptor, output.partial):
            _remove(output.partial)
    except OSError as error:  # such as a disk that became read-only; the next run removes it
        _log.warning("%s is left behind: %s", output.partial, error.strerror)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folders_above(output: Output) -> Iterator[None]:
    """The folders that ``output`` stands in; on any error those made here are removed again."""
    parent = output.path.parent
    made: list[Path] = []
    try:
        try:
            _make_folders(parent, made)
            if not os.access(parent, os.W_OK):
                raise OutputError(f"{parent} is not writable", hint=_OTHER_OUT)
        except OSError as error:
            raise _explain(error, output.path) from error
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # something else has been put there meanwhile
                folder.rmdir()
        raise


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Makes ``folder`` and those above it; what was made is in ``made`` whenever Ctrl-C comes."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for child in reversed(missing):
        made.append(child)
        try:
            child.mkdir()
        except FileExistsError:  # by another run just now, so it is not ours to remove
            made.remove(child)
            if not child.is_dir():
                raise


def _open_locked(output: Output) -> int:
    while True:
        if output.is_folder:
            output.partial.mkdir(exist_ok=True)
            flags = os.O_RDONLY | os.O_DIRECTORY
        else:
            flags = os.O_RDWR | os.O_CREAT
        descriptor = os.open(output.partial, flags | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, output.path)
            if _is_at(descriptor, output.partial):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a run that has just ended renamed or removed it: open the next


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run is writing {path}", hint="Wait for it to end, or give another --out."
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s: no lock (%s); let no second run write it", path, error.strerror)


def _recover(output: Output) -> None:
    """Clears up after a run that was killed amid its renames."""
    if not os.path.lexists(output.replaced):
        return
    if not os.path.lexists(output.path):
        output.replaced.rename(output.path)
        return
    descriptor = os.open(output.path, os.O_RDONLY)
    try:
        _lock(descriptor, output.path)  # held by a run that may still move the old one back
    finally:
        os.close(descriptor)
    _remove(output.replaced)


def _commit(outputs: Sequence[Output]) -> None:
    """Gives all outputs their names; on any error, Ctrl-C included, all old ones stay."""
    replacing = {output for output in outputs if os.path.lexists(output.path)}
    try:
        for output in outputs:
            # One file is replaced by one rename, so nothing needs to be set aside.
            if output in replacing and (output.is_folder or len(outputs) > 1):
                _set_aside(output)
            output.partial.replace(output.path)
    except BaseException as error:
        stuck = [o for o in reversed(outputs) if not _rolled_back(o, had_old=o in replacing)]
        if stuck:
            raise OutputError(
                f"{error!r}, and not moved back: "
                + ", ".join(f"{o.replaced} to {o.path}" for o in stuck),
                hint="Rename them by hand, or run again: the next run does it first.",
            ) from error
        raise


def _set_aside(output: Output) -> None:
    if not output.is_folder:
        # A second name, so that there is no moment without a file at the path.
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(output.path, output.replaced, follow_symlinks=False)
            return
    output.path.rename(output.replaced)


def _rolled_back(output: Output, *, had_old: bool) -> bool:
    """Puts the old one back, told by what is where: Ctrl-C may have come between any two steps."""
    set_aside = os.path.lexists(output.replaced)
    try:
        if (set_aside or not had_old) and not os.path.lexists(output.partial):
            output.path.rename(output.partial)
        if set_aside:
            output.replaced.replace(output.path)
            output.replaced.unlink(missing_ok=True)  # stays where both were names of one file
    except OSError:
        return False
    return True


def _settle(outputs: Sequence[Output]) -> None:
    """Makes the new names durable, then drops the old files."""
    try:
        try:
            for folder in {output.path.parent for output in outputs}:
                _sync(folder)
        finally:
            for output in outputs:
                _remove(output.replaced)
    except OSError as error:
        names = ", ".join(str(output.path) for output in outputs)
        raise OutputError(
            f"{names}: in place and whole, but the last step failed: {error.strerror or error}",
            hint="Check the disk: a power cut may bring back what was there before.",
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _empty(partial: Path, descriptor: int) -> None:
    if partial.is_dir():
        for child in partial.iterdir():
            _remove(child)
    else:
        os.ftruncate(descriptor, 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    for file in (*path.rglob("*"), path):
        _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place_of(error: OSError, outputs: Sequence[Output]) -> Path | None:
    """The output that an error is about; None for one of a source, a pipe or a library.

    Errors of writing to a descriptor name no file; the sources name theirs, or raise
    ``SourceError``.
    """
    if error.errno is None or isinstance(error, ConnectionError):
        return None
    if not isinstance(error.filename, str | os.PathLike):
        return outputs[0].path if len(outputs) == 1 else outputs[0].path.parent
    named = Path(error.filename).absolute()
    for output in outputs:
        path = output.path.absolute()
        siblings = (output.partial.absolute(), output.replaced.absolute())
        if named in (path, path.parent) or any(map(named.is_relative_to, siblings)):
            return output.path
    return None


def _name_outputs(error: ConvertError, outputs: Sequence[Output]) -> None:
    """Puts an output's name where what was raised names its partial, which is gone by then."""
    for output in outputs:
        error.message, error.hint = _named(error.message, output), _named(error.hint, output)
    error.args = (error.message,)


def _named(text: str, output: Output) -> str:
    return text.replace(output.partial.name, output.path.name)


def _explain(error: OSError, path: Path) -> OutputError:
    output = Output(path, is_folder=False)
    named = _named(str(error.filename or path), output)
    about = "" if named == str(path) else f" ({named})"
    return OutputError(
        f"{path}: {error.strerror or error}{about}",
        hint=f"Nothing was written; what was there is whole. {os_hint(error, _OTHER_OUT)}",
    )
