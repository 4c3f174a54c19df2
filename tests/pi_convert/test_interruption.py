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


def partials(out: Path, old: str = NAME) -> list[Path]:
    return [path for path in out.iterdir() if path.name != old]


def start_and_signal(
    model: Path, out: Path, sent: signal.Signals, target: str = "gguf", old: str = NAME
) -> subprocess.Popen[str]:
    words = [target if word == "gguf" else word for word in command(model, out)]
    if target != "gguf":
        del words[words.index("--quantize") : words.index("--out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out.is_dir() and any(map(holds_data, partials(out, old)))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    return process


def holds_data(path: Path) -> bool:
    try:
        files = path.rglob("*") if path.is_dir() else [path]
        return any(file.stat().st_size for file in files)
    except FileNotFoundError:
        return False


def tmpfs(folder: Path, options: str) -> tuple[str, str]:
    """The unshare program, and a command for its shell that puts a small disk at ``folder``."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o {options} tmpfs {folder}"
    if (
        unshare is None
        or subprocess.run(
            [unshare, "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("unshare -rm with a tmpfs is refused here")
    return unshare, mount


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_leaves_the_old_file_and_nothing_else(
    model: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """And so does a polite end from outside."""
    (tmp_path / NAME).write_bytes(OLD)
    process = start_and_signal(model, tmp_path, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert (tmp_path / NAME).read_bytes() == OLD
    assert partials(tmp_path) == []


@pytest.mark.parametrize("target", ["gguf", "safetensors", "onnx"])
def test_ctrl_c_leaves_none_of_the_folders_it_made(
    model: Path, tmp_path: Path, target: str
) -> None:
    process = start_and_signal(model, tmp_path / "a" / "b" / "c", signal.SIGINT, target)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith("interrupted")
    assert list(tmp_path.iterdir()) == []


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


def test_sigkill_leaves_an_old_folder_whole(model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pi_convert", "export", str(model), "--to", "onnx",
             "--scale", "8", "--out", str(tmp_path), "--force"]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    (folder,) = tmp_path.iterdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = start_and_signal(model, tmp_path, signal.SIGKILL, "onnx", old=folder.name)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == 2
    subprocess.run(words, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_limit_on_the_file_size_is_one_clear_error(model: Path, tmp_path: Path) -> None:
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
    unshare, mount = tmpfs(tmp_path, "size=1m")
    script = f"{mount} && {' '.join(command(model, tmp_path))}; echo exit $?; ls -A {tmp_path}"
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert "exit 1" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("exit 1"), done.stdout  # nothing was left
    assert "MiB free" in done.stderr


FILL_WHILE_WRITING = """
import shutil, sys
from pathlib import Path
from converters.errors import OutputError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from converters.targets.huggingface import write_folder
from converters.targets.onnx import plan_onnx, write_onnx

out = Path(sys.argv[2])
(out / "old.gguf").write_bytes(b"the old file")

def fill(stage, done, total):
    if not (out / "filler").exists():
        with (out / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                print("filled after", done, "of", total)

checkpoint = open_checkpoint(sys.argv[1]).interpolate(8.0)
try:
    if sys.argv[3] == "onnx":
        plans = [plan_onnx(checkpoint, name) for name in ("fp32", "int4")]
        write_onnx(checkpoint, plans, out / "folder", threads=2, progress=fill)
    elif sys.argv[3] == "gguf":
        plans = plan_gguf(checkpoint, ["f16", "q8_0"], allow_requantize=True)
        write_gguf(checkpoint, plans, out, threads=2, progress=fill)
    else:
        write_folder(checkpoint, out / "folder", progress=fill)
except OutputError as error:
    print("refused:", error)
print("left:", sorted(path.name for path in out.iterdir()))
"""


@pytest.mark.parametrize("target", ["gguf", "safetensors", "onnx"])
def test_a_disk_that_fills_up_during_the_run_is_one_clear_error(
    model: Path, tmp_path: Path, target: str
) -> None:
    unshare, mount = tmpfs(tmp_path, "size=200m")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", mount + ' && exec "$@"', "sh",
         sys.executable, "-c", FILL_WHILE_WRITING, str(model), str(tmp_path), target],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "filled after" in done.stdout, done.stderr  # there was room when the run began
    assert "No space left on device" in done.stdout, done.stdout + done.stderr
    assert "Nothing was written" in done.stdout
    assert "left: ['filler', 'old.gguf']" in done.stdout


def test_a_second_run_on_the_same_output_is_refused(model: Path, tmp_path: Path) -> None:
    first = start_and_signal(model, tmp_path, signal.SIGSTOP)
    try:
        second = subprocess.run(
            command(model, tmp_path), capture_output=True, text=True, check=False
        )
    finally:
        first.send_signal(signal.SIGCONT)
    _, error = first.communicate(timeout=60)
    assert (second.returncode, first.returncode) == (1, 0), second.stderr + error
    assert "another run is writing" in second.stderr
    assert "Traceback" not in second.stderr
    assert (tmp_path / NAME).read_bytes()[:4] == b"GGUF"
    assert partials(tmp_path) == []


@pytest.mark.parametrize("standing", ["gguf", "safetensors"])
def test_no_target_is_written_where_another_exists(
    model: Path, tmp_path: Path, standing: str
) -> None:
    both = [part for part in command(model, tmp_path, "--to", "safetensors") if part != "--force"]
    subprocess.run(both, check=True, capture_output=True)
    for path in list(tmp_path.iterdir()):
        if path.is_dir() and standing == "gguf":
            shutil.rmtree(path)
        elif path.is_file() and standing == "safetensors":
            path.unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(before) == 1
    done = subprocess.run(both, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "exists" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_read_only_folder_is_one_clear_error(model: Path, tmp_path: Path) -> None:
    unshare, mount = tmpfs(tmp_path, "ro")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", f"{mount} && {' '.join(command(model, tmp_path))}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr
