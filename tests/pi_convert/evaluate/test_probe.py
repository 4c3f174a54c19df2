"""A stripped factor is found from the weights; a model without one gives none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import SourceError
from pi_convert import cli
from pi_convert.evaluate.probe import FACTORS, Fit, Probe, likely_factors, probe_windows
from pi_convert.evaluate.statistics import Mean
from pi_convert.evaluate.windows import TokenStream
from pi_convert.report.probe import ProbeReport, probe_text
from tests.tiny import Shape, write_tiny

SMALL = Shape(hidden=64, intermediate=128, layers=1, heads=4, kv_heads=2, head_dim=16, context=32)
PERIOD, WINDOW, STEPS, RATE = 12, 96, 250, 1e-2


def periodic(seed: int, count: int) -> str:
    """Digits that repeat: after one period each is known, to a model that looks 12 back."""
    block = "".join(random.Random(seed).choices("0123456789", k=PERIOD))
    return (block * (count // PERIOD + 1))[:count]


def train(folder: Path, factor: float) -> Path:
    """A model trained with ``factor`` whose config does not say so; its L is 32."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tiny(folder, shape=SMALL)
    config = AutoConfig.from_pretrained(folder)
    if factor != 1:
        config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0)
    for step in range(STEPS):
        texts = [periodic(1000 + 8 * step + i, WINDOW) for i in range(8)]
        ids = torch.tensor([one.ids for one in tokenizer.encode_batch(texts)])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("periodic")
    for seed in range(4):
        (folder / f"{seed}.txt").write_text(periodic(seed, 400))
    return [f"--text={path}" for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("factor", [3.0, 5.0, 6.0])
def test_a_stripped_factor_is_found(
    factor: float, texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path / "Stripped", factor)
    assert cli.run(["probe", str(folder), *texts, "--threads", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["factor"] == found["best"] == factor
    assert found["stated_factor"] == 1
    assert found["told_apart"]
    assert found["gain_over_factor_1"]["interval"][0] > 0.5
    assert [tried["factor"] for tried in found["tried"]] == list(FACTORS)
    assert (
        cli.run(["probe", str(folder), *texts, "--threads", "1", "--original-context", "32"]) == 0
    )
    words = f"{folder} --original-context 32 --scale {factor:g}"
    said = capfd.readouterr().out
    assert (
        f"with `pi-convert perplexity {words}`, and export with `pi-convert export {words} " in said
    )
    past = {t["factor"]: t["nll_past"] for t in found["tried"] if t["nll_past"] is not None}
    assert past[factor] < past[1]
    # A config that says another factor is contradicted, and one that says this is agreed with.
    config = json.loads((folder / "config.json").read_text())
    for stated, says in ((factor, "says the same"), (4.0, "DOES NOT AGREE")):
        config["rope_scaling"] = {"rope_type": "linear", "factor": stated}
        (folder / "config.json").write_text(json.dumps(config))
        words = ["--original-context", "32", "--threads", "1"]
        assert cli.run(["probe", str(folder), *texts, *words]) == 0
        text = capfd.readouterr().out
        assert f"Factor {factor:g} stands out" in text
        assert says in text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_the_factor_of_an_adapter_is_found(
    texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(train(tmp_path / "Stripped", 3.0))
    peft.get_peft_model(model, peft.LoraConfig(r=2)).save_pretrained(tmp_path / "tuned")
    words = ["probe", str(tmp_path / "tuned"), *texts, "--threads", "1", "--json"]
    assert cli.run(words) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["factor"] == 3
    assert found["stated_factor"] == 1


def curve(best: float, flatness: float) -> dict[float, float]:
    """NLL that is 1 nat lower at ``best`` than at factor 1; a parabola in log(factor)."""
    width = np.log(best)
    return {float(f): 2 + flatness * (np.log(f / best) / width) ** 2 for f in FACTORS} | {1.0: 3.0}


@pytest.mark.parametrize(
    ("best", "flatness", "expected"),
    [
        (1.75, 0.8, [2]),  # 0.8 (ln(2 / 1.75) / ln 1.75)^2 = 0.0455 nats behind, of 0.05 allowed
        (1.75, 1, [1.75]),  # 0.0569 behind
        (3.5, 1, [4]),  # 0.0114 behind; 6 0.1851
        (7, 1, [8]),  # 0.0047 behind; 12 0.0767
        (4, 1, [4]),  # a usual one is never raised; 6 is 0.0855 behind
        (4, 0.5, [4, 6]),  # 0.0428 behind; 8 0.125
        (5, 1, [6]),  # 0.0128 behind
        (5, 0.5, [6, 8]),  # 0.0064 and 0.0426 behind
        (5, 4, [5]),  # 0.0513 behind
        (32, 1, [32]),
    ],
)
def test_the_usual_factors_just_above_the_best_are_taken(
    best: float, flatness: float, expected: list[float]
) -> None:
    assert likely_factors(curve(best, flatness)) == expected


def test_what_is_not_told_from_the_best_is_taken_too() -> None:
    # 1.5, 2 and 3 are 0.067, 0.44 and 1.54 nats behind.
    nll = curve(1.25, 0.1)
    assert likely_factors(nll) == [1.25]
    assert likely_factors(nll, lambda factor: factor > 2) == [1.5, 2]


AGREES = "says the same", "states one of them", "DOES NOT AGREE"


@pytest.mark.parametrize(("stated", "says"), [(4.0, 0), (6.0, 1), (8.0, 2), (3.0, 2)])
def test_a_config_agrees_with_every_factor_that_the_weights_fit(stated: float, says: int) -> None:
    def mean(value: float) -> Mean:
        return Mean(value, 0.001, 1008, 1000)

    found = Probe(
        tried=(), factor=4.0, reason="", told=True, best=4.0, gain=mean(0.643), behind=None,
        also=(Fit(6.0, mean(0.018)),), rival=5.0, lead=mean(0.001), original_context=128,
        window=128, windows=16, seconds=1.0,
    )  # fmt: skip
    report = ProbeReport("x", "x", stated, found, {})
    text = probe_text(report)
    assert "Factor 4 stands out" in text
    assert "Almost as good: 6, 0.018 nats (95 %: 0.016 to 0.020) behind. The weights do not" in text
    assert [words for words in AGREES if words in text] == [AGREES[says]]
    (other,) = report.to_json()["also_fit"]  # type: ignore[misc]
    assert other["factor"] == 6


def test_an_untuned_model_has_none(
    texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path / "Base", 1.0)
    assert cli.run(["probe", str(folder), *texts, "--threads", "1"]) == 0
    text = capfd.readouterr().out
    assert "No factor stands out: no scaling predicts the text better than factor 1 does." in text


def test_random_weights_have_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        folder = write_tiny(tmp_path / str(seed), seed=seed)
        assert cli.run(["probe", str(folder), "--threads", "1", "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["factor"] is None
        assert "no better than by chance" in found["reason"]
        assert found["environment"]["text"] == "Python documentation"


def run_of(count: int, number: int = 0) -> TokenStream:
    tokens = np.arange(count, dtype=np.int32)
    return TokenStream(tokens, np.full(count, number, np.int32))


def test_windows_lie_below_l_and_one_across_it() -> None:
    windows = probe_windows([run_of(5000), run_of(300, 1)], 1024)
    assert len(windows.below) == 8  # of 20, of 256 tokens
    assert all((w.tokens, w.scored) == (256, 127) for w in windows.below)
    assert (windows.past.fed, windows.past.scored_from) == (1024 + 256, 1024)
    short = probe_windows([run_of(40), run_of(40, 1), run_of(60, 2)], 64)  # joined
    assert [w.tokens for w in short.below] == [64, 64]


def test_a_text_of_less_than_two_windows_is_refused() -> None:
    with pytest.raises(SourceError, match="the text has 100 tokens, and at least 128 are needed"):
        probe_windows([run_of(60), run_of(40, 1)], 64)
