"""Both runtimes against transformers' own loading, on tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.checkpoint import Checkpoint
from converters.errors import ConvertError, EnvironmentNotReadyError, SourceError, UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert.evaluate.statistics import kl_divergence
from pi_convert.runtimes.llamacpp import (
    ImposedRope,
    LlamaCppModel,
    LlamaCppOptions,
    LlamaCppTokenizer,
    load_in_child,
)
from pi_convert.runtimes.pytorch import TorchModel, reference_rope
from tests.tiny import ODD, with_context, write_tiny

SHAPE = with_context(ODD, 64)
TOKENS = np.random.default_rng(0).integers(3, 512, 900).astype(np.int32)
ONE = LlamaCppOptions(threads=1)
# torch float32 on the CPU, logits of up to 10: chunked against whole attention.
CHUNKED_LOGITS = 2e-4
# llama.cpp f16 on the CPU, nats; a wrong RoPE comes to 2 and more on this model.
F16_KL = 3e-5


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runtimes") / "tiny"
    write_tiny(folder, architecture=request.param, shape=SHAPE, tied=request.param == "qwen2")
    checkpoint = open_checkpoint(str(folder))
    scaled = checkpoint.interpolate(8)
    (artifact,) = write_gguf(scaled, plan_gguf(scaled, ["f16"]), folder.parent / "out")
    return checkpoint, folder, artifact.path


def feed(session: Any, tokens: np.ndarray, position: int = 0) -> np.ndarray:
    parts = []
    for start in range(0, len(tokens), 512):
        part = np.ascontiguousarray(tokens[start : start + 512])
        parts.append(session.feed(part, position=position + start, logits=True))
    return np.concatenate(parts)


def huggingface_logits(folder: Path, rope: dict[str, Any] | None) -> np.ndarray:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if rope:
        config.rope_parameters = rope
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
        return loaded(ids).logits[0].numpy()


def test_torch_gives_what_transformers_loads_itself(model: Any) -> None:
    checkpoint, folder, _ = model
    runtime = TorchModel(checkpoint.interpolate(8))
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    found = feed(runtime.open_session(len(TOKENS)), TOKENS)
    assert np.abs(found - huggingface_logits(folder, linear)).max() < CHUNKED_LOGITS
    # Another RoPE on the same weights, without building the model again; and back.
    plain = feed(runtime.open_session(len(TOKENS), rope=checkpoint.rope), TOKENS)
    assert np.abs(plain - huggingface_logits(folder, None)).max() < CHUNKED_LOGITS
    assert np.abs(plain - found).max() > 1
    again = feed(runtime.open_session(len(TOKENS)), TOKENS)
    assert np.array_equal(again, found)


def test_two_torch_sessions_go_in_lockstep(model: Any) -> None:
    checkpoint, _, _ = model
    runtime = TorchModel(checkpoint.interpolate(8))
    alone = feed(runtime.open_session(900), TOKENS)
    a = runtime.open_session(900)
    b = runtime.open_session(900, rope=checkpoint.rope)
    found = []
    for start in (0, 512):
        part = TOKENS[start : start + 512]
        found.append(a.feed(part, position=start, logits=True))
        b.feed(part, position=start, logits=False)
    assert np.array_equal(np.concatenate(found), alone)


def test_llama_cpp_agrees_with_torch_past_l_and_far_out(model: Any) -> None:
    checkpoint, _, path = model
    torch_runtime = TorchModel(checkpoint.interpolate(8))
    name = checkpoint.architecture.gguf_name
    with LlamaCppModel(path, name, ONE) as artifact:
        for position in (0, 65_024):
            with artifact.open_session(900) as session:
                found = feed(session, TOKENS, position)
            right = feed(torch_runtime.open_session(900), TOKENS, position)
            assert kl_divergence(found, right).mean() < F16_KL
            wrong = feed(torch_runtime.open_session(900, rope=checkpoint.rope), TOKENS, position)
            assert kl_divergence(found, wrong).mean() > 1


def test_logits_stay_as_they_were_for_as_long_as_somebody_has_them(model: Any) -> None:
    checkpoint, _, path = model
    parts = [TOKENS[start : start + 100] for start in (0, 100, 200)]
    with LlamaCppModel(path, checkpoint.architecture.gguf_name, ONE) as artifact:
        with artifact.open_session(300) as session:
            first = session.feed(parts[0], position=0, logits=True)
            row, copy = first[3], first.copy()
            del first
            second = session.feed(parts[1], position=100, logits=True)
            assert np.array_equal(row, copy[3])
            place = second.ctypes.data
            del second
            third = session.feed(parts[2], position=200, logits=True)
            assert third.ctypes.data == place  # nobody had the second
        assert np.array_equal(row, copy[3])
        with artifact.open_session(300) as session:
            again = np.concatenate(
                [session.feed(p, position=i * 100, logits=True).copy() for i, p in enumerate(parts)]
            )
    assert np.array_equal(again[:100], copy)
    assert np.array_equal(again[200:], third)


def test_imposing_the_stored_rope_changes_no_bit_and_another_one_does(model: Any) -> None:
    checkpoint, _, path = model
    name = checkpoint.architecture.gguf_name

    def run(imposed: ImposedRope | None) -> np.ndarray:
        with LlamaCppModel(path, name, ONE, imposed) as artifact, artifact.open_session(64) as s:
            return feed(s, TOKENS[:64])

    plain = run(None)
    assert np.array_equal(plain, run(ImposedRope.of(checkpoint.interpolate(8).rope)))
    assert not np.array_equal(plain, run(ImposedRope.of(checkpoint.interpolate(8.001).rope)))
    off = run(ImposedRope(type="none"))
    assert np.array_equal(off, run(ImposedRope(factor=1.0)))
    assert not np.array_equal(off, plain)


def test_reference_rope_is_transformers_own_and_divides_llama3(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    write_tiny(tmp_path / "m", shape=SHAPE, rope={"rope_scaling": llama3})
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    config = LlamaConfig(
        head_dim=SHAPE.head_dim,
        hidden_size=SHAPE.hidden,
        num_attention_heads=SHAPE.heads,
        rope_parameters={**llama3, "rope_theta": 10000.0},
    )
    expected, attention = ROPE_INIT_FUNCTIONS["llama3"](config)
    found, factor = reference_rope(checkpoint, checkpoint.rope.interpolate(2))
    assert factor == attention == 1.0
    assert np.array_equal(found, expected.numpy() / np.float32(2))


def test_a_rope_that_transformers_would_not_build_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, _ = model
    monkeypatch.setattr(
        "pi_convert.runtimes.pytorch.write_config",
        lambda rope: {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    )
    with pytest.raises(ConvertError, match="builds other frequencies"):
        TorchModel(checkpoint)


def test_a_missing_tensor_is_not_left_on_meta(model: Any) -> None:
    checkpoint: Checkpoint = model[0]
    tensors = dict(checkpoint.tensors)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        TorchModel(dataclasses.replace(checkpoint, tensors=tensors))


def test_cuda_is_a_clear_error_where_there_is_none(model: Any) -> None:
    checkpoint, _, path = model
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(EnvironmentNotReadyError, match="no CUDA device"):
        TorchModel(checkpoint, device="cuda")
    for options in (LlamaCppOptions(device="cuda"), LlamaCppOptions(n_gpu_layers=3)):
        with pytest.raises(EnvironmentNotReadyError, match="cannot use a GPU"):
            LlamaCppModel(path, "llama", options)


def test_what_llama_cpp_refuses_comes_in_its_own_words(model: Any, tmp_path: Path) -> None:
    _, _, path = model
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError, match="failed to"):
        LlamaCppModel(cut, "llama", ONE)
    with pytest.raises(SourceError, match=r"cut\.gguf"):
        LlamaCppTokenizer(cut)
    assert "failed to" in (load_in_child(cut) or "")
    assert load_in_child(path) is None
    with LlamaCppModel(path, "llama", ONE) as artifact, artifact.open_session(8) as session:
        session.feed(TOKENS[:4], position=0, logits=False)
        with pytest.raises(SourceError, match="position 6"):
            session.feed(TOKENS[:2], position=6, logits=False)  # a gap
    with pytest.raises(ConvertError, match="q9_0"):
        LlamaCppModel(path, "llama", LlamaCppOptions(kv_cache_type="q9_0"))


def test_a_file_that_aborts_llama_cpp_does_not_take_this_process(
    model: Any, tmp_path: Path
) -> None:
    from tests.pi_convert.verify.gguf_tools import edit_rope

    broken = edit_rope(model[2], tmp_path / "ntk.gguf", {"rope.scaling.type": "ntk"})
    assert "signal 6" in (load_in_child(broken) or "")


def test_a_child_that_the_machine_fails_says_nothing_of_the_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "pi_convert.runtimes.llamacpp"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}._CHILD", "import os; os.kill(os.getpid(), 9)")
        with pytest.raises(EnvironmentNotReadyError, match="killed"):
            load_in_child(model[2])
        patch.setattr(f"{module}._CHILD", "import sys; print('no room'); sys.exit(4)")
        with pytest.raises(EnvironmentNotReadyError, match="no room"):
            load_in_child(model[2])
        patch.setattr(f"{module}._CHILD", "import time; time.sleep(60)")
        patch.setattr(f"{module}._CHILD_SECONDS", 0.2)
        with pytest.raises(EnvironmentNotReadyError, match="within"):
            load_in_child(model[2])
    # What lies in the current folder is not taken for the library.
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert load_in_child(model[2]) is None


def test_sizes_that_transformers_refuses_are_named(model: Any) -> None:
    checkpoint: Checkpoint = model[0]
    if checkpoint.architecture.gguf_name != "llama":
        pytest.skip("transformers checks this for llama only")
    sizes = dataclasses.replace(checkpoint.hparams, heads=7)
    with pytest.raises(UnsupportedError, match=r"7 heads: .*not a multiple"):
        TorchModel(dataclasses.replace(checkpoint, hparams=sizes))


def test_llama_cpps_tokenizer_reads_special_tokens_only_where_told(model: Any) -> None:
    with LlamaCppTokenizer(model[2]) as tokenizer:
        text = "a<|im_start|>b"
        (special,) = tokenizer.encode("<|im_start|>", add_special=False, parse_special=True)
        assert special == tokenizer.special_ids["bos"]
        assert special in tokenizer.encode(text, add_special=False, parse_special=True)
        assert special not in tokenizer.encode(text, add_special=False, parse_special=False)
        long = "word " * 40_000
        assert len(tokenizer.encode(long, add_special=False, parse_special=True)) >= 40_000


@pytest.mark.gpu
def test_torch_on_a_gpu_agrees_with_the_cpu(model: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    checkpoint, _, _ = model
    on_cpu = feed(TorchModel(checkpoint).open_session(900), TOKENS)
    on_gpu = feed(TorchModel(checkpoint, device="cuda").open_session(900), TOKENS)
    assert kl_divergence(on_gpu, on_cpu).mean() < 1e-7
