"""Texts to evaluate on, in an order that never changes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import SourceError

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".text")
_TABLES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name; what is said about text is clustered by document."""

    name: str
    text: str


def default_documents() -> tuple[Document, ...]:
    """Python's own documentation, from the standard library: no download, about 110,000 tokens."""
    from pydoc_data.topics import topics

    return tuple(Document(f"pydoc {name}", text) for name, text in sorted(topics.items()))


def read_documents(paths: Sequence[Path]) -> tuple[Document, ...]:
    """One document a file; of a folder every text file at any depth, in order.

    Raises ``SourceError`` for one that is not there or holds no text.
    """
    documents = []
    for path in (file for given in paths for file in _files(given)):
        try:
            text = path.read_bytes().decode("utf-8")  # line ends as they are
        except OSError as error:
            raise SourceError(
                f"{path}: {error.strerror}",
                hint="Check the path: expected a UTF-8 text file or a folder of them.",
            ) from error
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path} is no UTF-8 text: {error}",
                hint="Give text files. If it is Latin-1, say, convert it first:"
                f" iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > text.txt",
            ) from error
        if "\0" in text:
            raise SourceError(f"{path} is a binary file", hint="Give text files.")
        if path.suffix.lower() in _TABLES:
            raise SourceError(
                f"{path} is a table, which would be read as one text",
                hint="Write its texts to files of their own: one is a document.",
            )
        if not text.strip():
            raise SourceError(f"{path} is empty", hint="Give a file with text in it.")
        documents.append(Document(path.name, text))
    return tuple(documents)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES)
    found = [file for file in inside if file.is_file()]
    if not found:
        raise SourceError(
            f"{path}: no text in it", hint=f"Expected {', '.join(TEXT_SUFFIXES)} files."
        )
    return found
