"""Hugging Face folders: what is read, and what is held against what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from converters.checkpoint import Checkpoint
from converters.errors import ConvertError, RopeError, SourceError, TensorError, UnsupportedError
from converters.sources import open_checkpoint
from converters.sources.card import plain_name
from converters.sources.huggingface import FINETUNE_RECORD
from tests.tiny import ODD, ODD4, write_tiny

LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}


def values(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    tensor = checkpoint.tensors[name]
    return tensor.read_f32(0, tensor.rows).reshape(tensor.shape)


def edit(folder: Path, change: Any, file: str = "model.safetensors") -> Path:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def configure(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_transformers_loads(
    tmp_path: Path, architecture: str, dtype: str, shards: int
) -> None:
    folder = write_tiny(
        tmp_path / "tiny", architecture=architecture, dtype=dtype, shards=shards, shape=ODD4
    )
    checkpoint = open_checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert checkpoint.tensors[name].encoding.name == dtype
        assert np.array_equal(values(checkpoint, name), value), name
    assert checkpoint.parameters == model.num_parameters()
    assert checkpoint.origin.label == "tiny"


def test_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", rope=LINEAR)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = open_checkpoint(str(folder)).rope.inv_freq()
    assert np.allclose(found, model.model.rotary_emb.inv_freq.numpy(), rtol=3e-7, atol=0)
    unscaled = open_checkpoint(str(write_tiny(tmp_path / "plain"))).rope.inv_freq()
    assert not np.allclose(unscaled, model.model.rotary_emb.inv_freq.numpy(), rtol=0.5, atol=0)


def test_a_bare_decoder_gets_its_prefix(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    whole = open_checkpoint(str(folder)).tensors.keys()

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(folder, strip)
    assert open_checkpoint(str(folder)).tensors.keys() == whole


class TestTies:
    def test_a_repeated_embedding_is_dropped(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny", tied=True)
        edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        checkpoint = open_checkpoint(str(folder))
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.groups == frozenset()

    def test_another_head_is_an_error(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny", tied=True)
        edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
        with pytest.raises(TensorError, match=r"lm_head\.weight is not model\.embed_tokens"):
            open_checkpoint(str(folder))

    def test_a_head_that_is_missing_is_missed(self, tmp_path: Path) -> None:
        folder = configure(write_tiny(tmp_path / "tiny", tied=True), tie_word_embeddings=False)
        with pytest.raises(TensorError, match=r"1 missing: lm_head\.weight"):
            open_checkpoint(str(folder))


def test_all_tensor_problems_come_in_one_list(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(ODD.hidden)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()

    edit(folder, spoil)
    with pytest.raises(TensorError) as error:
        open_checkpoint(str(folder))
    message = error.value.message
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 wrongly shaped: lm_head.weight [511, 144], expected [512, 144]" in message


def test_flags_announce_their_tensors(tmp_path: Path) -> None:
    flags = {"attention_bias": True, "mlp_bias": True}
    folder = write_tiny(tmp_path / "tiny", config=flags)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.groups == {"attention_bias", "mlp_bias", "untied"}
    configure(folder, mlp_bias=False)
    with pytest.raises(TensorError, match=r"6 unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        open_checkpoint(str(folder))
    configure(folder, mlp_bias="yes")
    with pytest.raises(SourceError, match="mlp_bias is 'yes'"):
        open_checkpoint(str(folder))


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


class TestWindows:
    @pytest.mark.parametrize(
        ("keys", "window"),
        [({}, 4096), ({"sliding_window": 64}, 64), ({"sliding_window": None}, None)],
    )
    def test_mistral(self, tmp_path: Path, keys: dict[str, Any], window: int | None) -> None:
        folder = configure(write_tiny(tmp_path / "tiny"), **MISTRAL, **keys)
        assert open_checkpoint(str(folder)).hparams.sliding_window == window
        assert AutoConfig.from_pretrained(folder).sliding_window == window

    @pytest.mark.parametrize(
        ("keys", "window"),
        [
            ({"sliding_window": 64}, None),
            ({"sliding_window": 64, "use_sliding_window": False}, None),
            ({"sliding_window": 64, "use_sliding_window": True}, 64),
            ({"use_sliding_window": True}, 4096),
        ],
    )
    def test_qwen2(self, tmp_path: Path, keys: dict[str, Any], window: int | None) -> None:
        folder = configure(write_tiny(tmp_path / "tiny", architecture="qwen2"), **keys)
        assert open_checkpoint(str(folder)).hparams.sliding_window == window
        assert AutoConfig.from_pretrained(folder).sliding_window == window

    @pytest.mark.parametrize("bad", [0, -1, "4096", True, 3.5])
    def test_nonsense_is_an_error(self, tmp_path: Path, bad: Any) -> None:
        folder = configure(write_tiny(tmp_path / "tiny"), **MISTRAL, sliding_window=bad)
        with pytest.raises(SourceError, match="sliding_window is"):
            open_checkpoint(str(folder))


class TestFrequencyBuffers:
    """PI that stands in the buffers and not in the config is found, and its factor named."""

    DTYPES = (torch.float32, torch.float16, torch.bfloat16)

    def with_buffers(
        self,
        folder: Path,
        factor: float,
        dtype: torch.dtype = torch.float32,
        theta: float = 10000.0,
        **shape: Any,
    ) -> Path:
        write_tiny(folder, rope={"rope_theta": theta} | shape)
        exponents = torch.arange(0, ODD.head_dim, 2).float() / ODD.head_dim
        inv_freq = (1.0 / theta**exponents / factor).to(dtype)  # as transformers 4.31 had it
        names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(ODD.layers)]
        return edit(folder, lambda t: t.update({n: inv_freq.clone() for n in names}))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("theta", [10000.0, 5e5, 1e6])
    def test_right_ones_are_dropped(self, tmp_path: Path, dtype: torch.dtype, theta: float) -> None:
        folder = self.with_buffers(tmp_path / "tiny", 1.0, dtype, theta)
        assert not any("rotary" in name for name in open_checkpoint(str(folder)).tensors)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("theta", [10000.0, 5e5, 1e6])
    @pytest.mark.parametrize("factor", [1.5, 2.2, 4.0, 8.0])
    def test_a_factor_is_named(
        self, tmp_path: Path, dtype: torch.dtype, theta: float, factor: float
    ) -> None:
        folder = self.with_buffers(tmp_path / "tiny", factor, dtype, theta)
        with pytest.raises(RopeError, match="holds the frequencies of factor") as error:
            open_checkpoint(str(folder))
        named = float(error.value.message.split("of factor ")[1].split(",")[0])
        assert named == factor
        assert "the config says 1" in error.value.message
        assert '"rope_type": "linear"' in error.value.hint

    def test_a_factor_over_the_configs_is_composed(self, tmp_path: Path) -> None:
        folder = self.with_buffers(tmp_path / "tiny", 8.0, **LINEAR)
        with pytest.raises(RopeError, match="factor 8, the config says 4"):
            open_checkpoint(str(folder))

    def test_unscaled_buffers_beside_a_linear_factor_are_old_transformers(
        self, tmp_path: Path
    ) -> None:
        folder = self.with_buffers(tmp_path / "tiny", 1.0, **LINEAR)
        assert open_checkpoint(str(folder)).rope.factor == 4.0

    def test_another_theta_is_no_factor(self, tmp_path: Path) -> None:
        folder = configure(self.with_buffers(tmp_path / "tiny", 1.0), rope_theta=5e5)
        with pytest.raises(RopeError, match="no one factor explains them"):
            open_checkpoint(str(folder))

    def test_the_decoders_own_buffer_counts_too(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny")
        edit(folder, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(12)}))
        with pytest.raises(RopeError, match=r"model\.rotary_emb\.inv_freq"):
            open_checkpoint(str(folder))
        edit(folder, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(11)}))
        with pytest.raises(RopeError, match="11 frequencies, expected 12"):
            open_checkpoint(str(folder))


class TestContexts:
    """What L and L' are, as checkpoints in the wild say it."""

    @pytest.mark.parametrize(
        ("label", "rope", "config", "expected"),
        [
            ("vicuna-16k", LINEAR, {"max_position_embeddings": 4096, "max_sequence_length": 16384},
             (4.0, 4096, 16384)),
            ("longchat", {"rope_scaling": {"type": "linear", "factor": 8.0}},
             {"max_position_embeddings": 16384}, (8.0, 2048, 16384)),
            ("original stated", LINEAR,
             {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
             (4.0, 4096, 16384)),
            ("codellama", None, {"max_position_embeddings": 16384, "rope_theta": 1e6},
             (1.0, 16384, 16384)),
            ("llama 3.1",
             {"rope_theta": 500000.0, "rope_scaling": {
                 "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
             {"max_position_embeddings": 131072}, (1.0, 131072, 131072)),
        ],
    )  # fmt: skip
    def test_evidence(
        self,
        tmp_path: Path,
        label: str,
        rope: dict[str, Any] | None,
        config: dict[str, Any],
        expected: tuple[float, int, int],
    ) -> None:
        folder = write_tiny(tmp_path / "tiny", rope=rope, config=config)
        found = open_checkpoint(str(folder)).rope
        assert (found.factor, found.original_context, found.context) == expected
        assert {e.name for e in found.evidence} == {"theta", "L", "L'"}
        assumed = {e.name for e in found.evidence if e.assumed}
        assert assumed == ({"L"} if label == "longchat" else set())

    def test_llama_3_1_times_two(self, tmp_path: Path) -> None:
        llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        folder = write_tiny(
            tmp_path / "tiny",
            rope={"rope_theta": 500000.0, "rope_scaling": llama3},
            config={"max_position_embeddings": 131072},
        )
        rope = open_checkpoint(str(folder)).interpolate(2).rope
        assert (rope.factor, rope.original_context, rope.context) == (2.0, 131072, 262144)
        assert rope.llama3 is not None
        assert rope.llama3.factor == 8.0

    def test_eight_then_two_is_sixteen_and_l_stays_the_first(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(write_tiny(tmp_path / "tiny")))
        rope = checkpoint.interpolate(8).interpolate(2).rope
        assert (rope.factor, rope.original_context, rope.context) == (16.0, 128, 2048)

    def test_the_tokenizers_length_is_evidence_when_it_is_sane(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny", rope=LINEAR)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        assert settings["model_max_length"] == 10**30  # not taken for a context
        assert open_checkpoint(str(folder)).rope.original_context == 32
        path.write_text(json.dumps(settings | {"model_max_length": 512}))
        rope = open_checkpoint(str(folder)).rope
        assert (rope.original_context, rope.context) == (128, 512)

    def test_the_callers_own_knowledge_wins(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny", rope=LINEAR)
        rope = open_checkpoint(str(folder), original_context=128).rope
        assert (rope.original_context, rope.context) == (128, 512)


class TestCard:
    def test_front_matter(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "Vicuna-7B-Chat-PI8")
        (folder / "README.md").write_text(
            "---\nlicense: llama2\nlanguage:\n- en\n- no\ntags: [chat, long-context]\n"
            "base_model: meta-llama/Llama-2-7b-hf\n---\n# A model\n"
        )
        (folder / "LICENSE.txt").write_text("text")
        checkpoint = open_checkpoint(str(folder))
        card = checkpoint.card
        assert card.name == "Vicuna-7B-Chat"
        assert card.license == "llama2"
        assert card.languages == ("en", "no")
        assert card.tags == ("chat", "long-context")
        assert card.base_models == ("meta-llama/Llama-2-7b-hf",)
        assert card.basename == "Vicuna"
        assert checkpoint.side_files.keys() == {"README.md", "LICENSE.txt"}

    @pytest.mark.parametrize(
        "text",
        ["", "no card", "---\n- a\n- b\n---\n", "---\n{: [\n---\n", "---\na: 2024-13-45\n---\n"],
    )
    def test_a_card_that_says_nothing_is_no_error(self, tmp_path: Path, text: str) -> None:
        folder = write_tiny(tmp_path / "Tiny")
        (folder / "README.md").write_text(text)
        card = open_checkpoint(str(folder)).card
        assert (card.name, card.license, card.tags) == ("Tiny", None, ())

    def test_the_config_may_name_the_model(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "out", config={"_name_or_path": "org/Model-1B-Chat"})
        assert open_checkpoint(str(folder)).card.name == "Model-1B-Chat"

    @pytest.mark.parametrize(
        ("folder", "readme", "config", "name"),
        [("out", "model_name: Tiny", {}, "Tiny-finetuned"),
         ("Tiny", "model_name: Tiny", {}, "Tiny-finetuned"),
         ("out", "model_name: Tiny-finetuned", {}, "Tiny-finetuned"),
         ("out", "license: mit", {"_name_or_path": "org/Tiny"}, "Tiny-finetuned"),
         ("own-name", "license: mit", {}, "own-name"),
         ("Tiny-PI2-finetuned", "license: mit", {}, "Tiny-finetuned"),
         ("Tiny-finetuned-PI2", "license: mit", {}, "Tiny-finetuned")],
    )  # fmt: skip
    def test_a_tuned_model_has_not_its_bases_name(
        self, tmp_path: Path, folder: str, readme: str, config: dict[str, object], name: str
    ) -> None:
        tuned = write_tiny(tmp_path / folder, rope=LINEAR, config=config)
        (tuned / "README.md").write_text(f"---\n{readme}\n---\n")
        (tuned / FINETUNE_RECORD).write_text("{}")
        checkpoint = open_checkpoint(str(tuned))
        assert checkpoint.artifact_name == f"{name}-PI{checkpoint.rope.factor:g}"

    @pytest.mark.parametrize(
        ("stated", "name"),
        [("../../etc/passwd", "passwd"), ("My Model: v2", "My Model- v2"), ("..", "Tiny"),
         ("a/", "Tiny"), ("x\0y", "x-y")],
    )  # fmt: skip
    def test_a_name_is_no_path(self, tmp_path: Path, stated: str, name: str) -> None:
        folder = write_tiny(tmp_path / "Tiny")
        (folder / "README.md").write_text(f"---\nmodel_name: {json.dumps(stated)}\n---\n")
        assert open_checkpoint(str(folder)).card.name == name

    @pytest.mark.parametrize(
        ("name", "plain"),
        [
            ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
            ("SmolLM2-135M-Instruct-PI8-Q4_K_M", "SmolLM2-135M-Instruct"),
            ("m-PI2.2-f16", "m"),
            ("m-BF16", "m"),
            ("m.IQ4_XS", "m"),
            ("Llama-2-7b-hf", "Llama-2-7b-hf"),
            ("F16", "F16"),
        ],
    )
    def test_exporters_suffixes_are_no_part_of_a_name(self, name: str, plain: str) -> None:
        assert plain_name(name) == plain


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = configure(write_tiny(tmp_path / "tiny"), quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedError, match=r"quantized \(gptq\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ("onnx/model.onnx", "It is an ONNX export; give the model that it was made from"),
        ("model-Q8_0.gguf", "Give the GGUF file itself"),
        ("weights.pt", "Expected pytorch_model.bin"),
        ("notes.txt", "download the weights too"),
    ],
)
def test_a_folder_without_weights_says_what_is_there_instead(
    beside: str, says: str, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_bytes(b"")
    with pytest.raises(ConvertError) as refused:
        open_checkpoint(str(folder))
    assert says in refused.value.hint
