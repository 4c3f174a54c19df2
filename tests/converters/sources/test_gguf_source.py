"""GGUF files as checkpoints, against transformers' own loader and files written by gguf-py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.containers.gguf import read_gguf_file
from converters.errors import RopeError, SourceError, TensorError, UnsupportedError
from converters.rope import Llama3Scaling, RopeParameters
from converters.sources import checkpoint_of_gguf, open_checkpoint
from converters.transforms import interleave_rope
from tests.tiny import ODD, ODD4, WIDE, Shape, write_tiny
from tests.tiny_gguf import write_tiny_gguf

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def transformers_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What transformers' GGUF loader gives: names mapped and rows de-permuted by its own code."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(
        path, return_tensors=True, model_to_load=model
    )["tensors"]
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf-source") / "Tiny-Model", shape=ODD4)


def make(tmp_path: Path, folder: Path, **options: Any) -> Path:
    return write_tiny_gguf(tmp_path / "Tiny-Model-F32.gguf", folder, **options)


def test_the_default_models_tensors_are_transformers(default_gguf: Path) -> None:
    checkpoint = open_checkpoint(str(default_gguf))
    expected = transformers_tensors(default_gguf)
    assert checkpoint.tensors.keys() == expected.keys() - {"lm_head.weight"}
    moved = 0
    for name, tensor in checkpoint.tensors.items():
        wanted = expected[name].numpy().reshape(tensor.rows, -1)
        assert np.array_equal(tensor.read_f32(0, tensor.rows), wanted), name
        if "q_proj" in name:  # negative control: the stored order of rows is another one
            stored = interleave_rope(tensor, checkpoint.hparams.heads)
            moved += not np.array_equal(stored.read_f32(0, stored.rows), wanted)
    assert moved == checkpoint.hparams.layers


def test_the_default_model_as_a_value(default_gguf: Path) -> None:
    checkpoint = open_checkpoint(str(default_gguf))
    assert checkpoint.card.name == "SmolLM2-135M-Instruct"
    assert checkpoint.card.license == "apache-2.0"
    assert checkpoint.origin.label == default_gguf.name
    assert checkpoint.parameters == 134_515_008
    rope = checkpoint.rope
    assert (rope.theta, rope.rotary_dim, rope.factor) == (100_000.0, 64, 1.0)
    assert (rope.original_context, rope.context) == (8192, 8192)
    assert checkpoint.hparams.tied_embeddings
    assert checkpoint.hparams.norm_eps == 1e-5
    encodings = [t.encoding.name for t in checkpoint.tensors.values()]
    assert {e: encodings.count(e) for e in set(encodings)} == {"q4_1": 210, "q8_0": 1, "f32": 61}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", [ODD, ODD4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_through_gguf_py_is_the_folder(
    tmp_path: Path, architecture: str, shape: Shape, tied: bool
) -> None:
    source = write_tiny(tmp_path / "tiny", architecture=architecture, shape=shape, tied=tied)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", source)
    found, expected = open_checkpoint(str(path)), open_checkpoint(str(source))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert other.shape == tensor.shape
        assert np.array_equal(other.read_rows(0, other.rows), tensor.read_rows(0, tensor.rows))
    assert (found.hparams, found.groups) == (expected.hparams, expected.groups)
    assert found.vocabulary.tokens == expected.vocabulary.tokens
    assert np.array_equal(found.rope.inv_freq(), expected.rope.inv_freq())


def test_rows_left_unpermuted_are_seen(tmp_path: Path, folder: Path) -> None:
    path = make(tmp_path, folder, permute=False)
    name = "model.layers.0.self_attn.k_proj.weight"
    found = open_checkpoint(str(path)).tensors[name]
    assert not np.array_equal(
        found.read_f32(0, found.rows), load_file(folder / "model.safetensors")[name].numpy()
    )


def test_quantized_blocks_move_whole(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny", shape=WIDE)
    path = make(tmp_path, source, quantization=Q4_0)
    expected = transformers_tensors(path)
    for name, tensor in open_checkpoint(str(path)).tensors.items():
        wanted = expected[name].numpy().reshape(tensor.rows, -1)
        assert np.array_equal(tensor.read_f32(0, tensor.rows), wanted), name
        some = tensor.read_f32(tensor.rows // 3, tensor.rows // 2)
        assert np.array_equal(some, wanted[tensor.rows // 3 : tensor.rows // 2]), name


class TestRope:
    def test_scaling_is_honoured(self, tmp_path: Path, folder: Path) -> None:
        keys = {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.2,
            "llama.rope.scaling.original_context_length": 128,
            "llama.context_length": 281,
        }
        rope = open_checkpoint(str(make(tmp_path, folder, keys=keys))).rope
        assert (rope.factor, rope.original_context, rope.context) == (2.2, 128, 281)

    def test_the_legacy_key_is_honoured(self, tmp_path: Path, folder: Path) -> None:
        path = make(tmp_path, folder, keys={"llama.rope.scale_linear": 4.0})
        rope = open_checkpoint(str(path)).rope
        assert (rope.factor, rope.original_context, rope.context) == (4.0, 32, 128)
        rope = open_checkpoint(str(path), original_context=128).rope
        assert (rope.original_context, rope.context) == (128, 512)

    @pytest.mark.parametrize("kind", ["yarn", "longrope"])
    def test_other_kinds_are_refused(self, tmp_path: Path, folder: Path, kind: str) -> None:
        keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        with pytest.raises(UnsupportedError, match=kind):
            open_checkpoint(str(make(tmp_path, folder, keys=keys)))

    def test_a_factor_that_is_switched_off_is_an_error(self, tmp_path: Path, folder: Path) -> None:
        keys = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
        with pytest.raises(RopeError, match="none, but a factor of 4"):
            open_checkpoint(str(make(tmp_path, folder, keys=keys)))

    def test_frequency_factors_are_llama3(self, tmp_path: Path) -> None:
        scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
        rope = RopeParameters(500_000.0, ODD4.head_dim, 131_072, 131_072, llama3=scaling)
        divisors = rope.frequency_divisors()
        assert divisors is not None
        source = write_tiny(tmp_path / "tiny", shape=ODD4, rope={"rope_theta": 500_000.0})
        path = make(tmp_path, source, extra={"rope_freqs.weight": divisors})
        checkpoint = open_checkpoint(str(path))
        assert checkpoint.rope.llama3 == scaling
        assert not any("rope_freqs" in name for name in checkpoint.tensors)
        divisors[-1] = 3.0
        path = make(tmp_path, source, extra={"rope_freqs.weight": divisors})
        with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
            open_checkpoint(str(path))

    def test_rope_over_part_of_a_head_is_refused(self, tmp_path: Path, folder: Path) -> None:
        path = make(tmp_path, folder, keys={"llama.rope.dimension_count": 12})
        with pytest.raises(UnsupportedError, match="12 of a head of 24"):
            open_checkpoint(str(path))


class TestRefusals:
    def test_all_tensor_problems_in_one_list(self, tmp_path: Path, folder: Path) -> None:
        path = make(
            tmp_path,
            folder,
            leave_out=("output_norm.weight", "blk.1.ffn_up.weight"),
            extra={"blk.0.attn_q_norm.weight": np.ones(24, np.float32)},
            keys={"llama.feed_forward_length": 161},
        )
        with pytest.raises(TensorError) as error:
            open_checkpoint(str(path))
        assert "2 missing: blk.1.ffn_up.weight, output_norm.weight" in error.value.message
        assert "1 unexpected: blk.0.attn_q_norm.weight" in error.value.message
        assert "wrongly shaped: blk.0.ffn_down.weight [192, 160]" in error.value.message

    def test_no_embedding(self, tmp_path: Path, folder: Path) -> None:
        path = make(tmp_path, folder, leave_out=("token_embd.weight",))
        with pytest.raises(TensorError, match=r"token_embd\.weight is missing"):
            open_checkpoint(str(path))

    def test_integer_tensors(self, tmp_path: Path, folder: Path) -> None:
        shape = (ODD4.hidden,)
        path = make(
            tmp_path,
            folder,
            leave_out=("output_norm.weight",),
            extra={"output_norm.weight": np.ones(shape, np.int32)},
        )
        with pytest.raises(UnsupportedError, match=r"output_norm\.weight i32"):
            open_checkpoint(str(path))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"split.count": 3}, "one of 3 parts"),
            ({"llama.attention.head_count": None}, r"attention\.head_count is missing"),
            ({"llama.block_count": 0}, "block_count is 0"),
            ({"llama.context_length": None}, "context_length is missing"),
            ({"llama.rope.freq_base": "1e4"}, r"rope\.freq_base is '1e4'"),
            ({"llama.rope.scaling.factor": 0.5}, "factor is 0.5"),
            ({"general.architecture": "falcon"}, "'falcon'"),
            ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
            ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "tokenizer"),
        ],
    )
    def test_keys(self, tmp_path: Path, folder: Path, keys: dict[str, Any], message: str) -> None:
        if "general.architecture" in keys:
            path = tmp_path / "other.gguf"
            writer = gguf.GGUFWriter(path, "falcon")
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
        else:
            path = make(tmp_path, folder, keys=keys)
        with pytest.raises((SourceError, UnsupportedError), match=message) as error:
            open_checkpoint(str(path))
        assert str(path) in error.value.message
        assert error.value.hint or "tokenizer" in message


def test_an_open_file_is_enough(tmp_path: Path, folder: Path) -> None:
    file = read_gguf_file(make(tmp_path, folder))
    assert checkpoint_of_gguf(file).card.name == "Tiny-Model"
