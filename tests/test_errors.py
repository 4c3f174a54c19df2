"""What holds for every error that a person sees."""

from __future__ import annotations

import ast
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from converters import errors
from converters.errors import os_hint, shown
from tests.conftest import REPOSITORY

KINDS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ConvertError)
}


# Of these some say what was wrong and not yet what to do.
LATER = ("unused",)


def without_hint(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        raised = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if raised and node.func.id in KINDS and all(k.arg != "hint" for k in node.keywords):
            yield f"{file.relative_to(REPOSITORY)}:{node.lineno}"


@pytest.mark.parametrize("package", ["converters", "pi_convert"])
def test_every_error_says_what_to_do(package: str) -> None:
    files = (REPOSITORY / package).rglob("*.py")
    assert [place for file in files for place in without_hint(file)] == []


def test_an_error_without_a_hint_would_be_found(tmp_path: Path) -> None:
    """The control."""
    file = REPOSITORY / "converters" / "unwritten.py"
    source = 'raise SourceError("a")\nraise SourceError("b", hint="c")\n'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_: source)
        assert list(without_hint(file)) == ["converters/unwritten.py:1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.0, "8.0"),
        ("a\nb", r"'a\nb'"),
        (["x"] * 1000, "['x', 'x'"),
        ("1" * 500, "'111"),
    ],
)
def test_a_value_is_one_short_line(value: object, text: str) -> None:
    line = shown(value)
    assert line.startswith(text)
    assert "\n" not in line
    assert len(line) <= 120


def test_what_to_do_about_an_error_of_the_system() -> None:
    assert "permissions" in os_hint(OSError(errno.EACCES, "Permission denied"), "Check the path.")
    assert os_hint(OSError(errno.EISDIR, "Is a directory"), "Check the path.") == "Check the path."
