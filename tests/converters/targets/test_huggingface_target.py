"""Folders that were written, loaded by transformers; values, files and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from converters.checkpoint import Checkpoint
from converters.encodings import BF16, F16, decode_f32
from converters.errors import OutputError, TensorError
from converters.ggml import load_ggml
from converters.sources import open_checkpoint
from converters.targets.huggingface import write_folder
from tests.tiny import ODD, ODD4, WIDE, with_context, write_tiny
from tests.tiny_gguf import write_tiny_gguf

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LLAMA3_1 = LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}
SCALE = 4.0
TOKENS = 400  # past L = 128, inside L' = 512

# Equal arithmetic on equal inputs: measured 0.0.
SAME_LOGITS = 1e-6
# Frequencies 6e-8 apart (longrope's lists divide by a rounded ratio): measured 1.5e-5.
NEAR_LOGITS = 1e-4
# Logits have a standard deviation of 2; another RoPE moves them by up to 11 to 13.
OTHER_LOGITS = 5.0


def logits(folder: Path, config: Any = None, **options: Any) -> torch.Tensor:
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = torch.randint(3, 512, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of logits past the original context."""
    return float((a - b)[:, 128:].abs().max())


def imposed(folder: Path, rope: dict[str, Any]) -> torch.Tensor:
    """transformers on the source's weights, its own config told what RoPE to use."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = rope
    config.max_position_embeddings = 512
    return logits(folder, config)


def loaded_inv_freq(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    inv_freq: torch.Tensor = model.model.rotary_emb.inv_freq
    return inv_freq


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
class TestTransformersLoadsIt:
    """The right factor and theta, past L; dropping the scaling keys is seen."""

    def test_default(self, tmp_path: Path, architecture: str) -> None:
        source = write_tiny(tmp_path / "s", architecture=architecture, rope={"rope_theta": 5e4})
        write_folder(open_checkpoint(str(source)), tmp_path / "out")
        expected = imposed(source, {"rope_type": "default", "rope_theta": 5e4})
        assert difference(logits(tmp_path / "out"), expected) <= SAME_LOGITS
        other = imposed(source, {"rope_type": "default", "rope_theta": 1e4})
        assert difference(other, expected) >= OTHER_LOGITS

    def test_linear(self, tmp_path: Path, architecture: str) -> None:
        source = write_tiny(tmp_path / "s", architecture=architecture, rope={"rope_theta": 5e4})
        write_folder(open_checkpoint(str(source)).interpolate(SCALE), tmp_path / "out")
        expected = imposed(source, {"rope_type": "linear", "rope_theta": 5e4, "factor": SCALE})
        assert difference(logits(tmp_path / "out"), expected) <= SAME_LOGITS
        self.check_the_scaling_matters(tmp_path / "out", expected)

    def test_composed(self, tmp_path: Path, architecture: str) -> None:
        rope = {"rope_scaling": {"type": "linear", "factor": 2.0}}
        config = {"max_position_embeddings": 256, "original_max_position_embeddings": 128}
        source = write_tiny(tmp_path / "s", architecture=architecture, rope=rope, config=config)
        write_folder(open_checkpoint(str(source)).interpolate(2), tmp_path / "out")
        expected = imposed(source, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
        assert difference(logits(tmp_path / "out"), expected) <= SAME_LOGITS

    def test_llama3(self, tmp_path: Path, architecture: str) -> None:
        rope = {"rope_theta": 1e4, "rope_scaling": LLAMA3}
        source = write_tiny(tmp_path / "s", architecture=architecture, rope=rope)
        write_folder(open_checkpoint(str(source)), tmp_path / "out")
        expected = imposed(source, {**LLAMA3, "rope_theta": 1e4})
        assert difference(logits(tmp_path / "out"), expected) <= SAME_LOGITS
        self.check_the_scaling_matters(tmp_path / "out", expected)

    def test_pi_over_llama3(self, tmp_path: Path, architecture: str) -> None:
        """Spelled as longrope: transformers must rotate by llama3's frequencies over the factor."""
        rope = {"rope_theta": 1e4, "rope_scaling": LLAMA3}
        source = write_tiny(tmp_path / "s", architecture=architecture, rope=rope)
        write_folder(open_checkpoint(str(source)).interpolate(SCALE), tmp_path / "out")
        wanted = loaded_inv_freq(source) / SCALE
        found = loaded_inv_freq(tmp_path / "out")
        assert torch.allclose(found, wanted, rtol=2.5e-7, atol=0)  # 2 ulp; measured 6e-8
        assert not torch.allclose(found, wanted * SCALE, rtol=0.5, atol=0)
        expected = self.with_frequencies(source, wanted)
        assert difference(logits(tmp_path / "out"), expected) <= NEAR_LOGITS
        self.check_the_scaling_matters(tmp_path / "out", expected)
        again = open_checkpoint(str(tmp_path / "out")).rope
        assert (again.factor, again.original_context, again.context) == (SCALE, 128, 512)

    def with_frequencies(self, folder: Path, inv_freq: torch.Tensor) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.model.rotary_emb.inv_freq = inv_freq
        ids = torch.randint(3, 512, (1, TOKENS), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            result: torch.Tensor = model(ids).logits
        return result

    def check_the_scaling_matters(self, folder: Path, expected: torch.Tensor) -> None:
        """Negative control: the same folder without its scaling keys."""
        path = folder / "config.json"
        text = path.read_text()
        config = json.loads(text)
        del config["rope_scaling"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        path.write_text(json.dumps(config))
        try:
            assert difference(logits(folder), expected) >= OTHER_LOGITS
        finally:
            path.write_text(text)


class TestConfig:
    def test_every_reader_finds_one_factor(self, tmp_path: Path) -> None:
        """The keys of transformers 5 and 4, mlx-lm and vLLM, side by side."""
        source = write_tiny(tmp_path / "s", rope={"rope_theta": 5e4})
        write_folder(open_checkpoint(str(source)).interpolate(2.2), tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.2}
        assert config["rope_parameters"] == {
            "rope_type": "linear", "factor": 2.2, "rope_theta": 5e4}  # fmt: skip
        assert config["rope_theta"] == 5e4
        assert config["max_position_embeddings"] == 281
        assert config["original_max_position_embeddings"] == 128
        assert config["vocab_size"] == 512  # the rest is carried on

    def test_a_config_that_states_its_context_twice_is_brought_up_to_date(
        self, tmp_path: Path
    ) -> None:
        source = write_tiny(
            tmp_path / "s",
            rope={"rope_scaling": {"type": "linear", "factor": 4.0}},
            config={"max_sequence_length": 512},
        )
        write_folder(open_checkpoint(str(source)).interpolate(2), tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["max_sequence_length"] == config["max_position_embeddings"] == 1024
        settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert settings["model_max_length"] == 1024
        rope = open_checkpoint(str(tmp_path / "out")).rope
        assert (rope.factor, rope.original_context, rope.context) == (8.0, 128, 1024)

    def test_a_folder_that_reads_back_as_another_rope_is_not_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from converters.rope.config import write_config
        from converters.targets import huggingface

        def wrong(rope: Any) -> dict[str, object]:
            return write_config(rope.interpolate(1.001))

        monkeypatch.setattr(huggingface, "write_config", wrong)
        source = write_tiny(tmp_path / "s")
        with pytest.raises(OutputError, match="reads back as"):
            write_folder(open_checkpoint(str(source)).interpolate(4), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["s"]


class TestBytes:
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_folder_is_copied_byte_for_byte(
        self, tmp_path: Path, dtype: str, shards: int, tied: bool
    ) -> None:
        source = write_tiny(tmp_path / "s", dtype=dtype, shards=shards, tied=tied)
        write_folder(open_checkpoint(str(source)).interpolate(8), tmp_path / "out")
        expected: dict[str, torch.Tensor] = {}
        for file in source.glob("*.safetensors"):
            expected |= load_file(file)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
        before = json.loads((source / "config.json").read_text())
        after = json.loads((tmp_path / "out" / "config.json").read_text())
        assert after["torch_dtype"] == before["torch_dtype"]

    def test_shards_and_index_are_transformers(self, tmp_path: Path) -> None:
        source = write_tiny(tmp_path / "s", dtype="bf16", shape=ODD4)
        checkpoint = open_checkpoint(str(source))
        artifact = write_folder(checkpoint, tmp_path / "out", max_shard_bytes=200_000)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        count = len(files)
        assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert count > 1
        assert {p.name for p in (tmp_path / "out").iterdir()} == artifact.files.keys()
        assert artifact.size_bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
        for file in files:
            assert (tmp_path / "out" / file).stat().st_size < 210_000
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
        a = AutoModelForCausalLM.from_pretrained(source).state_dict()
        b = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert open_checkpoint(str(tmp_path / "out")).parameters == checkpoint.parameters

    @pytest.mark.parametrize("source_dtype", ["f32", "f16", "bf16"])
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_conversion_rounds_as_torch(
        self, tmp_path: Path, source_dtype: str, dtype: str
    ) -> None:
        torch_dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        source = write_tiny(tmp_path / "s", dtype=source_dtype)
        write_folder(open_checkpoint(str(source)), tmp_path / "out", dtype=dtype)
        expected = load_file(source / "model.safetensors")
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
            assert tensor.dtype == torch_dtype
            assert torch.equal(tensor, expected[name].to(torch_dtype)), name
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == str(torch_dtype).removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.dtype == torch_dtype

    def test_encoding_rounds_to_nearest_even(self) -> None:
        generator = np.random.default_rng(3)
        bits = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
        bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # halves of bf16
        values = bits.view(np.float32)
        values = values[np.isfinite(values)].reshape(1, -1)
        for encoding, torch_dtype in ((F16, torch.float16), (BF16, torch.bfloat16)):
            expected = torch.from_numpy(values).to(torch_dtype).float().numpy()
            raw = load_ggml().quantize(encoding, values)
            assert np.array_equal(decode_f32(raw, encoding), expected)

    def test_what_f16_cannot_hold_is_an_error(self, tmp_path: Path) -> None:
        source = write_tiny(tmp_path / "s", dtype="bf16")
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"][7] = 70000.0
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(str(source))
        with pytest.raises(TensorError, match=r"model\.norm\.weight holds 70144, which f16"):
            write_folder(checkpoint, tmp_path / "out", dtype="f16")
        assert not (tmp_path / "out").exists()
        write_folder(checkpoint, tmp_path / "out")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [None, "f16"])
    def test_what_is_not_finite_is_an_error(
        self, tmp_path: Path, bad: float, dtype: str | None
    ) -> None:
        source = write_tiny(tmp_path / "s")
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][100, 3] = bad
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(TensorError, match=r"layers\.1\.mlp\.down_proj.*NaN or Inf in row 100"):
            write_folder(open_checkpoint(str(source)), tmp_path / "out", dtype=dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["s"]


class TestFiles:
    def test_side_files_travel(self, tmp_path: Path) -> None:
        source = write_tiny(tmp_path / "s")
        for name in ("generation_config.json", "LICENSE", "README.md"):
            (source / name).write_text("{}")
        write_folder(open_checkpoint(str(source)), tmp_path / "out")
        for name in ("generation_config.json", "LICENSE", "README.md", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()

    def test_an_old_folder_is_replaced_only_when_asked_and_only_when_done(
        self, tmp_path: Path
    ) -> None:
        checkpoint = open_checkpoint(str(write_tiny(tmp_path / "s")))
        write_folder(checkpoint, tmp_path / "out")
        with pytest.raises(OutputError, match="exists"):
            write_folder(checkpoint, tmp_path / "out")

        def interrupt(stage: str, done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        with pytest.raises(KeyboardInterrupt):
            write_folder(
                checkpoint.interpolate(2), tmp_path / "out", force=True, progress=interrupt
            )
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
        write_folder(checkpoint.interpolate(2), tmp_path / "out", force=True)
        assert open_checkpoint(str(tmp_path / "out")).rope.factor == 2.0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]

    def test_progress_counts_bytes(self, tmp_path: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        checkpoint = open_checkpoint(str(write_tiny(tmp_path / "s", dtype="bf16")))
        write_folder(checkpoint, tmp_path / "out", progress=lambda *report: seen.append(report))
        total = 2 * checkpoint.parameters
        assert seen[-1] == ("writing", total, total)
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)

    def test_the_same_checkpoint_gives_the_same_bytes(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(write_tiny(tmp_path / "s", shards=2))).interpolate(8)
        assert (
            write_folder(checkpoint, tmp_path / "a").files
            == write_folder(checkpoint, tmp_path / "b").files
        )


class TestFromGguf:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_gives_the_folder_back(self, tmp_path: Path, architecture: str, tied: bool) -> None:
        source = write_tiny(
            tmp_path / "s", architecture=architecture, tied=tied, shape=with_context(ODD, 128)
        )
        path = write_tiny_gguf(tmp_path / "Tiny-F32.gguf", source)
        write_folder(open_checkpoint(str(path)).interpolate(SCALE), tmp_path / "out")
        expected = load_file(source / "model.safetensors")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": SCALE}
        assert difference(logits(tmp_path / "out"), imposed(source, rope)) <= SAME_LOGITS
        assert difference(logits(tmp_path / "out"), logits(source)) >= OTHER_LOGITS

    def test_the_licence_travels(self, tmp_path: Path) -> None:
        keys = {"general.license": "apache-2.0", "general.tags": ["chat"],
                "general.base_model.count": 1,
                "general.base_model.0.repo_url": "https://huggingface.co/org/Base-1B"}  # fmt: skip
        path = write_tiny_gguf(tmp_path / "Tiny-F32.gguf", write_tiny(tmp_path / "s"), keys=keys)
        write_folder(open_checkpoint(str(path)), tmp_path / "out")
        card = open_checkpoint(str(tmp_path / "out")).card
        assert (card.name, card.license, card.tags) == ("Tiny", "apache-2.0", ("chat",))
        assert card.base_models == ("org/Base-1B",)

    def test_quantized_blocks_become_their_values(self, tmp_path: Path) -> None:
        import gguf

        source = write_tiny(tmp_path / "s", shape=WIDE)
        path = write_tiny_gguf(
            tmp_path / "Tiny-Q8_0.gguf", source, quantization=gguf.GGMLQuantizationType.Q8_0
        )
        checkpoint = open_checkpoint(str(path))
        write_folder(checkpoint, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in checkpoint.tensors.items():
            assert found[name].dtype is torch.float32
            values = tensor.read_f32(0, tensor.rows).reshape(tensor.shape)
            assert np.array_equal(found[name].numpy(), values)
        write_folder(checkpoint, tmp_path / "half", dtype="bf16")
        half = load_file(tmp_path / "half" / "model.safetensors")
        assert all(torch.equal(half[name], found[name].bfloat16()) for name in found)


def test_the_default_model_loads_and_speaks(tmp_path: Path, default_gguf: Path) -> None:
    """Its tensors are held against transformers' reading of the GGUF in test_gguf_source."""
    checkpoint = open_checkpoint(str(default_gguf))
    write_folder(checkpoint, tmp_path / "out")
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    for name, tensor in checkpoint.tensors.items():
        values = tensor.read_f32(0, tensor.rows).reshape(tensor.shape)
        assert np.array_equal(state[name].numpy(), values), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    config = AutoConfig.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size", "max_position_embeddings", "bos_token_id",
                "eos_token_id", "tie_word_embeddings"):  # fmt: skip
        assert getattr(model.config, key) == getattr(config, key), key
    assert model.config.rms_norm_eps == pytest.approx(config.rms_norm_eps, rel=1e-6)
    assert model.config.rope_parameters["rope_theta"] == 100_000.0


class TestRoundTrip:
    """Folder to GGUF to folder: the same bytes, and the same RoPE."""

    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_bytes(self, tmp_path: Path, architecture: str, dtype: str) -> None:
        source = write_tiny(tmp_path / "Tiny-Model", architecture=architecture, dtype=dtype)
        checkpoint = open_checkpoint(str(source)).interpolate(2.2)
        back = self.through_gguf(checkpoint, dtype, tmp_path)
        assert dataclasses.replace(back.rope, evidence=()) == dataclasses.replace(
            checkpoint.rope, evidence=()
        )
        assert (back.hparams, back.groups) == (checkpoint.hparams, checkpoint.groups)
        assert back.card.name == "Tiny-Model"
        expected = load_file(source / "model.safetensors")
        found = load_file(tmp_path / "back" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        ids = [AutoTokenizer.from_pretrained(f)("a = [1, 22]  # né")["input_ids"]
               for f in (source, tmp_path / "back")]  # fmt: skip
        assert ids[0] == ids[1]

    def test_pi_over_llama3(self, tmp_path: Path) -> None:
        rope = {"rope_theta": 5e5, "rope_scaling": LLAMA3_1}
        config = {"max_position_embeddings": 131072}
        source = write_tiny(tmp_path / "Tiny-Model", rope=rope, config=config)
        checkpoint = open_checkpoint(str(source)).interpolate(2)
        back = self.through_gguf(checkpoint, "f32", tmp_path)
        assert (back.rope.factor, back.rope.llama3) == (2.0, checkpoint.rope.llama3)
        assert back.rope.context == 262_144
        wanted = loaded_inv_freq(source) / 2
        assert torch.allclose(loaded_inv_freq(tmp_path / "back"), wanted, rtol=2.5e-7, atol=0)

    def through_gguf(self, checkpoint: Checkpoint, dtype: str, folder: Path) -> Checkpoint:
        from converters.targets.gguf import plan_gguf, write_gguf

        artifacts = write_gguf(checkpoint, plan_gguf(checkpoint, [dtype]), folder / "gguf")
        between = open_checkpoint(str(artifacts[0].path))
        write_folder(between, folder / "back", dtype=dtype)
        return open_checkpoint(str(folder / "back"))
