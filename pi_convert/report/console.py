"""What a person sees: text on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import click

from converters.errors import OutputError
from converters.progress import Progress, silent

_BAR_WIDTH = 24
_TERMINAL_SECONDS = 0.1  # between two drawings of a bar
_PLAIN_SECONDS = 10.0  # between two lines where stderr is no terminal


def emit(text: str) -> None:
    """Prints text to stdout; characters that its encoding lacks are written as escapes.

    Raises ``OutputError`` where stdout cannot be written, such as on a full disk.
    """
    try:
        click.echo(printable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"stdout cannot be written: {error.strerror}", hint="Send it elsewhere."
        ) from error


def emit_json(value: object) -> None:
    """Prints one JSON document to stdout; see ``emit``."""
    emit(json.dumps(value, indent=2, allow_nan=False))


def printable(text: str, stream: TextIO) -> str:
    """``text`` with what the stream's encoding lacks as escapes; a path may hold any bytes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), indent: int = 2) -> str:
    """Rows as aligned columns; the last column is not padded."""
    lines = [*([header] if header else []), *rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        " " * indent
        + "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
        for line in lines
    )


def pairs(values: Mapping[str, str]) -> str:
    """A name and its value a line."""
    return table([[name, value] for name, value in values.items()])


def size(size_bytes: float) -> str:
    """Bytes for people: 93.8 MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes:.0f} B"


def tokens(count: int) -> str:
    """A count of tokens with thousands separated."""
    return f"{count:,}"


class _Reporter:
    """Draws one stage at a time: a bar on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._stage, self._done = "", 0
        self._started = self._drawn = 0.0
        self._line_open = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            now = time.monotonic()
            if stage != self._stage or done < self._done:  # anew, it may be of the same name
                self._stage, self._started, self._drawn = stage, now, 0.0 if self._terminal else now
            self._done = done
            wait = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
            if done < total and now - self._drawn < wait:
                return
            self._drawn = now
            self._draw(stage, done, total, now - self._started)

    def close(self) -> None:
        with self._lock:
            if self._line_open:
                sys.stderr.write("\r\x1b[2K")
                sys.stderr.flush()
                self._line_open = False

    def _draw(self, stage: str, done: int, total: int, seconds: float) -> None:
        share = done / total if total else 1.0
        left = f", {seconds / share - seconds:.0f} s left" if 0 < share < 1 and seconds > 1 else ""
        if not self._terminal:
            sys.stderr.write(f"{stage}: {share:.0%}{left}\n")
        else:
            filled = round(share * _BAR_WIDTH)
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            sys.stderr.write(f"\r\x1b[2K{stage} [{bar}] {share:4.0%}{left}")
            self._line_open = True
        sys.stderr.flush()


def tell_line(text: str) -> None:
    """One line on stderr, in place of a bar that may stand there."""
    sys.stderr.write(f"\r\x1b[2K{text}\n" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress callback for the work inside; its bar is gone afterwards."""
    if quiet:
        yield silent
        return
    reporter = _Reporter()
    try:
        yield reporter
    finally:
        reporter.close()
