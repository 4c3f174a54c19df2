"""What is wrong under ``torchrun`` is said by one process, and by none of the others."""

from __future__ import annotations

from pathlib import Path

from tests.pi_convert.finetune.runs import finetuned, in_two_processes, torchrun, words


def said(port: int, *arguments: str) -> list[str]:
    """Lines of the processes, without torchrun's own."""
    done = in_two_processes(torchrun(port), *arguments)
    assert done.returncode == 1, done.stderr
    text = done.stderr
    assert "/pi_convert/" not in text
    assert "interrupted" not in text
    # torchrun tells of a first process that failed: ours with exit code 1, no signal, no abort.
    assert "exitcode  : 1 " in text
    return [line for line in text.splitlines() if line.startswith(("error:", "hint:"))]


def test_a_finished_run_is_told_by_one_process(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetuned(model, text, out, steps=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert said(29614, *words(model, text, out, steps=1)) == [
        f"error: {out} holds a finished run",
        f"hint: `pi-convert export {out} --to gguf` takes it. It cannot be trained further here:"
        " give another --out.",
    ]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_text_too_short_is_told_by_one_process(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    error, hint = said(29615, *words(model, short, tmp_path / "out"))
    assert "fewer than one window of 64" in error
    assert hint == ("hint: Give more text, or a shorter window (`pi-convert finetune --window`).")
    assert not (tmp_path / "out").exists()


def test_what_every_process_finds_is_told_by_one(model: Path, text: Path, tmp_path: Path) -> None:
    more = ("--window", "65")
    error, _ = said(29616, *words(model, text, tmp_path / "out", *more))
    assert error == "error: a window of 65 tokens is longer than L' = 64"
