"""State of the Union speeches, a third of the long ones kept apart to measure on.

No document is in both folders. Every file is one document.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.sdist import speeches

LONG_BYTES = 100_000  # some 22,000 tokens of the default model


@dataclass(frozen=True)
class Texts:
    train: Path  # a folder: 242 speeches, 11.1 MB
    test: tuple[Path, ...]  # 7 long ones


def split(folder: Path) -> Texts:
    """The speeches under ``folder``, copied there the first time."""
    files = sorted(speeches().iterdir())
    long = [file for file in files if file.stat().st_size >= LONG_BYTES]
    apart = long[1::3]
    for name, members in (("test", apart), ("train", [f for f in files if f not in apart])):
        if not (folder / name).is_dir():
            partial = folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in members:
                shutil.copy(file, partial)
            partial.rename(folder / name)
    return Texts(folder / "train", tuple(sorted((folder / "test").iterdir())))
