"""Two models compared: torch's own KL as the oracle, and files of three runtimes."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.errors import SourceError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert import cli
from pi_convert.commands._measuring import RunOptions
from pi_convert.commands._models import Opening, open_model
from pi_convert.evaluate.compare import compare, document_windows
from pi_convert.evaluate.models import encode_all
from pi_convert.evaluate.texts import Document
from pi_convert.evaluate.windows import TokenStream
from tests.tiny import write_tiny, write_tiny_onnx

ONE = RunOptions("cpu", 1, 512, flash_attention=False, kv_cache_type="f32", n_gpu_layers=None)
WORDS = "RoPE turns each pair of a query by its position; 12 and 345 are numbers.\n"
# Measured 4e-12 (ONNX Runtime) and 8e-12 (llama.cpp), float32 all; a dropped factor: over 0.5.
FLOAT_KL = 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("compare") / "Tiny-Model")  # L 128


@pytest.fixture(scope="module")
def scaled(folder: Path) -> list[Path]:
    """The model with factor 4 as GGUF f32 and ONNX fp32."""
    checkpoint = open_checkpoint(str(folder)).interpolate(4)
    (gguf,) = write_gguf(checkpoint, plan_gguf(checkpoint, ["f32"]), folder.parent / "gguf")
    return [gguf.path, write_tiny_onnx(checkpoint, folder.parent / "onnx")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where = tmp_path_factory.mktemp("texts")
    paths = [where / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text("".join(f"{i}{n}. {WORDS}" for n in range(4 + 4 * i)))
    return paths


def test_every_number_is_torchs(folder: Path, texts: list[Path]) -> None:
    """Factor 4 against factor 1, by transformers and torch.nn.functional.kl_div."""
    from transformers import AutoConfig, AutoModelForCausalLM

    models = [open_model(str(folder), Opening(ONE, scale=scale)) for scale in (4.0, None)]
    documents = [Document(path.name, path.read_text()) for path in texts]
    windows = document_windows(encode_all(models[0], documents), 300, 0)
    kl, nll, top = [], [[], []], []
    for window in windows:
        ids = torch.from_numpy(window.stream.tokens.astype(np.int64))
        log_p = []
        for factor in (4.0, 1.0):
            config = AutoConfig.from_pretrained(folder)
            rope = {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}
            config.rope_parameters = rope
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
            with torch.inference_mode():
                log_p.append(model(ids[None]).logits[0, :-1].double().log_softmax(-1))
        kl.append(
            torch.nn.functional.kl_div(log_p[1], log_p[0], reduction="none", log_target=True).sum(1)
        )
        top.append((log_p[0].argmax(1) == log_p[1].argmax(1)).double())
        for one, values in zip(log_p, nll, strict=True):
            values.append(-one[torch.arange(len(ids) - 1), ids[1:]])
    a, b = (model.load(lambda *_: None) for model in models)
    found = compare(a, b, windows)
    whole = torch.cat(kl)
    assert found.positions == len(whole)
    assert found.kl.value == pytest.approx(whole.mean().item(), rel=1e-5)
    assert found.kl_median == pytest.approx(whole.quantile(0.5).item(), rel=1e-4)
    assert found.top1 == pytest.approx(torch.cat(top).mean().item(), abs=2e-3)
    expected = [math.exp(torch.cat(one).mean().item()) for one in nll]
    assert found.perplexities == pytest.approx(expected, rel=1e-5)
    change = (torch.cat(nll[0]) - torch.cat(nll[1])).mean().item()
    assert found.nll_change.value == pytest.approx(change, abs=1e-5)
    assert found.kl.clusters == 3
    near, far = found.spans[0], found.spans[-1]
    assert (near.start, near.stop, far.start, far.stop) == (0, 64, 256, 299)
    positions = torch.cat([torch.arange(len(one)) for one in kl])
    assert near.kl.value == pytest.approx(whole[positions < 64].mean().item(), rel=1e-5)
    assert far.kl.value == pytest.approx(whole[positions >= 256].mean().item(), rel=1e-5)
    assert sum(span.kl.tokens for span in found.spans) == found.positions


@pytest.mark.parametrize("which", [0, 1], ids=["gguf", "onnx"])
def test_a_right_file_is_its_source_and_another_factor_is_not(
    which: int,
    folder: Path,
    scaled: list[Path],
    texts: list[Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*(f"--text={path}" for path in texts), "--context", "300", "--threads", "1", "--json"]
    words.append("--extrapolate")
    file = str(scaled[which])
    if file.endswith(".gguf"):
        words += ["--kv-cache-type", "f32", "--no-flash-attention"]
    assert cli.run(["compare", file, str(folder), "--scale", "4", *words]) == 0
    right = json.loads(capfd.readouterr().out)
    assert right["kl"]["value"] < FLOAT_KL
    assert abs(right["nll_change"]["value"]) < 1e-3
    assert right["documents"] == 3
    assert cli.run(["compare", file, str(folder), *words]) == 0
    dropped = json.loads(capfd.readouterr().out)
    assert dropped["kl"]["value"] > 0.5
    assert all(span["kl"]["value"] > 0.1 for span in dropped["by_position"])  # below L and past it


def test_files_of_two_runtimes(
    scaled: list[Path], texts: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"--text={texts[2]}", "--context", "128", "--threads", "1", "--kv-cache-type", "f32"]
    assert cli.run(["compare", *map(str, scaled), *words]) == 0
    printed = capfd.readouterr()
    assert "in llama.cpp" in printed.out
    assert "in ONNX Runtime" in printed.out
    assert "one document: no interval" in printed.out
    assert "64 to 126" in printed.out
    assert "cost: about " in printed.err
    gguf = str(scaled[0])
    assert cli.run(["compare", gguf, gguf, "--runtime-b", "pytorch", *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [found[side]["runtime"] for side in "ab"] == ["llama.cpp", "torch"]
    assert cli.run(["compare", gguf, gguf, "--context", "513"]) == 1
    assert "513 tokens are past the context" in capfd.readouterr().err
    assert cli.run(["compare", gguf, gguf, "--scale", "4"]) == 2
    assert "--scale is for models that torch runs" in capfd.readouterr().err


class Watched:
    """A runtime whose logits count how many of them are alive."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.alive: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def open_session(self, context_tokens: int) -> Watched:
        return self

    def feed(self, tokens: np.ndarray, *, position: int, logits: bool) -> np.ndarray:
        self.alive = [one for one in self.alive if one() is not None]
        out = np.random.default_rng(position).normal(size=(len(tokens), self.vocabulary))
        out = out.astype(np.float32)
        self.alive.append(weakref.ref(out))
        self.most = max(self.most, len(self.alive))
        return out

    def keep(self, count: int) -> int:
        return count

    def close(self) -> None: ...
    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    tokens = np.arange(1500, dtype=np.int32) % 40
    run = TokenStream(tokens, np.zeros(1500, np.int32))
    a, b = Watched(40), Watched(40)
    found = compare(a, b, document_windows([run, run], 1500, 0))
    assert found.positions == 2 * 1499
    assert a.most == b.most == 1
    with pytest.raises(SourceError, match="one has 40 logits a position, the other 41"):
        compare(a, Watched(41), document_windows([run], 10, 0))


def test_llama_perplexitys_protocol_scores_the_second_half_of_every_window(
    folder: Path, texts: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), str(folder), *(f"--text={path}" for path in texts), "--threads", "1"]
    words += ["--protocol", "llama.cpp", "--context", "64", "--max-windows", "2", "--json"]
    assert cli.run(["compare", *words]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["positions"] == 2 * (64 - 64 // 2 - 1)  # the last token of a window is only told
    assert [(span["start"], span["stop"]) for span in found["by_position"]] == [(0, 63)]
    assert found["kl"]["value"] == 0
    assert cli.run(["compare", *words[:2], "--max-windows", "2"]) == 2
    assert "--protocol llama.cpp" in capfd.readouterr().err
    assert cli.run(["compare", *words[:2], "--protocol", "llama.cpp", "--documents", "2"]) == 2
    assert "--max-windows in place" in capfd.readouterr().err
