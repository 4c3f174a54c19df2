"""The documentation says what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pi_convert.cli import COMMANDS
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def test_the_command_reference_is_the_help() -> None:
    # In a process of its own: click keeps the help option of the first context a command was in.
    done = subprocess.run([sys.executable, DOCS / "generate_cli.py", "--check"], check=False)
    assert done.returncode == 0, "run: python docs/generate_cli.py"


def test_the_readme_names_every_command() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    for name in COMMANDS:
        assert f"pi-convert {name}" in readme


@pytest.mark.parametrize(
    "page", [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
