"""Passkeys: the prompts, what a pass says of them, and the rule for k_max."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.errors import UnsupportedError
from converters.progress import silent
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert import cli
from pi_convert.commands._measuring import RunOptions
from pi_convert.commands._models import Opening, open_model
from pi_convert.evaluate.cost import Speed
from pi_convert.evaluate.models import Model
from pi_convert.evaluate.passkey import (
    FILLER,
    AtDepth,
    Passkey,
    measure_passkey,
    plan_passkey,
    within_budget,
)
from pi_convert.evaluate.statistics import wilson_interval
from tests.tiny import ODD, with_context, write_tiny, write_tiny_onnx

ONE = RunOptions("cpu", 1, 512, flash_attention=False, kv_cache_type="f32", n_gpu_layers=None)
# Nats over an answer of six tokens, float32 all: measured 5e-5 at most.
LOG_PROBABILITY = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("passkey") / "Tiny", shape=with_context(ODD, 512))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(str(folder), Opening(ONE, scale=2.0))


def test_the_prompt_is_the_papers(model: Model, folder: Path) -> None:
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    plan = plan_passkey(model, 1000, depths=5, trials=3)
    form = re.compile(
        r"There is an important info hidden inside a lot of irrelevant text\. Find it and memorize"
        r" them\. I will quiz you about the important information there\.\n"
        rf"(?P<before>({re.escape(FILLER)})*)"
        r"The pass key is (?P<key>\d{5})\. Remember it\. (?P=key) is the pass key\.\n"
        rf"(?P<behind>({re.escape(FILLER)})+)"
        r"What is the pass key\? The pass key is (?P=key)"
    )
    behind: dict[int, int] = {}
    for prompt in plan.prompts:
        text = decode(prompt.tokens.tolist())
        found = form.fullmatch(text)
        assert found is not None, text
        assert found["key"] == prompt.key
        answer = decode(prompt.tokens[prompt.answer_from :].tolist())
        assert answer == f" {prompt.key}"
        told = decode(prompt.tokens[prompt.answer_from - prompt.distance :].tolist())
        assert told.startswith(f"The pass key is {prompt.key}")
        behind[prompt.depth] = found["behind"].count("\n")
        assert found["before"].count("\n") + behind[prompt.depth] == behind[max(behind)]
        assert 900 < len(prompt.tokens) <= 1000
    whole = behind[4]
    assert behind == {i: round(whole * (i + 1) / 5) for i in range(5)}
    keys = {(p.depth, p.trial): p.key for p in plan.prompts}
    assert len(keys) == 15
    assert len(set(keys.values())) > 10
    assert plan_passkey(model, 1000, depths=5, trials=3).prompts[7].key == plan.prompts[7].key


def test_a_model_that_adds_bos_gets_it(model: Model) -> None:
    with_bos = dataclasses.replace(model, bos=(1,))
    plan = plan_passkey(with_bos, 600, depths=2, trials=1)
    assert all(prompt.tokens[0] == 1 for prompt in plan.prompts)
    plain = plan_passkey(model, 600, depths=2, trials=1)
    assert [p.distance for p in plan.prompts] == [p.distance for p in plain.prompts]


def test_too_short_a_context_is_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="100 tokens hold no passkey prompt"):
        plan_passkey(model, 100)


def test_prompts_fill_the_context_but_for_a_line(model: Model) -> None:
    line = len(model.encode(FILLER))
    with pytest.raises(UnsupportedError) as refused:
        plan_passkey(model, 100)
    least = int(re.search(r"has (\d+) at least", str(refused.value))[1])  # type: ignore[index]
    spread = 3  # tokens by which the keys of this tokenizer differ
    for context in range(least + spread, least + 3 * line, 7):
        longest = plan_passkey(model, context, depths=2, trials=3).longest
        assert context - line - spread <= longest <= context


def test_one_pass_gives_transformers_own_numbers(model: Model, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = plan_passkey(model, 700, depths=3, trials=2)
    runtime = model.load(silent)
    found = measure_passkey(runtime, plan)
    runtime.close()
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    oracle = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    for prompt, answer in zip(plan.prompts, found.answers, strict=True):
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))
        with torch.inference_mode():
            log_p = oracle(ids[None]).logits[0].double().log_softmax(-1)
        right = sum(log_p[i - 1, ids[i]].item() for i in range(prompt.answer_from, len(ids)))
        assert answer.log_probability == pytest.approx(right, abs=LOG_PROBABILITY)
        assert not answer.found  # random weights


def test_three_runtimes_agree_and_reuse_what_prompts_share(model: Model, folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder)).interpolate(2)
    (gguf,) = write_gguf(checkpoint, plan_gguf(checkpoint, ["f32"]), folder.parent / "gguf")
    onnx = write_tiny_onnx(checkpoint, folder.parent / "onnx")
    plan = plan_passkey(model, 700, depths=3, trials=2)
    assert plan.fed < 0.75 * sum(len(prompt.tokens) for prompt in plan.prompts)
    found = []
    for one in (model, *(open_model(str(path), Opening(ONE)) for path in (gguf.path, onnx))):
        again = plan_passkey(one, 700, depths=3, trials=2)
        assert all(np.array_equal(a.tokens, b.tokens)
                   for a, b in zip(plan.prompts, again.prompts, strict=True))  # fmt: skip
        runtime = one.load(silent)
        answers = measure_passkey(runtime, plan).answers
        runtime.close()
        found.append([answer.log_probability for answer in answers])
    assert found[1] == pytest.approx(found[0], abs=LOG_PROBABILITY)
    assert found[2] == pytest.approx(found[0], abs=LOG_PROBABILITY)


class Retriever:
    """A runtime that repeats the digits told at most ``reach`` tokens back, else says nothing."""

    vocabulary = 512

    def __init__(self, plan: Any, reach: int) -> None:
        self._answers = {p.tokens.tobytes(): p for p in plan.prompts}
        self._reach = reach
        self._fed: list[int] = []

    def open_session(self, context_tokens: int) -> Retriever:
        return self

    def keep(self, count: int) -> int:
        del self._fed[count:]
        return count

    def feed(self, tokens: np.ndarray, *, position: int, logits: bool) -> np.ndarray | None:
        assert position == len(self._fed)  # what was kept is not fed again, and nothing is left out
        self._fed += tokens.tolist()
        if not logits:
            return None
        out = np.zeros((len(tokens), self.vocabulary), np.float32)
        for prompt in self._answers.values():
            if self._fed == prompt.tokens[:-1].tolist() and prompt.distance <= self._reach:
                out[np.arange(len(tokens)), prompt.tokens[prompt.answer_from :]] = 5.0
        return out

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("reach", [0, 400, 10_000])
def test_k_max_is_how_far_the_model_sees(reach: int, model: Model) -> None:
    plan = plan_passkey(model, 1000, depths=8, trials=2)
    runtime: Any = Retriever(plan, reach)
    found = measure_passkey(runtime, plan)
    distances = sorted({prompt.distance for prompt in plan.prompts})
    seen = [d for d in distances if d <= reach]
    assert [d.distance for d in found.depths] == distances
    assert [d.found for d in found.depths] == [2] * len(seen) + [0] * (8 - len(seen))
    assert found.k_max == max(seen, default=0)


def at(distance: int, found: int) -> AtDepth:
    return AtDepth(distance, found, 10, -1.0)


def test_k_max_stops_at_the_first_distance_below_a_fifth() -> None:
    depths = (at(100, 10), at(200, 6), at(300, 2), at(400, 1), at(500, 9))
    found = Passkey((), depths, 1000, 0.0)
    assert found.k_max == 300
    # Wilson at 10 trials: 6 found is 0.31 to 0.83, 2 is 0.06 to 0.51, 1 is 0.02 to 0.40.
    assert found.k_max_bounds == (200, 500)


def test_wilsons_interval() -> None:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z^2 = 3.8415."""
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.8415, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_budget_takes_trials_then_distances(model: Model) -> None:
    plan = plan_passkey(model, 1000, depths=8, trials=4)
    speed = Speed(0.01, 0.0, 0.0)
    whole = plan.seconds(speed)
    assert whole == pytest.approx(plan.fed * 0.01)
    assert within_budget(model, 1000, plan, speed, whole) is plan
    half = within_budget(model, 1000, plan, speed, whole / 2)
    assert (half.depths, half.seconds(speed) <= whole / 2) == (8, True)
    assert 1 <= half.trials < 4
    least = within_budget(model, 1000, plan, speed, 1e-3)
    assert (least.depths, least.trials) == (2, 1)
    seeded = [within_budget(model, 1000, plan, speed, whole / 2, seed=s) for s in (0, 5)]
    assert [p.key for p in seeded[0].prompts] == [p.key for p in half.prompts]
    assert [p.key for p in seeded[1].prompts] != [p.key for p in half.prompts]


def test_the_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--max-context", "512", "--depths", "3", "--trials", "2", "--threads", "1"]
    assert cli.run(["passkey", str(folder), *words]) == 0
    printed = capfd.readouterr()
    assert "k_max none" in printed.out
    assert "6 prompts of up to" in printed.err
    assert cli.run(["passkey", str(folder), *words, "--json", "--budget", "0.00001"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert (found["depths_asked"], found["trials_asked"]) == (3, 2)
    assert "2 distances x 1 trial (of 3 x 2 asked for)" in printed.err
    (one,) = found["models"]
    assert len(one["answers"]) == len(one["depths"]) == 2
    # Torch alone ran: nothing of llama.cpp is on record.
    assert not {"ubatch", "kv_cache_type"} & set(found["environment"])
    assert cli.run(["passkey", str(folder), "--max-context", "513"]) == 1
    assert "513 tokens are past the context" in capfd.readouterr().err


@pytest.mark.parametrize("budget", [[], ["--budget", "0.00001"]])
def test_a_context_with_few_lines_of_filler_says_so(
    budget: list[str], folder: Path, model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = plan_passkey(model, 300, depths=32, trials=1).depths
    assert 2 < lines < 32
    words = ["--max-context", "300", "--depths", "32", "--trials", "1", "--threads", "1"]
    assert cli.run(["passkey", str(folder), *words, *budget]) == 0
    (cost,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("cost: "))
    assert f"{2 if budget else lines} distances x 1 trial (of 32 x 1 asked for)" in cost
    assert cost.endswith(
        f"only {lines} of 32 distances exist at this context: the passkey moves by whole lines of"
        " filler"
    )
    # Negative control: where all of them exist nothing is said.
    assert cli.run(["passkey", str(folder), *words[:2], "--depths", "2", *words[4:]]) == 0
    assert "exist at this context" not in capfd.readouterr().err


def test_the_default_model_finds_it_as_greedy_decoding_does(default_gguf: Path) -> None:
    model = open_model(str(default_gguf), Opening(dataclasses.replace(ONE, threads=2)))
    plan = plan_passkey(model, 230, depths=2, trials=1)
    runtime = model.load(silent)
    found = measure_passkey(runtime, plan)
    for prompt, answer in zip(plan.prompts, found.answers, strict=True):
        fed, digits = prompt.tokens[: prompt.answer_from], []
        with runtime.open_session(plan.longest) as session:
            logits = session.feed(fed, position=0, logits=True)
            for step in range(len(prompt.tokens) - prompt.answer_from):
                assert logits is not None
                digits.append(int(logits[-1].argmax()))
                token = np.array(digits[-1:], np.int32)
                logits = session.feed(token, position=len(fed) + step, logits=True)
        right = prompt.tokens[prompt.answer_from :].tolist()
        assert answer.found == (digits == right)
        assert answer.found
    runtime.close()
