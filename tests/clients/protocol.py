"""What every client's program is asked, and what it answers.

A program gets the path of a JSON file with the fields of ``Request`` and ``out``, a folder. It
writes ``answer.json`` there with the fields of ``Answer``, and each row's logits as raw float32.
All token ids go through the client's own tokenizer, and batches through its own padding.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.clients.environments import HERE, clean_environment

CLIENT_SECONDS = 600
_TAIL = 4000

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """``folder`` is loaded as it is; ``file`` is the graph by name, None the client's own choice.

    ``texts`` are encoded and continued, each alone and all as one padded batch, by ``new_tokens``;
    ``messages`` go through the chat template. ``beams`` 0: no beam search.
    """

    folder: Path
    texts: Sequence[str]
    file: str | None = None
    messages: Sequence[dict[str, str]] = ()
    new_tokens: int = 24
    beams: int = 0

    def write(self, out: Path) -> Path:
        """The file that a program is given; answers go to ``out``."""
        fields = dataclasses.asdict(self) | {"folder": str(self.folder), "out": str(out)}
        question = out / "request.json"
        question.write_text(json.dumps(fields), encoding="utf-8")
        return question


@dataclass(frozen=True)
class Answer:
    """What a client made of a request: token ids, and logits of every token of the batch."""

    client: str
    encoded: list[list[int]]
    alone: list[list[int]]  # continuations, the end token left out
    batch: list[list[int]]
    beams: list[list[int]]
    prompt: list[int]
    reply: list[int]
    logits: list[Logits]  # of each text's tokens in the batch: (tokens, vocabulary)


@dataclass(frozen=True)
class Program:
    """A file of ``programs`` and what runs it."""

    interpreter: Path
    name: str
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def ask(self, request: Request, out: Path) -> Answer:
        """Raises ``AssertionError`` with the end of what was printed, or where files changed."""
        out.mkdir()
        before = listing(request.folder)
        done = subprocess.run(
            [self.interpreter, HERE / "programs" / self.name, request.write(out)],
            env=clean_environment({"HF_HUB_OFFLINE": "1", **self.variables}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            check=False,
        )
        said = done.stderr[-_TAIL:]
        assert done.returncode == 0, f"{self.name}: exit code {done.returncode}\n{said}"
        assert listing(request.folder) == before, f"{self.name} changed {request.folder}"
        return read_answer(out)


def read_answer(out: Path) -> Answer:
    """The answer that a program left in ``out``."""
    fields: dict[str, Any] = json.loads((out / "answer.json").read_text("utf-8"))
    vocabulary = fields.pop("vocabulary")
    rows = range(len(fields["encoded"]))
    logits = [np.fromfile(out / f"logits-{i}.f32", "<f4").reshape(-1, vocabulary) for i in rows]
    return Answer(**fields, logits=logits)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, symlinks not followed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }
