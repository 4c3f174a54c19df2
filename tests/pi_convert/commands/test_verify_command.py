"""The verify command as its user meets it: what it takes, and what it says of the text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert import cli
from pi_convert.commands.verify import prove
from pi_convert.evaluate.texts import Document
from pi_convert.verify import VerifyRequest
from pi_convert.verify.verdict import LinkName, LinkResult, Status, Verdict
from tests.tiny import write_tiny

SENTENCE = "RoPE turns each pair of a query by its position; 12 and 345 are numbers.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("verify") / "Tiny-Model")


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_checkpoint(str(model)).interpolate(8)
    out = tmp_path_factory.mktemp("artifact")
    return write_gguf(checkpoint, plan_gguf(checkpoint, ["f16"]), out)[0].path


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Link 3 on fewer tokens, which these tests are not about."""
    monkeypatch.setattr("pi_convert.verify.tokenizer.MINIMUM_TOKENS", 2000)
    monkeypatch.setattr("pi_convert.verify.tokenizer.UNICODE_TOKENS", 1000)


@pytest.mark.parametrize("command", ["verify", "check", "fix"])
def test_a_folder_is_told_from_a_gguf_file(
    command: str, model: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--scale", "8", "--out", str(tmp_path / "out.gguf")] if command == "fix" else []

    def said(path: Path) -> str:
        assert cli.run([command, str(path), *words]) == 1
        return capfd.readouterr().err

    text = said(artifact.parent)
    takes = "one GGUF file" if command == "fix" else "a GGUF file, an ONNX file or its folder"
    assert f"error: {artifact.parent} is a folder, and {command} takes {takes}\n" in text
    assert f"hint: Give the file itself: pi-convert {command} {artifact}" in text
    text = said(model)
    assert "is a Hugging Face folder" in text
    assert f"pi-convert export {model} --to gguf --scale S" in text
    text = said(model / "model.safetensors")
    assert "is a checkpoint's weights" in text
    assert f"pi-convert export {model} --to gguf --scale S" in text
    (tmp_path / "empty").mkdir()
    assert "there is none in this folder" in said(tmp_path / "empty")
    assert "there is no such file" in said(tmp_path / "missing.gguf")


def verdict_of(request: VerifyRequest) -> Verdict:
    """The verdict that ``prove`` gives where the five links say this."""
    links = (
        LinkResult(LinkName.EXECUTION, Status.PASSED, "agrees", notes=("its own",)),
        LinkResult(LinkName.QUALITY, Status.REPORTED, "as good"),
    )
    made = Verdict("a.gguf", "Tiny-Model", request.preset, links, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi_convert.verify.verify", lambda request, tell: made)
        return prove(request)


def test_a_text_that_is_repeated_is_said(
    model: Path, artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """L is 128 and L' 1,024: the longest windows are the controls', of 1,024 tokens."""
    source = open_checkpoint(str(model))
    short = VerifyRequest(artifact, source, 8.0, texts=(Document("short", SENTENCE),))
    notes = verdict_of(short).link(LinkName.EXECUTION).notes
    assert notes[0] == "its own"
    assert "the longest window 1,024: the text is repeated in it" in notes[1]
    assert capfd.readouterr().err == f"note: {notes[1]}\n"
    # Negative controls: a longer one, and the default text.
    for texts in ((Document("long", SENTENCE * 100),), ()):
        enough = verdict_of(replace(short, texts=texts))
        assert enough.link(LinkName.EXECUTION).notes == ("its own",)
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("repeats", [1, 100])
@pytest.mark.usefixtures("few_tokens")
def test_the_verdict_says_whether_the_text_was_repeated(
    repeats: int, model: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * repeats)
    words = [
        str(artifact),
        "--against",
        str(model),
        "--scale",
        "8",
        "--text",
        str(text),
        "--json",
        "--threads",
        "1",
    ]
    assert cli.run(["verify", *words]) == 0
    printed = capfd.readouterr()
    links = json.loads(printed.out)["links"]
    said = [link["name"] for link in links if any("repeated" in n for n in link["notes"])]
    assert said == (["execution"] if repeats == 1 else [])
    assert ("note: the text has" in printed.err) == (repeats == 1)


def test_a_text_that_is_not_there_is_one_clear_error(
    model: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes("Ärger".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.bin").write_bytes(b"1")
    for name, says, hint in (
        ("missing.txt", "No such file or directory", "Check the path"),
        ("folder", "no text in it", "Expected .txt, .md"),
        ("latin.txt", "is no UTF-8 text", "iconv -f latin1 -t utf-8"),
    ):
        path = tmp_path / name
        words = [str(artifact), "--against", str(model), "--scale", "8", "--text", str(path)]
        assert cli.run(["verify", *words]) == 1
        error = capfd.readouterr().err.splitlines()
        assert error[0].startswith(f"error: {path}")
        assert says in error[0]
        assert "Errno" not in error[0]
        assert hint in error[1]
