"""Perplexity: which tokens are scored, and their NLL against transformers' and llama.cpp's own."""

from __future__ import annotations

import ctypes
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.errors import EnvironmentNotReadyError, SourceError, UnsupportedError
from converters.progress import silent
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert import cli
from pi_convert.commands._measuring import RunOptions
from pi_convert.commands._models import Opening, open_model
from pi_convert.evaluate.models import require_context, require_memory
from pi_convert.evaluate.perplexity import measure_perplexity, plan_windows
from pi_convert.evaluate.windows import TokenStream
from pi_convert.report import runlines
from tests.tiny import write_tiny, write_tiny_onnx

# llama.cpp's flash attention works in f16: off, so that all three are float32.
ONE = RunOptions("cpu", 1, 512, flash_attention=False, kv_cache_type="f32", n_gpu_layers=None)
WORDS = "RoPE turns each pair of a query by its position; 12 and 345 are numbers.\n"
# torch float32 on the CPU, nats a token: windows in chunks against transformers in one pass.
CHUNKED_NLL = 1e-5
# llama.cpp, f32 weights and cache, and ONNX Runtime fp32, against torch: nats a token, worst token.
RUNTIME_NLL = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("perplexity") / "Tiny-Model")  # L 128


@pytest.fixture(scope="module")
def scaled(folder: Path) -> dict[str, Path]:
    """The model with factor 4 as GGUF f32 and ONNX fp32."""
    checkpoint = open_checkpoint(str(folder)).interpolate(4)
    (gguf,) = write_gguf(checkpoint, plan_gguf(checkpoint, ["f32"]), folder.parent / "gguf")
    return {"gguf": gguf.path, "onnx": write_tiny_onnx(checkpoint, folder.parent / "onnx")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where = tmp_path_factory.mktemp("texts")
    paths = [where / f"{name}.txt" for name in ("long", "longer", "short")]
    for path, repeats in zip(paths, (14, 21, 2), strict=True):
        path.write_text("".join(f"{i}. {WORDS}" for i in range(repeats)))
    return paths


def runs_of(*lengths: int) -> list[TokenStream]:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    out, start = [], 0
    for number, length in enumerate(lengths):
        part = tokens[start : start + length]
        out.append(TokenStream(part, np.full(length, number, np.int32)))
        start += length
    return out


@pytest.mark.parametrize("joined", [False, True])
def test_every_context_scores_the_same_tokens(joined: bool) -> None:
    plan = plan_windows(runs_of(100, 30, 75), [64, 32], stride=8, most=0, joined=joined)
    targets: dict[int, list[int]] = {}
    for context in plan.contexts:
        targets[context] = []
        for window in plan.windows(context):
            tokens = window.stream.tokens
            assert len(tokens) == context == window.fed + 1
            assert np.array_equal(tokens, np.arange(tokens[0], tokens[0] + context))  # contiguous
            if not joined:
                assert len(set(window.stream.document)) == 1
            targets[context] += tokens[window.scored_from + 1 :].tolist()
    assert targets[32] == targets[64]
    assert len(targets[32]) == len(set(targets[32])) == plan.scored_tokens
    # 100 tokens hold (100 - 64) // 8 + 1 strides after a full window, 75 hold 2, 205 hold 18.
    assert len(plan.stretches) == plan.available == (18 if joined else 7)
    assert plan.too_short == (0 if joined else 1)
    assert plan.documents == (3 if joined else 2)


def test_few_windows_are_spread_over_all_texts() -> None:
    plan = plan_windows(runs_of(1000, 1000, 1000), [64], stride=8, most=6)
    assert (len(plan.stretches), plan.available, plan.documents) == (6, 354, 3)


def test_texts_shorter_than_a_window_are_refused() -> None:
    with pytest.raises(SourceError, match=r"the longest text has 50 tokens, .* 64") as raised:
        plan_windows(runs_of(50, 40), [64], stride=8, most=0)
    assert "--join" in raised.value.hint
    with pytest.raises(SourceError, match="all texts together have 50 tokens") as raised:
        plan_windows(runs_of(30, 20), [64], stride=8, most=0, joined=True)
    assert "--join" not in raised.value.hint


def sliding_nll(folder: Path, tokens: np.ndarray, context: int, stride: int, factor: float) -> Any:
    """NLL of each window's last tokens, a forward pass of transformers a window."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if factor != 1:
        config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids, out = torch.from_numpy(tokens.astype(np.int64)), []
    for stop in range(256, len(ids) + 1, stride):
        window = ids[stop - context : stop]
        with torch.inference_mode():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        out += [-log_p[i - 1, window[i]].item() for i in range(context - stride, context)]
    return np.array(out)


def test_torch_is_transformers_sliding_window(folder: Path, texts: list[Path]) -> None:
    model = open_model(str(folder), Opening(ONE, scale=4.0))
    tokens = np.array(model.encode(texts[0].read_text()), np.int32)
    run = TokenStream(tokens, np.zeros(len(tokens), np.int32))
    plan = plan_windows([run], [96, 256], stride=32, most=0)
    runtime = model.load(silent)
    found = measure_perplexity(runtime, plan)
    runtime.close()
    for at in found.at:
        right = sliding_nll(folder, tokens, at.context, 32, 4)
        assert np.abs(found.nll[at.context] - right).max() < CHUNKED_NLL
        assert at.perplexity == pytest.approx(math.exp(right.mean()), rel=1e-5)
        dropped = sliding_nll(folder, tokens, at.context, 32, 1)
        assert np.abs(found.nll[at.context] - dropped).max() > 1  # past L and below it
    (growth,) = found.growth
    difference = found.nll[256].mean() - found.nll[96].mean()
    assert growth.change.value == pytest.approx(difference, abs=1e-12)
    assert growth.change.interval is None  # one document


def test_three_runtimes_score_alike(
    folder: Path, scaled: dict[str, Path], texts: list[Path]
) -> None:
    opened = [
        open_model(str(folder), Opening(ONE, scale=4.0)),
        open_model(str(scaled["gguf"]), Opening(ONE)),
        open_model(str(scaled["onnx"]), Opening(ONE)),
    ]
    assert [m.runtime for m in opened] == ["torch", "llama.cpp", "ONNX Runtime"]
    assert {(m.original_context, m.context) for m in opened} == {(128, 512)}
    tokens = np.array(opened[0].encode(texts[0].read_text()), np.int32)
    run = TokenStream(tokens, np.zeros(len(tokens), np.int32))
    plan = plan_windows([run], [64, 256], stride=32, most=3)
    nll = []
    for model in opened:
        runtime = model.load(silent)
        nll.append(measure_perplexity(runtime, plan).nll)
        runtime.close()
    for context in plan.contexts:
        for other in nll[1:]:
            assert np.abs(other[context] - nll[0][context]).max() < RUNTIME_NLL


def test_the_command_measures_them_on_equal_tokens(
    folder: Path, scaled: dict[str, Path], texts: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"--text={path}" for path in texts]
    words += ["--contexts", "64,256", "--stride", "32", "--max-windows", "0", "--threads", "1"]
    models = [str(scaled["gguf"]), str(scaled["onnx"])]
    assert cli.run(["perplexity", *models, *words, "--kv-cache-type", "f32", "--json"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert found["schema_version"] == 1
    assert (found["documents"], found["documents_too_short"]) == (2, 1)
    a, b = found["models"]
    for one, other in zip(a["contexts"], b["contexts"], strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
        assert one["nll"]["documents"] == 2
        low, high = one["interval"]
        assert low < one["perplexity"] < high
    assert a["growth"][0]["sentence"].startswith("from 64 to 256 tokens ")
    assert a["against_first"] == []
    for one, other, change in zip(a["contexts"], b["contexts"], b["against_first"], strict=True):
        # A mean of paired differences is the difference of means.
        assert change["ratio"] == pytest.approx(other["perplexity"] / one["perplexity"], rel=1e-9)
        low, high = change["nll_change"]["interval"]
        assert high - low < (one["nll"]["interval"][1] - one["nll"]["interval"][0]) / 10
    assert printed.err.index("cost: about ") < printed.err.index("perplexity with 64 tokens")
    assert cli.run(["perplexity", str(folder), str(scaled["gguf"]), "--scale", "4", *words]) == 0
    text = capfd.readouterr().out
    (line,) = (line for line in text.splitlines() if "at 64 tokens:" in line)
    assert line.startswith("  against ")
    assert "(95 %, paired: " in line
    assert "the same at every context" in text
    assert "1 shorter than 256 tokens left out" in text
    assert "past L" in text


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ["--contexts", "1024"],
            1,
            "1,024 tokens are past the context of Tiny-Model",
        ),
        (["--contexts", "64,x"], 2, "no list of numbers"),
        (["--contexts", "1"], 2, "2 tokens or more"),
        (["--contexts", "64", "--stride", "64"], 2, "--stride 64 is not below"),
        (["--contexts", "128", "--stride", "8", "--text", "SHORT"], 1, "longest text has"),
        (["--contexts", "128", "--stride", "8", "--text", "BINARY"], 1, "is no UTF-8 text"),
        (["--contexts", "128", "--stride", "8", "--text", "NUL"], 1, "is a binary file"),
        (["--contexts", "128", "--stride", "8", "--text", "T.jsonl"], 1, "is a table"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(
    words: list[str],
    code: int,
    says: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "SHORT").write_text(WORDS)
    (tmp_path / "BINARY").write_bytes(bytes(range(256)))
    (tmp_path / "NUL").write_bytes(b"a\0b")
    (tmp_path / "T.jsonl").write_text('{"text": "a"}')
    words = [str(tmp_path / w) if (tmp_path / w).is_file() else w for w in words]
    assert cli.run(["perplexity", str(folder), *words]) == code
    printed = capfd.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_contexts_that_are_not_held_are_refused_before_work(
    folder: Path, scaled: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    onnx = open_model(str(scaled["onnx"]), Opening(ONE))
    require_context(onnx, 512, free_bytes=1 << 40)
    with pytest.raises(UnsupportedError, match="holds positions for 512 tokens, and 513"):
        require_context(onnx, 513, free_bytes=1 << 40, beyond=True)
    gguf = open_model(str(scaled["gguf"]), Opening(ONE))
    require_context(gguf, 513, free_bytes=1 << 40, beyond=True)
    # 2 (K and V) x 2 layers x 2 heads x 24 x 4 bytes a token
    assert gguf.sizes.cache_bytes == open_model(str(folder), Opening(ONE)).sizes.cache_bytes == 768
    with pytest.raises(EnvironmentNotReadyError, match=r"needs .* of memory, and"):
        require_context(gguf, 512, free_bytes=gguf.sizes.weight_bytes + 512 * 768)
    words = ["--scale", "2", "--contexts", "64", "--stride", "8"]
    assert cli.run(["perplexity", str(scaled["gguf"]), *words]) == 2
    assert "--runtime pytorch takes its weights" in capfd.readouterr().err
    words = ["--protocol", "llama.cpp", "--contexts", "64", "--stride", "8"]
    assert cli.run(["perplexity", str(scaled["gguf"]), *words]) == 2
    assert "it takes no --stride" in capfd.readouterr().err
    words = ["--protocol", "llama.cpp", "--contexts", "2"]
    assert cli.run(["perplexity", str(scaled["gguf"]), *words]) == 1
    assert "llama-perplexity's protocol scores none" in capfd.readouterr().err
    for words, says in (
        (["--runtime", "llama.cpp"], "a runtime is chosen for GGUF files"),
        (["--kv-cache-type", "q8_0"], "--kv-cache-type is of llama.cpp"),
        (["--no-flash-attention"], "--flash-attention is of llama.cpp"),
        (["--n-gpu-layers", "0"], "--n-gpu-layers is of llama.cpp"),
        (["--ubatch", "64"], "--ubatch is of llama.cpp"),
        # Values that are the defaults are given all the same.
        (["--kv-cache-type", "f16"], "--kv-cache-type is of llama.cpp"),
        (
            ["--ubatch", "512", "--no-flash-attention"],
            "--ubatch and --flash-attention are of llama.cpp",
        ),
    ):
        assert cli.run(["perplexity", str(folder), *words]) == 2
        assert says in capfd.readouterr().err


def test_two_models_at_once_need_the_memory_of_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = open_model(str(folder), Opening(ONE))
    need = model.sizes.weight_bytes + 64 * model.sizes.cache_bytes
    room = int(1.5 * need / 0.9)
    require_memory([model], 64, free_bytes=room)
    with pytest.raises(EnvironmentNotReadyError, match=r" and .* with 64 tokens need "):
        require_memory([model, model], 64, free_bytes=room)
    monkeypatch.setattr(runlines, "available_memory_bytes", lambda: room)
    words = [str(folder), str(folder)]
    assert cli.run(["compare", *words, "--context", "64"]) == 1
    assert " with 64 tokens need " in capfd.readouterr().err
    assert (
        cli.run(["perplexity", *words, "--contexts", "64", "--stride", "32"]) == 0
    )  # one after the other


def test_models_of_one_name_are_told_apart_by_their_paths(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [str(write_tiny(tmp_path / name / "Tuned", seed=i)) for i, name in enumerate("ab")]
    words = ["--contexts", "64", "--stride", "8", "--max-windows", "2", "--threads", "1"]
    assert cli.run(["perplexity", *paths, str(folder), *words]) == 0
    printed = capfd.readouterr().out
    for path in paths:
        assert f"Tuned ({path}) in torch (L 128" in printed
    assert f"against Tuned ({paths[0]}) in torch at 64 tokens" in printed
    assert "\nTiny-Model in torch (L 128" in printed  # a name of its own stays
    assert cli.run(["perplexity", paths[0], paths[0], *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)  # one model twice: there is nothing to tell apart
    assert [model["model"] for model in found["models"]] == ["Tuned", "Tuned"]
    assert found["environment"]["text"] == "Python documentation"


def test_models_with_other_tokens_are_not_compared(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny(tmp_path / "Other", pre="gpt-2")
    words = ["--contexts", "64", "--stride", "8"]
    assert cli.run(["perplexity", str(folder), str(other), *words]) == 1
    assert "Tiny-Model and Other split pydoc" in capfd.readouterr().err


def llama_perplexity(path: Path, text: str, context: int, *, bos: bool) -> tuple[float, float]:
    """llama.cpp's tools/perplexity/perplexity.cpp line by line, through its C API."""
    from llama_cpp import llama_cpp as api

    params = api.llama_model_default_params()
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    vocab = api.llama_model_get_vocab(model)
    assert bool(api.llama_vocab_get_add_bos(vocab)) == bos
    room = (ctypes.c_int32 * 100_000)()
    data = text.encode()
    count = api.llama_tokenize(vocab, data, len(data), room, 100_000, True, False)
    tokens = list(room[:count])
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    settings.n_threads = settings.n_threads_batch = 1
    settings.flash_attn_type = 0
    ctx = api.llama_init_from_model(model, settings)
    first, nll, nll2, scored = context // 2, 0.0, 0.0, 0
    for start in range(0, count // context * context, context):
        api.llama_memory_clear(api.llama_get_memory(ctx), True)
        batch = api.llama_batch_init(context, 0, 1)
        batch.n_tokens = context
        for k in range(context):
            batch.token[k] = tokens[start + k]
            batch.pos[k], batch.n_seq_id[k], batch.seq_id[k][0] = k, 1, 0
            batch.logits[k] = k >= first
        if bos:
            batch.token[0] = api.llama_vocab_bos(vocab)
        assert api.llama_decode(ctx, batch) == 0
        for k in range(first, context - 1):
            logits = np.array(api.llama_get_logits_ith(ctx, k)[: api.llama_vocab_n_tokens(vocab)])
            v = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            v -= logits[tokens[start + k + 1]]
            nll, nll2, scored = nll + v, nll2 + v * v, scored + 1
        api.llama_batch_free(batch)
    api.llama_free(ctx)
    api.llama_model_free(model)
    mean = nll / scored
    return math.exp(mean), math.sqrt((nll2 / scored - mean**2) / (scored - 1)) * math.exp(mean)


@pytest.mark.parametrize("bos", [False, True])
def test_the_protocol_of_llama_perplexity(
    bos: bool, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny_gguf import write_tiny_gguf

    keys = {"tokenizer.ggml.add_bos_token": bos}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", folder, keys=keys)
    text = tmp_path / "text.txt"
    text.write_bytes("".join(f"{i}. {WORDS}\r\n" for i in range(20)).encode())
    right = llama_perplexity(path, text.read_bytes().decode().removesuffix("\n"), 64, bos=bos)
    words = ["--protocol", "llama.cpp", "--contexts", "64", "--threads", "1"]
    words.append("--no-flash-attention")
    assert cli.run(["perplexity", str(path), "--text", str(text), *words, "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)["models"][0]["contexts"]
    # One batch a window there, two here: flash attention would round to f16 by batch.
    assert found["perplexity"] == pytest.approx(right[0], rel=1e-4)
    assert found["standard_error_of_independent_tokens"] == pytest.approx(right[1], rel=1e-3)
    assert found["tokens"] == 31 * found["windows"]
    # Negative control: the other choice of BOS is another number.
    other = write_tiny_gguf(
        tmp_path / "other.gguf", folder, keys={"tokenizer.ggml.add_bos_token": not bos}
    )
    assert cli.run(["perplexity", str(other), "--text", str(text), *words, "--json"]) == 0
    (wrong,) = json.loads(capfd.readouterr().out)["models"][0]["contexts"]
    assert wrong["perplexity"] != pytest.approx(right[0], rel=1e-3)
    text.write_text(WORDS)
    assert cli.run(["perplexity", str(path), "--text", str(text), *words]) == 1
    assert "needs at least two windows: 128" in capfd.readouterr().err
