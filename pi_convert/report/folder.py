"""A report's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from converters.errors import OutputError
from converters.files import atomic_files, refuse_existing, require_makable
from pi_convert.report.document import Report
from pi_convert.report.html import html_page
from pi_convert.report.junit import junit_xml
from pi_convert.report.markdown import markdown

FILES = ("report.json", "report.html", "report.md", "junit.xml")


def require_writable(folder: Path, *, force: bool) -> None:
    """Raises ``OutputError`` where one of the files is there and may not be replaced.

    Or where ``folder`` is none and cannot be made, which should not come out after hours of work.
    """
    with _about_the_report():
        require_makable(folder)
        for name in FILES:
            refuse_existing(folder / name, force=force)


def write_report(report: Report, folder: Path, *, force: bool) -> None:
    """Writes ``FILES`` into ``folder``, all of them or none. Raises ``OutputError``."""
    texts = {
        "report.json": json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n",
        "report.html": html_page(report),
        "report.md": markdown(report),
        "junit.xml": junit_xml(report),
    }
    paths = [folder / name for name in FILES]
    with _about_the_report(), atomic_files(paths, force=force) as partials:
        for partial, name in zip(partials, FILES, strict=True):
            partial.write_text(texts[name], "utf-8")


@contextlib.contextmanager
def _about_the_report() -> Iterator[None]:
    """Hints name the option that the folder was given by."""
    try:
        yield
    except OutputError as error:
        error.hint = error.hint.replace("--out", "--report")
        raise
