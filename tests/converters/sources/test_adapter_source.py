"""Adapters on their base, held against PEFT's own merge; and PyTorch pickles."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from converters.errors import RopeError, SourceError, TensorError, UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.huggingface import write_folder
from pi_convert import cli
from pi_convert.commands.export import command as export
from pi_convert.commands.inspect import command as inspect
from tests.tiny import VOCABULARY, write_tiny

# float32: PEFT multiplies whole matrices, we rows of them; sums of 8 products round otherwise.
MERGE = 1e-6
# float32 on the CPU, two layers, logits of standard deviation 2; see MERGE.
LOGITS = 1e-4
# peft 0.21 asks transformers 5.24 by a name that is deprecated there
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A saved PEFT adapter with random factors; returns PEFT's merged weights."""
    wrapped = trained(base, dtype, **more)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


def trained(
    base: Path,
    dtype: torch.dtype = torch.float32,
    *,
    initial: Path | None = None,
    rows: int = VOCABULARY,
    **more: Any,
) -> Any:
    """A PEFT model with random factors; ``initial`` gets the adapter as it is before training."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": TARGETS, **more})
    wrapped = peft.get_peft_model(model, config)
    if initial is not None:
        # as PEFT's examples/pissa_finetuning/pissa_finetuning.py has it
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(initial)
        wrapped.peft_config["default"].init_lora_weights = more["init_lora_weights"]
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.1)
    return wrapped


def assert_same_weights(folder: Path, expected: Any) -> None:
    for name, tensor in open_checkpoint(str(folder)).tensors.items():
        value = tensor.read_f32(0, tensor.rows).reshape(tensor.shape)
        right = expected[name].numpy()
        largest = max(1.0, float(np.abs(right).max()))  # its unit is the rounding's
        assert np.allclose(value, right, rtol=0, atol=MERGE * largest), name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]])
def test_merged_as_peft_merges(tmp_path: Path, rslora: bool, saved: list[str] | None) -> None:
    base = write_tiny(tmp_path / "base")
    expected = adapter(base, tmp_path / "tuned", use_rslora=rslora, modules_to_save=saved)
    found = open_checkpoint(str(tmp_path / "tuned"))
    changed = 0
    for name, tensor in found.tensors.items():
        value = tensor.read_f32(0, tensor.rows).reshape(tensor.shape)
        assert np.allclose(value, expected[name].numpy(), rtol=0, atol=MERGE), name
        parts = np.concatenate([tensor.read_f32(i, i + 1) for i in range(min(3, tensor.rows))])
        assert np.allclose(parts, tensor.read_f32(0, len(parts)), rtol=0, atol=MERGE)
        changed += not np.array_equal(value, load_file(base / "model.safetensors")[name].numpy())
    assert changed == 2 * len(TARGETS) + len(saved or [])


@pytest.mark.parametrize("words", [["perplexity", "FOLDER", "--contexts", "32"],
                                   ["compare", "FOLDER", "FOLDER", "--context", "32"],
                                   ["finetune", "FOLDER", "--text", "TEXT"]])  # fmt: skip
def test_a_factor_is_neither_guessed_nor_multiplied(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, tuned = write_tiny(tmp_path / "base"), tmp_path / "tuned"
    adapter(base, tuned)
    words = [str(tuned) if word == "FOLDER" else word for word in words]
    words = [str(tmp_path) if word == "TEXT" else word for word in words]
    capfd.readouterr()
    assert cli.run(words) == 2
    assert "Missing option '--scale'" in capfd.readouterr().err
    config = json.loads((base / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    (base / "config.json").write_text(json.dumps(config))
    assert cli.run([*words, "--scale", "4"]) == 1
    assert "on an adapter that records factor 4 would make 16" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied|tied weights)")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 1])
@pytest.mark.parametrize(
    ("saved", "keeps"),
    [
        (None, False),
        *itertools.product(
            (["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]), (False, True)
        ),
    ],
)
def test_a_tied_base_is_merged_as_peft_merges(
    tmp_path: Path, saved: list[str] | None, keeps: bool, rows: int
) -> None:
    base = write_tiny(tmp_path / "base", tied=True)
    wrapped = trained(base, rows=rows, modules_to_save=saved, ensure_weight_tying=keeps)
    wrapped.save_pretrained(tmp_path / "tuned")
    ids = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))
    expected = wrapped.merge_and_unload()
    found = open_checkpoint(str(tmp_path / "tuned"))
    assert found.hparams.tied_embeddings == (saved is None or keeps)
    write_folder(found, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, expected(ids).logits, rtol=0, atol=LOGITS)
    gguf = run(tmp_path / "tuned", "--out", tmp_path / "gguf", "--scale", 4)
    assert gguf.exit_code == 0, gguf.output


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied|tied weights)")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_factors_of_a_tied_head_alone_are_named(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", tied=True)
    adapter(base, tmp_path / "tuned", target_modules=[*TARGETS, "lm_head"])
    with pytest.raises(TensorError, match=r"lm_head.weight, which is .* \(tied\)") as raised:
        open_checkpoint(str(tmp_path / "tuned"))
    assert "Untie the base" in raised.value.hint


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_types_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    base = write_tiny(tmp_path / "base", dtype=dtype)
    expected = adapter(base, tmp_path / "tuned")  # PEFT in float32
    torch_type = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in open_checkpoint(str(tmp_path / "tuned")).tensors.items():
        value = torch.from_numpy(tensor.read_f32(0, tensor.rows).reshape(tensor.shape).copy())
        wanted = expected[name].to(torch_type).float()
        # A sum that lies at the middle of two may go either way.
        assert torch.count_nonzero(value != wanted) <= wanted.numel() // 1000 + 1, name
        assert torch.allclose(value, wanted, rtol=2**-7, atol=1e-6)


def longlora(tmp_path: Path, *, rows: int) -> Path:
    """LongLoRA's layout: pickled factors, and the embedding and norms beside them."""
    base = write_tiny(tmp_path / "base")
    adapter(base, tmp_path / "tuned")
    folder = tmp_path / "tuned"
    factors = load_file(folder / "adapter_model.safetensors")
    torch.save(factors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    stored = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(rows, stored["model.embed_tokens.weight"].shape[1], generator=generator)
    trained = {"base_model.model.model.embed_tokens.weight": embedding}
    trained |= {f"base_model.model.{n}": v + 1 for n, v in stored.items() if "norm" in n}
    torch.save(trained, folder / "trainable_params.bin")
    return folder


def test_longlora_with_a_larger_embedding_than_the_base(tmp_path: Path) -> None:
    folder = longlora(tmp_path, rows=VOCABULARY + 1)
    found = open_checkpoint(str(folder))
    assert found.hparams.vocab_size == VOCABULARY + 1
    assert found.config["vocab_size"] == VOCABULARY + 1
    trained = torch.load(folder / "trainable_params.bin", weights_only=True)
    for name, value in trained.items():
        tensor = found.tensors[name.removeprefix("base_model.model.")]
        assert np.array_equal(tensor.read_f32(0, tensor.rows).reshape(tensor.shape), value.numpy())
    head = found.tensors["lm_head.weight"]
    old = open_checkpoint(str(tmp_path / "base")).tensors["lm_head.weight"]
    assert head.shape[0] == VOCABULARY + 1
    assert np.array_equal(head.read_rows(0, VOCABULARY), old.read_rows(0, VOCABULARY))
    mean = old.read_f32(0, VOCABULARY).mean(axis=0)
    assert np.allclose(head.read_f32(VOCABULARY, VOCABULARY + 1)[0], mean, atol=1e-6)


def test_a_smaller_embedding_is_another_models(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="the base has 512"):
        open_checkpoint(str(longlora(tmp_path, rows=VOCABULARY - 1)))


def run(*words: object) -> Any:
    return CliRunner().invoke(export, [*map(str, words), "--to", "gguf", "--quantize", "f16"])


def test_an_adapter_that_records_no_factor_needs_a_scale(tmp_path: Path) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    silent = run(tmp_path / "tuned", "--out", tmp_path / "out")
    assert silent.exit_code == 2
    assert "nor its base records a factor" in silent.output
    assert "`pi-convert probe`" in silent.output
    shown = CliRunner().invoke(inspect, [str(tmp_path / "tuned")])
    assert "note: this model is an adapter" in shown.stdout
    assert run(tmp_path / "tuned", "--out", tmp_path / "out", "--scale", 4).exit_code == 0


def test_a_recorded_factor_is_used_and_does_not_compose(tmp_path: Path) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    rope = open_checkpoint(str(tmp_path / "tuned")).rope
    assert (rope.factor, rope.original_context, rope.context) == (4, 128, 4 * 128)
    assert run(tmp_path / "tuned", "--out", tmp_path / "out").exit_code == 0
    again = run(tmp_path / "tuned", "--out", tmp_path / "out2", "--scale", 4)
    assert isinstance(again.exception, RopeError)
    config["rope_theta"] = 5000.0
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RopeError, match="theta 5000"):
        open_checkpoint(str(tmp_path / "tuned"))


# (max_position_embeddings of 128 or of 4 x 128, original_max_position_embeddings,
# --original-context): (L, L')
LENGTHS: list[tuple[int, int | None, int | None, tuple[int, int]]] = [
    (128, None, None, (128, 512)),  # L as the base has it, not 128 / 4
    (512, None, None, (128, 512)),
    (256, None, None, (128, 256)),  # less than L x 4 is claimed
    (512, 128, None, (128, 512)),
    (128, None, 128, (128, 512)),
    (512, None, 256, (256, 512)),  # somebody who knows is believed
    (512, 256, 256, (256, 512)),
]


@pytest.mark.parametrize(("max_position", "original", "known", "expected"), LENGTHS)
def test_l_of_an_adapter_is_that_of_its_base(
    tmp_path: Path,
    max_position: int,
    original: int | None,
    known: int | None,
    expected: tuple[int, int],
) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    config["max_position_embeddings"] = max_position
    if original is not None:
        config["original_max_position_embeddings"] = original
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    rope = open_checkpoint(str(tmp_path / "tuned"), original_context=known).rope
    assert (rope.original_context, rope.context) == expected


def test_an_l_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    config |= {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(RopeError, match="L is 256 tokens, the base's is 128"):
        open_checkpoint(str(tmp_path / "tuned"))
    del config["original_max_position_embeddings"]  # past what the base has at this factor
    path.write_text(json.dumps(config))
    with pytest.raises(RopeError, match=r"1024, but the base's L \(base\) 128 with factor 4"):
        open_checkpoint(str(tmp_path / "tuned"))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", False])
def test_inits_that_leave_the_base_are_merged(tmp_path: Path, init: str | bool) -> None:
    base = write_tiny(tmp_path / "base")
    expected = adapter(base, tmp_path / "tuned", init_lora_weights=init)
    assert_same_weights(tmp_path / "tuned", expected)


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_inits_that_change_the_base_are_refused_and_the_hint_helps(
    tmp_path: Path, init: str, rslora: bool
) -> None:
    base, initial = write_tiny(tmp_path / "base"), tmp_path / "initial"
    wrapped = trained(base, initial=initial, init_lora_weights=init, use_rslora=rslora)
    wrapped.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UnsupportedError, match=f"init_lora_weights is '{init}'") as raised:
        open_checkpoint(str(tmp_path / "tuned"))
    assert "path_initial_model_for_weight_conversion" in raised.value.hint
    wrapped.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(initial)
    )
    assert_same_weights(tmp_path / "plain", wrapped.merge_and_unload().state_dict())


VARIANTS = [f.name for f in fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((name, {"some": 1}) for name in VARIANTS),
        *(("init_lora_weights", name) for name in ("corda", "loftq", "lora_ga", "mica")),
        ("init_lora_weights", ["gaussian"]),
        ("alora_invocation_tokens", [1, 2]),
        ("bias", "all"),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [7]),
        ("use_qalora", True),
        ("of_a_later_peft", True),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(
    tmp_path: Path, key: str, value: object
) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    restate(tmp_path / "tuned", **{key: value})
    with pytest.raises(UnsupportedError, match=f"{key} is"):
        open_checkpoint(str(tmp_path / "tuned"))
    restate(tmp_path / "tuned", **{key: None, "later": False})
    open_checkpoint(str(tmp_path / "tuned"))


@pytest.mark.parametrize("bases", [["."], ["../0"], ["../1", "../0"], ["../1", "../2", "../1"]])
def test_adapters_that_lead_back_to_themselves(tmp_path: Path, bases: list[str]) -> None:
    adapter(write_tiny(tmp_path / "base"), tmp_path / "tuned")
    for number, base in enumerate(bases):
        shutil.copytree(tmp_path / "tuned", tmp_path / str(number))
        restate(tmp_path / str(number), base_model_name_or_path=base)
    where = tmp_path / str(len(bases) - 1) / "adapter_config.json"
    with pytest.raises(SourceError, match="leads back to") as raised:
        open_checkpoint(str(tmp_path / "0"))
    assert raised.value.message.startswith(f"{where}: base_model_name_or_path")


def test_an_adapter_on_an_adapter_is_both(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    expected = adapter(base, tmp_path / "one")
    plain = {name: value.clone() for name, value in load_file(base / "model.safetensors").items()}
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    restate(tmp_path / "two", base_model_name_or_path="../one")
    # the same change twice: W + 2 (W' - W)
    twice = {name: 2 * value - plain[name] for name, value in expected.items()}
    assert_same_weights(tmp_path / "two", twice)


def restate(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_pickled_weights_are_the_safetensors(tmp_path: Path, shards: int, dtype: str) -> None:
    plain = write_tiny(tmp_path / "plain", dtype=dtype)
    folder = write_tiny(tmp_path / "pickled", dtype=dtype, shards=shards)
    index = folder / "model.safetensors.index.json"
    for path in sorted(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    if shards > 1:
        text = index.read_text().replace("model-0", "pytorch_model-0")
        text = text.replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    a, b = open_checkpoint(str(plain)).tensors, open_checkpoint(str(folder)).tensors
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].encoding is tensor.encoding
        assert np.array_equal(b[name].read_rows(0, tensor.rows), tensor.read_rows(0, tensor.rows))


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_that_holds_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    for content in (pickle.dumps(Harmful(), protocol=2), b"", b"PK\x03\x04"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
            open_checkpoint(str(folder))
    torch.save({"model.norm.weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="weights-only"):
        open_checkpoint(str(folder))
    assert not (tmp_path / "harmed").exists()
