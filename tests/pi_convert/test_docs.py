"""The documentation says what the program does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from pi_convert.cli import COMMANDS
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def test_the_command_reference_is_the_help() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.reference()
    assert (DOCS / "cli.md").read_text("utf-8") == expected, "run: python docs/generate_cli.py"


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
