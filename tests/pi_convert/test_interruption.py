"""Whatever happens during an export, the old file is whole and the next run clears the rest."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import WIDE, write_tiny

NAME = "model-PI8-Q6_K.gguf"
OLD = b"the old file"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "model", shape=WIDE, dtype="bf16")


def command(model: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pi_convert",
        "export",
        str(model),
        "--to",
        "gguf",
        "--scale",
        "8",
        "--quantize",
        "q6_k",
        "--threads",
        "1",
        "--out",
        str(out),
        "--force",
        *more,
    ]


def partials(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name != NAME]


def start_and_signal(model: Path, out: Path, sent: signal.Signals) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command(model, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not partials(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    return process


def test_ctrl_c_leaves_the_old_file_and_nothing_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(OLD)
    process = start_and_signal(model, tmp_path, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert (tmp_path / NAME).read_bytes() == OLD
    assert partials(tmp_path) == []


def test_sigkill_leaves_one_partial_that_the_next_run_removes(model: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(OLD)
    process = start_and_signal(model, tmp_path, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / NAME).read_bytes() == OLD
    assert len(partials(tmp_path)) == 1
    subprocess.run(command(model, tmp_path), check=True, capture_output=True)
    assert (tmp_path / NAME).read_bytes()[:4] == b"GGUF"
    assert partials(tmp_path) == []


def test_a_write_that_fails_midway_is_one_clear_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(OLD)

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        command(model, tmp_path), preexec_fn=limit_file_size, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert (tmp_path / NAME).read_bytes() == OLD
    assert partials(tmp_path) == []


def test_a_full_disk_is_found_before_any_work(model: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if (
        unshare is None
        or subprocess.run(
            [unshare, "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("unshare -rm with a tmpfs is refused here")
    script = f"{mount} && {' '.join(command(model, tmp_path))}; echo exit $?; ls -A {tmp_path}"
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert "exit 1" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("exit 1"), done.stdout  # nothing was left
    assert "MiB free" in done.stderr


def test_a_read_only_folder_is_one_clear_error(model: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o ro tmpfs {tmp_path}"
    if (
        unshare is None
        or subprocess.run(
            [unshare, "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("unshare -rm with a tmpfs is refused here")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", f"{mount} && {' '.join(command(model, tmp_path))}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr
