"""What cannot be trained is refused before work, and a run that goes wrong loses nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from converters.errors import (
    ConvertError,
    EnvironmentNotReadyError,
    OutputError,
    SourceError,
    TrainingError,
)
from converters.sources import open_checkpoint
from pi_convert.commands.export import command as export
from pi_convert.commands.finetune import command
from pi_convert.finetune import run
from pi_convert.finetune.checkpoints import last_checkpoint
from pi_convert.finetune.recipe import Recipe
from pi_convert.report import runlines
from tests.pi_convert.finetune.conftest import SMALL
from tests.pi_convert.finetune.runs import (
    finetuned,
    weights,
    words,
)
from tests.tiny import write_tiny


def test_a_batch_that_passes_cannot_share_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConvertError, match=r"--batch 2 .* shared by --micro-batch 3") as refused:
        finetuned(model, text, tmp_path / "out", "--micro-batch", "3")
    assert refused.value.hint == "Give --batch as a multiple of 3."
    assert not (tmp_path / "out").exists()


def test_a_bad_loss_stops_with_the_last_good_checkpoint_kept(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checkpoints = tmp_path / "out", tmp_path / "out" / "run" / "checkpoints"
    # The third step throws the weights far off; the loss of the fourth tells.
    with monkeypatch.context() as patched:
        patched.setattr(Recipe, "rate_share", lambda _, step: 1e36 if step == 2 else 1.0)
        with pytest.raises(TrainingError, match=r"the loss became .* in step 4") as raised:
            finetuned(model, text, out, "--save-every", "1", steps=6)
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert "checkpoint-2 has the last good weights" in raised.value.hint
    assert (out / "run" / "loss.html").is_file()
    assert not (out / "config.json").exists()
    kept = load_file(checkpoints / "checkpoint-2" / "model.safetensors")
    assert max(float(value.abs().max()) for value in kept.values()) < 100


def test_the_first_checkpoint_is_none_that_is_good_where_its_loss_is_bad(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match="the loss became") as raised:
        finetuned(model, text, out, "--learning-rate", "1e37", "--save-every", "1", steps=6)
    assert "No checkpoint is from before it" in raised.value.hint
    assert last_checkpoint(out / "run" / "checkpoints") is None


@pytest.mark.parametrize(("evaluated", "when"), [("0", "after the last step"), ("1", "held-out")])
def test_a_last_step_that_throws_the_weights_off_is_not_written(
    evaluated: str, when: str, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--learning-rate", "1e37", "--save-every", "1", "--eval-every", evaluated)
    with pytest.raises(TrainingError, match=f"the loss became .*{when}"):
        finetuned(model, text, out, *flags, steps=1)
    assert last_checkpoint(out / "run" / "checkpoints") is None
    assert not (out / "config.json").exists()


def test_a_damaged_recipe_is_one_error(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "out" / "run" / "recipe.json"
    recipe.parent.mkdir(parents=True)
    recipe.write_text('{"recipe": {"preset": "qu')
    with pytest.raises(OutputError, match=r"recipe\.json: not valid JSON") as raised:
        finetuned(model, text, tmp_path / "out", "--resume")
    assert raised.value.hint == "Start anew with another --out."


def test_adapters_are_drawn_by_the_seed(model: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.manual_seed(torch.seed())
        lora = ("--preset", "lora", "--learning-rate", "1e-2", "--seed", seed)
        finetuned(model, text, tmp_path / name, *lora)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_a_run_of_other_weights_is_not_gone_on_with(
    model: Path, plain: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    with monkeypatch.context() as patched:
        patched.setattr(Recipe, "rate_share", lambda _, step: 1e36 if step == 2 else 1.0)
        with pytest.raises(TrainingError):
            finetuned(model, text, out, "--save-every", "1", steps=6)
    write_tiny(other, shape=SMALL, seed=1)
    with pytest.raises(OutputError, match="with other settings: MODEL has other weights"):
        finetuned(other, text, out, "--save-every", "1", "--resume", steps=6)


def test_a_run_that_cannot_start_leaves_the_folder_as_it_was(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ConvertError, match="fewer than one window"):
        finetuned(model, short, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ConvertError, match="fewer than one window"):
        finetuned(model, short, out)
    assert list(out.iterdir()) == []
    finetuned(model, text, out, steps=1)


def test_text_is_read_before_the_base_is_written_and_the_folder_before_the_weights(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model both take minutes."""
    binary, other = tmp_path / "binary.txt", tmp_path / "other"
    binary.write_bytes(b"a\0b")
    other.mkdir()
    (other / "notes.txt").write_text("mine")

    def too_early(*_: object, **__: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_folder", too_early)
        with pytest.raises(SourceError, match=r"binary\.txt is a binary file"):
            finetuned(model, binary, tmp_path / "out")
        patched.setattr(run, "content_hash", too_early)
        with pytest.raises(OutputError, match="exists and is no run of finetune"):
            finetuned(model, text, other)
    finetuned(model, text, tmp_path / "out", steps=1)
    monkeypatch.setattr(run, "content_hash", too_early)
    for resumed in ((), ("--resume",)):
        with pytest.raises(OutputError, match="holds a finished run"):
            finetuned(model, text, tmp_path / "out", *resumed, steps=1)
    longer = pytest.raises(OutputError, match="other settings: --steps is 2, the run has 1")
    with longer:
        finetuned(model, text, tmp_path / "out", "--resume", steps=2)
    with pytest.raises(OutputError, match="exists and is no run of finetune"):
        finetuned(model, text, text)


def test_nothing_is_left_behind_by_an_error_that_nobody_thought_of(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("panic")

    monkeypatch.setattr(run, "tokenise", broken)
    with pytest.raises(RuntimeError, match="panic"):
        finetuned(model, text, tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),
    ],
)
def test_numbers_that_no_library_takes_are_wrong_usage(
    model: Path, text: Path, tmp_path: Path, flag: str, value: str
) -> None:
    result = CliRunner().invoke(command, words(model, text, tmp_path / "out", flag, value))
    assert result.exit_code == 2
    assert flag in result.stderr
    assert not (tmp_path / "out").exists()


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_error_and_the_run_goes_on_once_there_is_room(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """AdamW's moments are twice the weights: these fit, the moments do not."""
    out, more = tmp_path / "out", ("--save-every", "2")
    limit = (model / "model.safetensors").stat().st_size * 3 // 2
    with (
        files_of_at_most(limit),
        pytest.raises(OutputError, match=r"checkpoint-2 cannot be written: .") as full,
    ):
        finetuned(model, text, out, *more, steps=4)
    assert "once there is room the same command with --resume goes on" in full.value.hint
    assert list((out / "run" / "checkpoints").iterdir()) == []
    said = finetuned(model, text, out, *more, "--resume", steps=4)
    assert "no checkpoint yet: the run starts at its first step\n" in said
    finetuned(model, text, tmp_path / "whole", *more, steps=4)
    assert weights(out) == weights(tmp_path / "whole")


def test_what_it_will_take_is_told_before_the_first_step(
    model: Path, text: Path, tmp_path: Path
) -> None:
    said = finetuned(model, text, tmp_path / "a").splitlines()
    estimate, first = (
        next(i for i, line in enumerate(said) if line.startswith(start))
        for start in ("estimate: ", "step 1 of 3")
    )
    before = next(i for i, line in enumerate(said) if line.startswith("before the first step: "))
    assert estimate < before < first
    assert not any("held-out windows" in line for line in said[:estimate])
    # Preset quick measures before the first step, every 50, and after the last.
    assert " for 3 steps and 2 measurements of held-out perplexity, " in said[estimate]
    assert not any("none is held out" in line for line in said)
    short = tmp_path / "short.txt"
    short.write_text("A few windows of words. " * 20)
    said = finetuned(model, short, tmp_path / "b").splitlines()
    assert any(line.startswith("fewer than 10 windows of text: none is held out") for line in said)


def test_a_device_and_memory_that_are_not_there_are_said_before_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentNotReadyError, match="no CUDA device"):
            finetuned(model, text, tmp_path / "out", "--device", "cuda")
    monkeypatch.setattr(runlines, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(EnvironmentNotReadyError, match=r"needs more than 1\.\d MiB of memory"):
        finetuned(model, text, tmp_path / "out")
    sizes, tensors = open_checkpoint(str(model)).hparams, open_checkpoint(str(model)).tensors
    every = sum(tensor.elements for tensor in tensors.values())
    # Preset lora trains the embedding and 2 norms a layer and one at the end, in full.
    in_full = (sizes.vocab_size + 2 * sizes.layers + 1) * sizes.hidden_size
    assert in_full < every / 2
    needed = 4 * every + 12 * in_full + 4 * 64 * sizes.hidden_size * sizes.layers
    monkeypatch.setattr(runlines, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(EnvironmentNotReadyError, match="of memory, and"):
        finetuned(model, text, tmp_path / "out", "--preset", "lora")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(runlines, "available_memory_bytes", lambda: needed)
    finetuned(model, text, tmp_path / "out", "--preset", "lora", steps=1)


def test_export_refuses_its_output_before_it_trains(
    model: Path, text: Path, tmp_path: Path
) -> None:
    flags = ["--to", "gguf", "--scale", "2", "--quantize", "f16", "--out", str(tmp_path)]
    assert CliRunner().invoke(export, [str(model), *flags]).exit_code == 0  # another name
    (tmp_path / "tiny-PI2-F16.gguf").rename(tmp_path / "tiny-finetuned-PI2-F16.gguf")
    tuned = [str(model), *flags, "--finetune", str(text), "--steps", "2"]
    refused = CliRunner().invoke(export, tuned)
    assert isinstance(refused.exception, OutputError)
    assert not (tmp_path / "tiny-finetuned-PI2").exists()
