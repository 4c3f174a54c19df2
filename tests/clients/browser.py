"""Pages in a headless Chromium, from a server on 127.0.0.1 that is their whole network."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from tests.clients.environments import HERE, Chromium, Node, clean_environment
from tests.clients.protocol import CLIENT_SECONDS, Answer, Request, listing, read_answer

_FLAGS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    # No name but the server's resolves, so that nothing can come from elsewhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@dataclass(frozen=True)
class Browser:
    """A program as ``protocol.Program``: the page programs/page.html, opened once a request."""

    chromium: Chromium
    node: Node

    def ask(self, request: Request, out: Path) -> Answer:
        """Raises ``AssertionError`` with what the page said of a failure, or with its silence."""
        out.mkdir()
        before = listing(request.folder)
        request.write(out)
        roots = {
            "node_modules": self.node.modules,
            "programs": HERE / "programs",
            "models": request.folder.parent,
            "out": out,
        }
        visit(self.chromium, "programs/page.html", roots, CLIENT_SECONDS)
        assert listing(request.folder) == before
        return read_answer(out)


def visit(
    chromium: Chromium, page: str, roots: dict[str, Path], seconds: float, *flags: str
) -> None:
    """Opens a page, served from ``roots``, until it has sent /out/answer.json.

    Raises ``AssertionError`` with what the page sent as /out/error.txt, or with its silence.
    """
    out = roots["out"]
    command = [str(chromium.binary), *_FLAGS, *flags, f"--user-data-dir={out / 'profile'}"]
    libraries = {"LD_LIBRARY_PATH": str(chromium.libraries)}
    with _Server(roots) as server, (out / "chromium.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, f"{server.address}/{page}"],
            env=clean_environment(libraries), stdout=log, stderr=log,
        )  # fmt: skip
        try:
            server.answered.wait(seconds)
        finally:
            process.terminate()
            process.wait(30)
    error = out / "error.txt"
    assert not error.exists(), error.read_text("utf-8")
    assert (out / "answer.json").exists(), f"no answer; Chromium: {_said(out)}"


class _Server(ThreadingHTTPServer):
    """Serves the files under ``roots`` by their first name, and keeps what is sent to /out."""

    def __init__(self, roots: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.roots = roots
        self.answered = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> _Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(SimpleHTTPRequestHandler):
    server: _Server
    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
    }

    def translate_path(self, path: str) -> str:
        root, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        base = self.server.roots.get(root)
        if base is None or ".." in rest.split("/"):
            return os.devnull
        return str(base / rest)

    def end_headers(self) -> None:
        # What a page needs for threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        target = Path(self.translate_path(self.path))
        target.write_bytes(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(204)
        self.end_headers()
        if target.name in {"answer.json", "error.txt"}:
            self.server.answered.set()

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a failure says what failed."""


def _said(out: Path) -> str:
    return (out / "chromium.txt").read_text("utf-8", errors="replace")[-2000:]
