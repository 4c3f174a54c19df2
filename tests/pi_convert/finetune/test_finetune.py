"""Whole runs on a tiny model with dropout: what they write, how they stop and go on."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, TrainerState
from transformers.models.llama.modeling_llama import LlamaMLP

from converters.errors import ConvertError, OutputError
from converters.sources import open_checkpoint
from converters.sources.huggingface import FINETUNE_RECORD
from pi_convert.commands.export import command as export
from pi_convert.commands.finetune import command
from pi_convert.commands.inspect import command as inspect
from pi_convert.commands.verify import command as verify
from pi_convert.finetune import run, train
from pi_convert.finetune.checkpoints import last_checkpoint
from pi_convert.finetune.data import WindowDataset, open_store, windows
from pi_convert.finetune.model import (
    load_model,
    merged_weights,
    require_frequencies,
    require_saved_frequencies,
)
from pi_convert.finetune.progress import Progress
from pi_convert.finetune.recipe import Recipe
from pi_convert.finetune.train import split_windows
from pi_convert.report.finetune import LossPlot, write_loss_plot
from tests.pi_convert.finetune.conftest import SMALL
from tests.pi_convert.finetune.runs import (
    ENVIRONMENT,
    PROCESSES_AGREE,
    finetuned,
    in_two_processes,
    log_of,
    process,
    torchrun,
    weights,
    words,
)
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    finetuned(model, text, out, "--eval-every", "4", "--save-every", "3", steps=8)
    return out


def test_the_folder_is_a_checkpoint_that_every_command_takes(whole: Path, tmp_path: Path) -> None:
    import transformers

    checkpoint = open_checkpoint(str(whole))
    assert checkpoint.rope.factor == 2
    assert (checkpoint.rope.original_context, checkpoint.rope.context) == (32, 64)
    config = transformers.AutoConfig.from_pretrained(whole)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    base = 1 / 10000 ** (torch.arange(0, 12, 2) / 12)
    assert torch.allclose(rotary.inv_freq, base / 2, rtol=1e-6)
    words = [str(whole), "--to", "gguf", "--quantize", "f16", "--out", str(tmp_path)]
    result = CliRunner().invoke(export, words)
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(inspect, [str(whole)]).stdout
    assert "finetune.recipe.steps" in shown
    assert "finetune.recipe.allow_short_window" in shown
    assert "changed since" not in shown
    (file,) = tmp_path.glob("*.gguf")
    result = CliRunner().invoke(verify, [str(file), "--against", str(whole), "--scale", "2"])
    assert "NOT PROVEN" in result.stdout
    assert "has factor 2 already, and --scale 2 makes 4; leave it out for 2" in result.stderr
    further = [str(whole), "--to", "safetensors", "--scale", "2", "--out", str(tmp_path / "more")]
    result = CliRunner().invoke(export, further)
    assert result.exit_code == 0, result.output
    assert "has factor 2 already, and --scale 2 makes 4" in result.stderr
    (folder,) = (tmp_path / "more").iterdir()
    shown = CliRunner().invoke(inspect, [str(folder)]).stdout
    assert "tuned with factor 2, as the record says; the RoPE has 4 and was changed since" in shown


def test_a_tuned_model_is_tuned_further_without_a_scale(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--text", str(text), "--steps", "1", "--batch", "1", "--threads", "1"]
    result = CliRunner().invoke(command, [str(whole), *more])
    assert result.exit_code == 0, result.output
    assert open_checkpoint("tiny-finetuned-PI2").rope.factor == 2


def test_export_tunes_first_where_it_is_asked_to(model: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--to", "gguf", "--quantize", "f16", "--scale", "2", "--out", str(tmp_path)]
    torch.set_num_threads(2)
    tuned = ["--finetune", str(text), "--steps", "1", "--threads", "1"]
    done = CliRunner().invoke(export, [str(model), *flags, *tuned])
    assert done.exit_code == 0, done.output
    assert torch.get_num_threads() == 1
    assert open_checkpoint(str(tmp_path / "tiny-finetuned-PI2")).rope.factor == 2
    file = tmp_path / "tiny-finetuned-PI2-F16.gguf"
    assert open_checkpoint(str(file)).rope.factor == 2
    assert CliRunner().invoke(export, [str(model), *flags, "--steps", "1"]).exit_code == 2


def test_the_log_has_every_step_and_perplexity_on_both_sides_of_l(whole: Path) -> None:
    log = log_of(whole)
    assert [line["step"] for line in log] == list(range(9))
    assert [line["step"] for line in log if line["perplexity_past"]] == [0, 4, 8]
    assert log[1]["learning_rate"] == pytest.approx(0.1 * 2e-5)
    assert log[3]["learning_rate"] > log[2]["learning_rate"]


def test_perplexity_before_the_first_step_is_the_untuned_models(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = finetuned(model, text, out, "--eval-every", "4", steps=1)
    before = log_of(out)[0]
    assert before == log_of(whole)[0]
    below, past = (before[f"perplexity_{side}"] for side in ("below", "past"))
    line = f"before the first step: held-out perplexity {below:.2f} below L, {past:.2f} past it\n"
    assert line in said
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # PI by hand: the frequencies of the rotary embedding, halved.
    loaded.model.rotary_emb.inv_freq /= 2
    store = open_store(out / "run" / "tokens")
    _, held_out = split_windows(windows(store, 64))
    kept = WindowDataset(store, held_out)
    with torch.no_grad():
        losses = torch.stack(
            [
                torch.nn.functional.cross_entropy(
                    loaded(kept[i]["input_ids"][None]).logits[0, :-1],
                    kept[i]["input_ids"][1:],
                    reduction="none",
                )
                for i in range(len(kept))
            ]
        )
    assert losses[:, :31].mean().exp().item() == pytest.approx(below, rel=1e-4)
    assert losses[:, 31:].mean().exp().item() == pytest.approx(past, rel=1e-4)


def test_the_losses_are_drawn_on_a_page_of_their_own(whole: Path) -> None:
    page = (whole / "run" / "loss.html").read_text()
    log = log_of(whole)
    assert f"Loss {log[1]['loss']:.4f} in step 1, {log[-1]['loss']:.4f} in step 8 of 8" in page
    assert "Stopped" not in page
    for name, points in (("trained windows", 8), ("held out, positions past L", 3)):
        assert page.count(f"<title>{name}: ") == 2 * points  # drawn wide and narrow
    assert not re.search(r"<script|<link|src=|url\(", page)


def test_long_runs_are_drawn_as_means(tmp_path: Path) -> None:
    log = tmp_path / "trainer_log.jsonl"
    keys = {"tokens": 1, "perplexity_below": None, "perplexity_past": None}
    entries = [{"step": step, "loss": 1.0 + step % 5, **keys} for step in range(1, 1001)]
    log.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries) + '{"step": 10')
    page = write_loss_plot(LossPlot(log, "m", 2000, 501, 1.0, {})).read_text()
    assert page.count("<title>trained windows, means of 5 steps: 3 at ") == 2 * 200
    assert "--resume goes on to step 2,000" in page
    assert "Resumed at step 501" in page


def test_resuming_after_sigkill_gives_the_uninterrupted_run(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    more = ("--eval-every", "4", "--save-every", "3")
    arguments = process(*words(model, text, out, *more, steps=8))
    stop = np.random.default_rng(7).choice([4, 5])  # checkpoints are of steps 3 and 6
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith(f"step {stop} of 8"):
                running.send_signal(signal.SIGKILL)
                break
    assert log_of(out)[-1]["step"] in (stop, stop + 1)
    assert last_checkpoint(out / "run" / "checkpoints") == out / "run/checkpoints/checkpoint-3"
    assert not (out / "config.json").exists()
    with pytest.raises(OutputError, match="a run that is not finished"):
        finetuned(model, text, out, *more, steps=8)
    with pytest.raises(OutputError, match="with other settings: --seed is 1, the run has 0"):
        finetuned(model, text, out, *more, "--seed", "1", "--resume", steps=8)
    with (out / "run" / "trainer_log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # as a kill may leave it
    said = finetuned(model, text, out, *more, "--resume", steps=8)
    assert "going on after step 3 of 8\n" in said
    alike = ("loss", "perplexity_below", "perplexity_past")
    lines, expected = log_of(out), log_of(whole)
    assert [[x.get(key) for key in alike] for x in lines] == [
        [x.get(key) for key in alike] for x in expected
    ]
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_resumed_run_of_a_tied_model_does_not_alarm(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    """With the control that transformers does warn of the head."""
    tied = write_tiny(tmp_path / "tied", shape=SMALL, tied=True)
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", heard.append)
    logger = logging.getLogger("transformers.trainer")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "filters", [])
    if not filtered:
        monkeypatch.setattr(run._Harmless, "filter", lambda *_: True)

    def stop(progress: Progress, *_: object, **__: object) -> None:
        progress.stop.set()

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_begin", stop)
        assert "stopped after step 1; saved" in finetuned(tied, text, tmp_path / "out")
    finetuned(tied, text, tmp_path / "out", "--resume")
    said = [record.getMessage() for record in heard]
    assert any("missing keys" in line for line in said) is not filtered


def test_what_follows_from_another_scale_is_not_told_beside_it(
    model: Path, text: Path, whole: Path
) -> None:
    """Of a finished run the settings are told as well."""
    with pytest.raises(OutputError, match=r"settings: --scale is 4\.0, the run has 2\.0\n"):
        finetuned(model, text, whole, "--scale", "4", "--resume", steps=8)


def test_the_size_of_the_text_is_told_and_recorded(model: Path, text: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text(next(text.iterdir()).read_text()[:1500])
    (few / "rows.json").write_text("[]")
    (few / "b.csv").write_text("a,b")
    said = finetuned(model, few, tmp_path / "out", steps=40)
    store = open_store(tmp_path / "out" / "run" / "tokens")
    count = store.tokens // 64  # one document: whole windows of it
    held_out = count // 10
    kept = count - held_out
    times = 40 * 2 / kept
    assert times > 2
    assert f"text: {store.tokens:,} tokens; {kept} windows of 64 to train on" in said
    assert f"; each is trained {times:,.1f}".removesuffix(".0") in said
    assert "in the folders, not read as text: b.csv, rows.json\n" in said
    record = json.loads((tmp_path / "out" / FINETUNE_RECORD).read_bytes())
    assert record["text"] == {
        "tokens": store.tokens,
        "windows": kept,
        "held_out_windows": held_out,
    }


def test_the_trainer_steps_as_the_paper_does(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []

    def spy(trainer: Any, *arguments: Any) -> Any:
        trainers.append(trainer)
        return whole_run(trainer, *arguments)

    whole_run = train.train
    monkeypatch.setattr(train, "train", spy)
    more = ("--text", str(text), "--scale", "2", "--out", str(tmp_path / "out"))
    arguments = [str(model), *more, "--preset", "paper", "--steps", "2"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    (trainer,) = trainers
    optimizer = trainer.optimizer.optimizer  # accelerate's wrapper, torch's own
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)
        # A tenth of 2e-5 in the first step, a twentieth of the rest more with each.
        assert group["lr"] == pytest.approx(2e-5 * (0.1 + 2 * 0.9 / 20))
    seen = trainer.args.gradient_accumulation_steps * trainer.args.per_device_train_batch_size
    assert seen == 64
    first, second = [line["learning_rate"] for line in log_of(tmp_path / "out") if line["step"]]
    assert (first, second) == pytest.approx((2e-6, 2e-5 * 0.145))


def test_a_pass_that_takes_minutes_is_estimated_from_shorter_ones(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[1])
        output: torch.Tensor = forward(self, x)
        return output

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    plain = finetuned(model, text, tmp_path / "plain")
    assert "roughly" not in plain
    assert set(calls) == {64}
    calls.clear()
    monkeypatch.setattr(train, "ROUGH_BEYOND", 32)
    monkeypatch.setattr(train, "ROUGH_TOKENS", (8, 16))
    said = finetuned(model, text, tmp_path / "rough")
    rough, estimate = said.index("roughly, from passes of 8 and 16"), said.index("estimate:")
    assert rough < estimate < said.index("step 1 of 3")
    # Two layers, each computed again in the backward pass, as in the passes that are estimated.
    assert calls[:12] == [8] * 4 + [8] * 4 + [16] * 4
    assert weights(tmp_path / "rough") == weights(tmp_path / "plain")  # dropout drew the same


def test_a_long_pass_takes_what_weights_and_attention_take() -> None:
    def seconds(tokens: int) -> float:
        return 0.01 * tokens + 1e-6 * tokens**2

    short, long = (512, seconds(512)), (2048, seconds(2048))
    assert train.pass_seconds(short, long, 65536) == pytest.approx(655.36 + 4294.967296)
    # Where the longer one was no slower a token, attention is taken for nothing.
    assert train.pass_seconds((512, 6.0), (2048, 20.48), 65536) == pytest.approx(655.36)


def test_ctrl_c_saves_and_says_how_to_go_on(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    more = ("--eval-every", "4", "--save-every", "3")
    arguments = process(*words(model, text, out, *more, steps=8))
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("step 1"):
                running.send_signal(signal.SIGINT)
                break
        said = running.stderr.read()
        assert running.wait() == 130, said
    assert "the step goes on to its end" in said
    assert "--resume" in said
    assert "Stopped; the same command" in (out / "run" / "loss.html").read_text()
    finetuned(model, text, out, *more, "--resume", steps=8)
    assert weights(out) == weights(whole)


def test_text_in_the_folder_of_the_runs_is_read_without_them(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    here = Path()
    finetuned(model, here, Path("run1"), steps=1)
    finetuned(model, here, Path("deep/run2"), steps=1)
    stopped = Path("stopped")

    def interrupt(
        _: Progress, args: object, state: TrainerState, *__: object, **___: object
    ) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_begin", interrupt)
        finetuned(model, here, stopped, "--save-every", "1")
    assert last_checkpoint(stopped / "run" / "checkpoints") is not None
    finetuned(model, here, stopped, "--save-every", "1", "--resume")
    records = [json.loads((f / FINETUNE_RECORD).read_bytes()) for f in (here / "run1", stopped)]
    assert records[0]["data"] == records[1]["data"]
    assert records[0]["data"]["files"] == sorted(file.name for file in text.iterdir())


def test_windows_at_once_and_kept_activations_change_no_loss(
    plain: Path, text: Path, tmp_path: Path
) -> None:
    finetuned(plain, text, tmp_path / "one", "--learning-rate", "1e-2")
    passes = "--micro-batch", "2", "--no-gradient-checkpointing"
    finetuned(plain, text, tmp_path / "two", "--learning-rate", "1e-2", *passes)
    one, two = (log_of(tmp_path / name)[1:] for name in ("one", "two"))
    assert one[-1]["loss"] != pytest.approx(one[0]["loss"], rel=10 * PROCESSES_AGREE)
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=PROCESSES_AGREE)


def test_activations_are_recomputed_unless_asked_otherwise(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    original = LlamaMLP.forward

    def counted(self: LlamaMLP, *arguments: Any) -> Any:
        layers.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    finetuned(
        model, text, tmp_path / "kept", "--no-gradient-checkpointing", "--eval-every", "0", steps=1
    )
    kept = 2 * 2 + 2  # layers x windows, and the last window once more
    assert len(layers) == kept
    finetuned(model, text, tmp_path / "recomputed", "--eval-every", "0", steps=1)
    assert len(layers) == kept + 2 * 2 * 2 + 2


ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "29613"]  # fmt: skip


@pytest.mark.parametrize("launcher", [torchrun(29611), ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_losses_of_one(
    launcher: list[str], plain: Path, text: Path, tmp_path: Path
) -> None:
    """At a rate that moves them: gradients that are not averaged would show."""
    more = ("--eval-every", "2", "--learning-rate", "1e-2")
    finetuned(plain, text, tmp_path / "one", *more, steps=6)
    done = in_two_processes(launcher, *words(plain, text, tmp_path / "two", *more, steps=6))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    (before, *one), (before_two, *two) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for key in ("perplexity_below", "perplexity_past"):
        assert before_two[key] == pytest.approx(before[key], rel=PROCESSES_AGREE)
        assert one[-1][key] < before[key] * (1 - 1000 * PROCESSES_AGREE)
    for alone, shared in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "perplexity_below", "perplexity_past"):
            expected = alone[key] and pytest.approx(alone[key], rel=PROCESSES_AGREE)
            assert shared[key] == expected, key


def test_the_loss_and_its_gradients_under_fsdp2_are_those_of_the_whole_model(model: Path) -> None:
    worker = Path(__file__).parent / "fsdp_worker.py"
    done = subprocess.run(
        [sys.executable, "-m", *torchrun(29612), str(worker), str(model)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_lora_trains_adapters_norms_and_embeddings(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetuned(model, text, out, "--preset", "lora", "--learning-rate", "1e-2")
    before, after = open_checkpoint(str(model)), open_checkpoint(str(out))
    changed = {
        name
        for name, tensor in after.tensors.items()
        if not np.array_equal(
            tensor.read_f32(0, tensor.rows),
            before.tensors[name].read_f32(0, tensor.rows),
        )
    }
    expected = {n for n in after.tensors if "self_attn" in n or "norm" in n or "embed" in n}
    assert changed == expected


def test_adapters_are_merged_as_peft_merges(model: Path) -> None:
    from peft.tuners.lora import LoraLayer

    recipe = Recipe("lora", 1, 64, 1, 1, 1e-5, lora_rank=8, lora_alpha=24)
    tuned = load_model(model, open_checkpoint(str(model)).rope, recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    merged = merged_weights(tuned.state_dict(), recipe)
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        before = layer.base_layer.weight.clone()
        layer.merge()
        assert not torch.equal(layer.base_layer.weight, before)
        torch.testing.assert_close(merged[f"{name}.weight"], layer.base_layer.weight)


def test_frequencies_of_another_factor_are_refused(whole: Path) -> None:
    rope = open_checkpoint(str(whole)).rope
    recipe = Recipe("quick", 2, 64, 1, 1, 1e-5)
    model = load_model(whole, rope, recipe)
    other = rope.interpolate(1.0001)
    with pytest.raises(ConvertError, match="frequencies are not those"):
        require_frequencies(model, other, "after loading")


def test_a_saved_config_of_another_factor_is_refused(whole: Path, tmp_path: Path) -> None:
    rope = open_checkpoint(str(whole)).rope
    model = load_model(whole, rope, Recipe("quick", 2, 64, 1, 1, 1e-5))
    require_saved_frequencies(whole, model, rope)
    config = json.loads((whole / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 2
    for key in ("rope_scaling", "rope_parameters"):
        config[key]["factor"] = 4.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="after saving the model's frequencies are not those"):
        require_saved_frequencies(tmp_path, model, rope)


def test_positions_are_those_of_the_window_whatever_documents_are_in_it(whole: Path) -> None:
    """EOS stands in the middle; transformers is told every position."""
    import transformers

    checkpoint = open_checkpoint(str(whole))
    model = load_model(whole, checkpoint.rope, Recipe("quick", 2, 64, 1, 1, 1e-5)).eval()
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, 30] = checkpoint.vocabulary.special_ids["eos"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    positions = torch.arange(64)[None]
    reset = torch.cat([torch.arange(31), torch.arange(33)])[None]
    with torch.inference_mode():
        found = model(input_ids=ids)["loss"].item()
        right = plain(input_ids=ids, labels=ids, position_ids=positions).loss.item()
        wrong = plain(input_ids=ids, labels=ids, position_ids=reset).loss.item()
    assert found == pytest.approx(right, rel=1e-5)
    assert abs(wrong - right) > 1e-3


def test_verify_takes_what_export_makes_of_it_with_no_flag(whole: Path, tmp_path: Path) -> None:
    flags = ["--to", "gguf", "--quantize", "f16", "--out", str(tmp_path)]
    assert CliRunner().invoke(export, [str(whole), *flags]).exit_code == 0
    (file,) = tmp_path.glob("*.gguf")
    proven = CliRunner().invoke(verify, [str(file), "--against", str(whole), "--threads", "1"])
    assert proven.exit_code == 0, proven.output
    assert "PROVEN" in proven.output


def test_no_steps_is_wrong_usage(model: Path, text: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, words(model, text, tmp_path / "x", steps=0))
    assert result.exit_code == 2
