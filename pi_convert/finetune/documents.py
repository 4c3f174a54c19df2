"""Texts to train on: plain text, Markdown, JSONL, Parquet, folders of them, ``datasets`` folders.

Documents come in an order that never changes and one at a time, so that memory does not depend on
the size of the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from converters.errors import EnvironmentNotReadyError, SourceError
from converters.files import sha256_file
from converters.install import install_line
from converters.sources.huggingface import FINETUNE_RECORD, RECIPE, RUN
from pi_convert.evaluate.texts import TEXT_SUFFIXES

TEXT_KEY = "text"
_READ_TABLES = (".jsonl", ".parquet")
_OTHER_TABLES = (".json", ".csv", ".tsv")
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
_ROWS_AT_ONCE = 256


def text_files(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The files, and ``datasets`` folders, behind ``paths``; folders are walked in order.

    Folders of runs inside them are left out, ``out`` too; one that is linked to twice is read once.
    Raises ``SourceError`` where a path is not there or holds nothing that can be read.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SourceError(f"{path}: there is no such file", hint="Check the path.")
        if path.is_file() or _is_dataset(path):
            found.append(path)
            continue
        if not path.is_dir():
            raise SourceError(
                f"{path} is neither a file nor a folder",
                hint="The text is read more than once: write it to a file first.",
            )
        inside = [file for file in _inside(path, _unseen(out)) if _is_text(file)]
        if not inside:
            raise SourceError(
                f"{path}: no text in it",
                hint="Expected .txt, .md, .jsonl or .parquet files, or a datasets folder; runs of"
                " finetune are left out.",
            )
        found += inside
    if not found:
        raise SourceError("no text was given", hint="Give --text PATH, a file or a folder.")
    return found


def passed_over(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Files in the folders among ``paths`` that ``text_files`` leaves out for their names."""
    folders = [path for path in paths if path.is_dir() and not _is_dataset(path)]
    inside = [file for folder in folders for file in _inside(folder, _unseen(out))]
    return [file for file in inside if not _is_text(file)]


def _unseen(out: Path | None) -> set[Path]:
    return {out.resolve()} if out else set()


def _inside(folder: Path, seen: set[Path]) -> list[Path]:
    """Files and ``datasets`` folders, at any depth, in order; ``seen`` are not walked."""
    if folder.resolve() in seen or _is_run(folder):
        return []
    seen.add(folder.resolve())
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += [path] if _is_dataset(path) else _inside(path, seen)
        elif path.is_file():
            found.append(path)
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 in hex over the bytes of every file, in order; names and places do not count."""
    digest = hashlib.sha256()
    for file in files:
        for part in sorted(file.rglob("*")) if file.is_dir() else [file]:
            if part.is_file():
                digest.update(bytes.fromhex(sha256_file(part)))
    return digest.hexdigest()


def documents(files: Sequence[Path]) -> Iterator[str]:
    """Every document that is not blank.

    Raises ``SourceError`` for a file that holds no text, and where all documents are blank.
    """
    found = False
    for file in files:
        for text in _read(file):
            if text.strip():
                found = True
                yield text
    if not found:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise SourceError(
            f"{files[0]}{more}: no text but white space", hint="Give files with text in them."
        )


def _read(file: Path) -> Iterator[str]:
    if file.is_dir():
        return _read_dataset(file)
    if file.suffix.lower() == ".parquet":
        return _read_parquet(file)
    if file.suffix.lower() == ".jsonl":
        return _read_jsonl(file)
    if file.suffix.lower() in _OTHER_TABLES:
        raise SourceError(
            f"{file} is a table, which would be read as one text",
            hint=f'Write it as JSONL, a line such as {{"{TEXT_KEY}": "..."}} for each text.',
        )
    return iter([_text(file)])


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file} is no UTF-8 text: {error}", hint="Give text files, or convert it first."
        ) from error
    if "\0" in text:
        raise SourceError(f"{file} is a binary file", hint="Give text files.")
    return text


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:  # a byte's newline; str.splitlines would cut inside strings
        yield from _rows(lines, file)


def _rows(lines: Iterable[bytes], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{file}, line {number}: {error}", hint="Expected one JSON object a line."
            ) from error
        text = row.get(TEXT_KEY) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise SourceError(
                f"{file}, line {number}: no string under {TEXT_KEY!r}",
                hint=f'Expected lines such as {{"{TEXT_KEY}": "..."}}.',
            )
        _require_characters(text, f"{file}, line {number}")
        yield text


def _require_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: half a surrogate pair, {text[error.start]!r}, is no character",
            hint="Write the text again from its source; it was cut inside a character.",
        ) from error


def _read_parquet(file: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        with pq.ParquetFile(file) as table:
            _require_column(table.schema_arrow.names, file)
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[TEXT_KEY]):
                yield from _strings(batch.column(0).to_pylist(), file)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, not of what is in the file
        raise SourceError(f"{file}: {error}", hint="Expected a whole Parquet file.") from error


def _read_dataset(folder: Path) -> Iterator[str]:
    try:
        import datasets
        import pyarrow as pa
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise SourceError(
            f"{folder} is no whole datasets folder: {error}",
            hint="Expected what Dataset.save_to_disk wrote.",
        ) from error
    splits = [loaded] if isinstance(loaded, datasets.Dataset) else [loaded[n] for n in loaded]
    for split in splits:
        _require_column(split.column_names, folder)
        for row in split:
            yield from _strings([row[TEXT_KEY]], folder)


def _strings(values: Sequence[object], where: Path) -> Iterator[str]:
    for value in values:
        if not isinstance(value, str):
            raise SourceError(
                f"{where}: {TEXT_KEY} holds {value!r:.60}", hint="Expected strings in it."
            )
        yield value


def _require_column(names: Sequence[str], where: Path) -> None:
    if TEXT_KEY not in names:
        raise SourceError(
            f"{where}: no column {TEXT_KEY!r} among {', '.join(names) or 'none'}",
            hint=f"Rename the column with the text to {TEXT_KEY!r}.",
        )


def _is_dataset(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _DATASET_MARKS)


def _is_run(folder: Path) -> bool:
    """Whether ``finetune`` wrote it: its log and its README are no text to train on."""
    return (folder / RUN / RECIPE).is_file() or (folder / FINETUNE_RECORD).is_file()


def _is_text(path: Path) -> bool:
    """Whether it has the name of a text, or is a ``datasets`` folder."""
    return path.is_dir() or path.suffix.lower() in (*TEXT_SUFFIXES, *_READ_TABLES)


def _not_installed(error: ImportError) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"reading this text needs {error.name}", hint=f"Install: {install_line('finetune')}"
    )
