"""The command line as a whole: help, usage errors, exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from pi_convert import cli

HEAVY = ("numpy", "torch", "transformers", "llama_cpp", "gguf", "tokenizers", "huggingface_hub")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pi_convert import cli\n"
        f"assert cli.run({arguments!r}) == 0\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_is_listed_with_its_own_first_line() -> None:
    context = click.Context(cli.cli)
    for name, line in cli.COMMANDS.items():
        command = cli.cli.get_command(context, name)
        assert command is not None
        assert command.help is not None
        assert command.help.splitlines()[0] == line
    folder = Path(cli.__file__).parent / "commands"
    modules = {path.stem for path in folder.glob("[!_]*.py")} - {"options"}
    assert modules == set(cli.COMMANDS)


def test_every_option_has_help() -> None:
    context = click.Context(cli.cli)
    for name in cli.COMMANDS:
        command = cli.cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "0.5", "eight", ""])
def test_a_scale_that_is_none_is_wrong_use(
    scale: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = cli.run(["export", "--to", "gguf", f"--scale={scale}", "--out", str(tmp_path / "o")])
    assert code == 2
    assert "--scale" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--to", "gguf"],
        ["export", "--scale", "8"],
        ["export", "--to", "floppy", "--scale", "8"],
        ["export", "--to", "safetensors", "--scale", "8", "--quantize", "q4_k_m"],
        ["export", "--to", "gguf", "--scale", "8", "--dtype", "f16"],
        ["export", "--to", "onnx", "--scale", "8", "--quantizer", "ggml"],
        ["export", "--to", "gguf", "--scale", "8", "--verify", "quick", "--dry-run"],
        ["export", "--to", "gguf", "--scale", "8", "--allow-requantize"],
        ["export", "--to", "gguf", "--scale", "8", "--quantize", "q9_z"],
        ["quants", "--scale", "0.5"],
        ["unknown"],
        ["verify"],
    ],
)
def test_wrong_use_is_exit_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert capfd.readouterr().err


def test_a_missing_model_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = cli.run(["export", str(tmp_path / "nowhere"), "--to", "gguf", "--scale", "8"])
    assert code == 1
    error = capfd.readouterr().err
    assert "nowhere" in error
    assert "hint: " in error
    assert "Traceback" not in error


def test_an_unknown_type_is_named_with_those_that_are_known(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(tmp_path / "nowhere"), "--to", "gguf", "--scale", "8"]
    assert cli.run([*words, "--quantize", "Q8_0", "--quantize", "q9_z"]) == 2
    error = capfd.readouterr().err
    for text in ("'q9_z'", "q4_k_m", "pi-convert quants"):
        assert text in error
    assert "'Q8_0'" not in error
    assert cli.run([*words, "--quantize", "Q8_0"]) == 1  # negative control: the model is missing


def raising(error: BaseException) -> Callable[..., object]:
    def main(*args: object, **options: object) -> object:
        raise error

    return main


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_an_error_of_the_system_is_one_clear_line(
    code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = os.strerror(code)
    monkeypatch.setattr(cli.cli, "main", raising(OSError(code, reason, "/model/config.json")))
    assert cli.run(["doctor"]) == 1
    error, hint = capfd.readouterr().err.splitlines()
    assert error == f"error: /model/config.json: {reason}"
    assert hint.startswith("hint: Check")


def test_an_error_of_the_system_without_a_path_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.cli, "main", raising(OSError(errno.ENOMEM, "Cannot allocate memory")))
    assert cli.run(["doctor"]) == 1
    assert capfd.readouterr().err == "error: Cannot allocate memory\n"


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("a bug"), OSError("no errno")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.cli, "main", raising(bug))
    with pytest.raises(type(bug)) as raised:
        cli.run(["doctor"])
    assert raised.value is bug


@pytest.mark.parametrize("module", ["click", "converters.errors"])
def test_ctrl_c_while_the_program_loads_is_one_line(module: str, tmp_path: Path) -> None:
    """What is imported first raises what Python raises where a Ctrl-C comes at that moment."""
    package, _, name = module.rpartition(".")
    folder = tmp_path / package
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-c",
         f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
         "from pi_convert.cli import main\nmain()"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["finetune", "MODEL", "--scale", "2", "--text", "a.txt", "b.txt"], 2),
        (["finetune", "--scale", "2", "--text", "a.txt", "b.txt"], 1),
        (["perplexity", "--contexts", "32", "--text", "a.txt", "b.txt"], 1),
    ],
)
def test_several_paths_behind_one_text_are_told_apart(
    words: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As a shell makes of `--text *.txt`."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("words")
    assert cli.run(words) == code
    assert "hint: Every --text takes one path: repeat it, or give a folder." in (
        capfd.readouterr().err
    )


def test_a_model_that_is_no_text_keeps_its_own_hint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.pt"
    model.write_text("weights")
    assert cli.run(["perplexity", str(model), "--contexts", "32", "--text", str(model)]) == 1
    said = capfd.readouterr().err
    assert "neither a folder nor a .gguf file" in said
    assert "hint: " in said
    assert "Every --text" not in said


def test_python_m_runs_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pi_convert", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("pi-convert ")


@pytest.mark.parametrize(("processes", "finalized"), [("1", True), ("2", False)])
@pytest.mark.parametrize("words", [["--version"], ["inspect", "nothing-here"]])
def test_one_of_several_processes_leaves_the_interpreter_up(
    processes: str, finalized: bool, words: list[str]
) -> None:
    """Gloo's threads abort while it goes down; what was said and the exit code stay."""
    done = subprocess.run(
        [sys.executable, "-c",
         "import atexit, sys; from pi_convert.cli import main\n"
         f"atexit.register(print, 'finalized'); sys.argv[1:] = {words!r}; main()"],
        env={**os.environ, "WORLD_SIZE": processes}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if words == ["--version"] else 1)
    assert ("pi-convert " if words == ["--version"] else "error: ") in done.stdout + done.stderr
    assert ("finalized" in done.stdout) == finalized
