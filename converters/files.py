"""Files that are whole or not there: a temporary sibling, fsync, rename; and hashing.

At most one temporary output is left behind by a process that was killed; the next run removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.errors import OutputError

_SUFFIX = ".pi-convert-partial"
_HASH_CHUNK_BYTES = 8 << 20


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_free_space(folder: Path, size_bytes: int) -> None:
    """Raises ``OutputError`` unless ``folder`` has room for ``size_bytes`` more."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise OutputError(
            f"{folder}: {size_bytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB free",
            hint="Free some space or give another --out.",
        )


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises ``OutputError`` where ``path`` exists and ``force`` is not given."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists", hint="Give --force to replace it.")


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling to write to; on success it is fsynced and becomes ``path``.

    On any error, Ctrl-C included, the sibling is removed and what stood at ``path`` stays.
    """
    refuse_existing(path, force=force)
    partial = _prepare(path)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        _remove(partial)
        raise _explain(error, path) from error
    except BaseException:
        _remove(partial)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """As ``atomic_file`` for a folder. A folder that is replaced is removed after the swap."""
    refuse_existing(path, force=force)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", hint="Give another --out.")
    partial = _prepare(path)
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        _swap(partial, path)
        _sync(path.parent)
    except OSError as error:
        _remove(partial)
        raise _explain(error, path) from error
    except BaseException:
        _remove(partial)
        raise


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.replaced{_SUFFIX}")
    _remove(old)
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _prepare(path: Path) -> Path:
    partial = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
    except OSError as error:
        raise _explain(error, path) from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} is not writable", hint="Give another --out.")
    return partial


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, path: Path) -> OutputError:
    return OutputError(
        f"{path}: {error.strerror or error}", hint="Nothing was written; what was there is whole."
    )
