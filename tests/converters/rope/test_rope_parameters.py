"""RoPE's numbers against transformers' ROPE_INIT_FUNCTIONS, and every spelling in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters.errors import RopeError, UnsupportedError
from converters.rope import Llama3Scaling, RopeParameters
from converters.rope.config import RopeContext, read_config, write_config
from converters.rope.gguf import effective_rope, read_gguf, write_gguf
from converters.rope.parameters import ulp_distance, uniform_ratio

LLAMA31 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
LLAMA32 = Llama3Scaling(32.0, 1.0, 4.0, 8192)
ULP = 2
FACTORS = (1.0, 1.1, 2.0, 2.2, 3.0, 8.0, 16.0)


def oracle(rope: RopeParameters, tmp_path: Path) -> np.ndarray:
    """Inverse frequencies that transformers computes from the config we write."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "hidden_size": rope.rotary_dim * 2, "num_attention_heads": 2,
              "head_dim": rope.rotary_dim, "vocab_size": 32, "num_hidden_layers": 1,
              "intermediate_size": 32}  # fmt: skip
    config |= {key: value for key, value in write_config(rope).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    kind = loaded.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(loaded).inv_freq.numpy()
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](loaded, torch.device("cpu"))
    assert attention_factor == rope.attention_factor
    return inv_freq.numpy()


@pytest.mark.parametrize("llama3", [None, LLAMA31, LLAMA32], ids=["plain", "llama3.1", "llama3.2"])
@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1e6, 12345.678])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("rotary_dim", [24, 64, 128])
def test_inv_freq_is_transformers(
    tmp_path: Path, rotary_dim: int, factor: float, theta: float, llama3: Llama3Scaling | None
) -> None:
    rope = RopeParameters(theta, rotary_dim, 16384, 16384, llama3=llama3).interpolate(factor)
    expected = oracle(rope, tmp_path)
    found = rope.inv_freq()
    assert found.dtype == np.float32
    assert ulp_distance(expected, found) <= ULP
    for wrong in (factor * 1.0001, factor * 2, factor / 2):
        off = RopeParameters(theta, rotary_dim, 16384, 16384, factor=wrong, llama3=llama3)
        assert ulp_distance(expected, off.inv_freq()) > 100


def test_pi_is_a_scaled_position() -> None:
    # f'(x, m) = f(x, m L / L'): the angle at m with factor 4 is the angle at m / 4 without.
    rope = RopeParameters(10000.0, 64, 2048, 2048)
    m = 5000
    angle = m * rope.interpolate(4).inv_freq().astype(np.float64)
    assert np.allclose(angle, m / 4 * rope.inv_freq().astype(np.float64), rtol=1e-7, atol=0)
    assert math.isclose(float(rope.inv_freq()[1]), 10000 ** (-2 / 64), rel_tol=1e-6)


def test_factors_compose_and_the_first_context_stays() -> None:
    rope = RopeParameters(10000.0, 64, 2048, 2048).interpolate(8).interpolate(2)
    assert (rope.factor, rope.original_context, rope.context) == (16.0, 2048, 32768)


@pytest.mark.parametrize(
    ("scales", "factor"),
    [((8.8, 1.5), 13.2), ((2.2, 2.2, 2.2), 10.648), ((1.1, 1.1), 1.21), ((8, 2), 16.0)],
)
def test_factors_compose_as_the_decimals_they_are_written_as(
    scales: tuple[float, ...], factor: float
) -> None:
    rope = RopeParameters(10000.0, 64, 2048, 2048)
    for scale in scales:
        rope = rope.interpolate(scale)
    assert rope.factor == factor
    assert json.dumps(write_config(rope)["rope_parameters"]).count(f'"factor": {factor!r}') == 1


def test_llama31_times_two_is_262144() -> None:
    config = {
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    rope = read_config(config, RopeContext("config.json", 128)).interpolate(2)
    assert (rope.original_context, rope.context) == (131072, 262144)
    assert rope.kind == "linear over llama3"


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_a_scale_below_one_is_refused(scale: float) -> None:
    with pytest.raises(RopeError, match="scale"):
        RopeParameters(10000.0, 64, 2048, 2048).interpolate(scale)


ROPES = [
    RopeParameters(10000.0, 64, 2048, 2048),
    RopeParameters(10000.0, 64, 2048, 2048).interpolate(2.2),
    RopeParameters(500000.0, 128, 131072, 131072, llama3=LLAMA31),
    RopeParameters(500000.0, 128, 131072, 131072, llama3=LLAMA31).interpolate(2),
    RopeParameters(500000.0, 64, 131072, 131072, llama3=LLAMA32).interpolate(1.1),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"{r.kind}-{r.factor:g}")
def test_config_round_trip(rope: RopeParameters) -> None:
    keys = json.loads(json.dumps({k: v for k, v in write_config(rope).items() if v is not None}))
    again = read_config(keys, RopeContext("config.json", rope.rotary_dim))
    assert again.inv_freq().tobytes() == rope.inv_freq().tobytes()
    assert (again.original_context, again.context) == (rope.original_context, rope.context)
    assert (again.kind, again.factor, again.llama3) == (rope.kind, rope.factor, rope.llama3)


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"{r.kind}-{r.factor:g}")
def test_gguf_round_trip(rope: RopeParameters) -> None:
    stored = {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in write_gguf(rope).items()
    }
    divisors = rope.frequency_divisors()
    again = read_gguf(
        stored, divisors, rotary_dim=rope.rotary_dim, original_context=None, where="x.gguf"
    )
    assert (again.kind, again.factor, again.llama3) == (rope.kind, rope.factor, rope.llama3)
    assert (again.original_context, again.context) == (rope.original_context, rope.context)
    effective = effective_rope(stored, divisors, rotary_dim=rope.rotary_dim, where="x.gguf")
    assert ulp_distance(rope.inv_freq(), effective.inv_freq()) <= ULP


def test_vicuna_16k_config_says_l_by_its_maximum() -> None:
    config = {"max_position_embeddings": 4096, "max_sequence_length": 16384,
              "rope_scaling": {"type": "linear", "factor": 4.0}}  # fmt: skip
    rope = read_config(config, RopeContext("config.json", 128, default_theta=10000.0))
    assert (rope.original_context, rope.context, rope.factor) == (4096, 16384, 4.0)


def test_longchat_config_says_l_prime_and_marks_the_assumption() -> None:
    config = {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 8.0}}
    rope = read_config(config, RopeContext("config.json", 128, default_theta=10000.0))
    assert (rope.original_context, rope.context) == (2048, 16384)
    assert [e.assumed for e in rope.evidence] == [True, True, False]


def test_original_context_decides_first() -> None:
    config = {"max_position_embeddings": 16384, "rope_theta": 1e4,
              "rope_scaling": {"type": "linear", "factor": 8.0}}  # fmt: skip
    about = RopeContext("config.json", 128, original_context=4096)
    assert read_config(config, about).context == 16384  # never over-claimed: stated, below 4096 x 8
    assert read_config(config, about).original_context == 4096


def linear(**changes: object) -> dict[str, object]:
    block = {"rope_type": "linear", "factor": 4.0, **changes}
    return {"max_position_embeddings": 8192, "rope_theta": 1e4, "rope_scaling": block}


BAD = {
    "string factor": (linear(factor="4"), "rope_scaling.factor is '4'"),
    "zero factor": (linear(factor=0), "factor is 0"),
    "negative factor": (linear(factor=-4.0), "factor is -4.0"),
    "factor below one": (linear(factor=0.25), "factor is 0.25"),
    "boolean factor": (linear(factor=True), "factor is True"),
    "no factor": ({"max_position_embeddings": 8, "rope_theta": 1e4,
                   "rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    "type contradicts rope_type": (linear(type="yarn"), "contradictory RoPE types"),
    "no type": ({"max_position_embeddings": 8, "rope_scaling": {"factor": 8.0}}, "no rope_type"),
    "misspelt key": (linear(scale=4.0), "scale"),
    "two thetas": (linear(rope_theta=5e5), "contradictory values"),
    "two factors": (
        linear() | {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
        "contradictory values",
    ),
    "string theta": (linear() | {"rope_theta": "10000"}, "rope_theta is '10000'"),
    "infinite context": (linear() | {"max_position_embeddings": math.inf}, "max_position"),
    "no context": ({"rope_theta": 1e4}, "max_position_embeddings is missing"),
    "no theta": ({"max_position_embeddings": 8}, "rope_theta is missing"),
    "L beyond reach": (
        linear(original_max_position_embeddings=1024), "gives a context of 4096"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "fragment"), BAD.values(), ids=BAD)
def test_bad_config_is_named(config: dict[str, object], fragment: str) -> None:
    with pytest.raises(RopeError) as error:
        read_config(config, RopeContext("config.json", 128))
    assert fragment in error.value.message
    assert "config.json" in error.value.message
    assert error.value.hint


def test_an_edited_record_is_found() -> None:
    keys = write_config(ROPES[3])
    block = dict(keys["rope_parameters"])  # type: ignore[call-overload]
    block["long_factor"] = [f * 2 for f in block["long_factor"]]
    with pytest.raises(RopeError, match="not what pi_convert records"):
        read_config({**keys, "rope_parameters": block}, RopeContext("config.json", 128))


@pytest.mark.parametrize(
    ("change", "top", "fragment"),
    [
        ({"short_factor": ["a"]}, {}, r"short_factor\[0\] is 'a'"),
        ({}, {"pi_convert": {"factor": 2.0, "llama3": {"factor": 8.0}}}, "is missing"),
        ({"long_factor": 5}, {}, "long_factor is 5"),
        ({"long_factor": [1e39] * 64}, {}, "beyond float32"),
        ({"short_mscale": 1.5}, {}, "short_mscale is 1.5"),
        ({"attention_factor": None}, {}, "attention_factor is missing"),
        ({"original_max_position_embeddings": 4096}, {}, "contradictory values"),
        ({}, {"max_position_embeddings": 10**6}, "gives a context of 262144"),
    ],
)
def test_a_record_that_is_contradicted_is_refused(
    change: dict[str, object], top: dict[str, object], fragment: str
) -> None:
    keys = write_config(ROPES[3])
    blocks = {
        name: {**keys[name], **change}  # type: ignore[dict-item]
        for name in ("rope_parameters", "rope_scaling")
    }
    with pytest.raises((RopeError, UnsupportedError), match=fragment):
        read_config({**keys, **blocks, **top}, RopeContext("config.json", 128))


def test_original_context_stands_over_a_record() -> None:
    keys = write_config(ROPES[3])
    read = read_config(keys, RopeContext("config.json", 128, original_context=2**18 - 1))
    assert (read.original_context, read.context) == (2**18 - 1, 2**18)
    with pytest.raises(RopeError, match="--original-context 65536"):
        read_config(keys, RopeContext("config.json", 128, original_context=65536))


def test_uniform_ratio_names_the_factor_in_buffers() -> None:
    rope = RopeParameters(10000.0, 64, 2048, 2048)
    found = rope.interpolate(4).inv_freq()
    assert uniform_ratio(rope.inv_freq(), found, tolerance=1e-6) == pytest.approx(4.0)
    assert uniform_ratio(rope.inv_freq(), found**1.1, tolerance=1e-6) is None


def test_legacy_scale_linear_is_honoured() -> None:
    keys = {"context_length": 16384, "rope.freq_base": 10000.0, "rope.scale_linear": 4.0}
    rope = read_gguf(keys, None, rotary_dim=128, original_context=None, where="old.gguf")
    assert (rope.factor, rope.original_context, rope.context) == (4.0, 4096, 16384)


def test_type_none_with_a_factor_is_refused() -> None:
    keys = {"context_length": 16384, "rope.scaling.type": "none", "rope.scaling.factor": 8.0}
    with pytest.raises(RopeError, match="factor of 8 is stored"):
        read_gguf(keys, None, rotary_dim=128, original_context=None, where="x.gguf")


def test_llama3s_original_context_at_the_top_wins_in_transformers(tmp_path: Path) -> None:
    """Two that differ are refused; one, or two that agree, mean what transformers computes."""
    key = "original_max_position_embeddings"
    keys = write_config(ROPES[2])
    block = dict(keys["rope_parameters"])  # type: ignore[call-overload]
    bare = {name: value for name, value in block.items() if name != key}
    about = RopeContext("config.json", 128)

    def transformers_inv_freq(inside: dict[str, object], top: int) -> np.ndarray:
        from transformers.models.llama.configuration_llama import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=dict(inside),
            max_position_embeddings=131072, **{key: top},
        )  # fmt: skip
        return LlamaRotaryEmbedding(config).inv_freq.numpy()

    at_top = dataclasses.replace(ROPES[2], llama3=Llama3Scaling(8.0, 1.0, 4.0, 4096))
    assert ulp_distance(at_top.inv_freq(), transformers_inv_freq(block, 4096)) <= ULP
    with pytest.raises(RopeError, match=f"{key} 4096, rope_parameters.{key} 8192"):
        read_config({**keys, "rope_scaling": None, key: 4096}, about)
    for inside in (block, bare):
        read = read_config({**keys, "rope_scaling": None, "rope_parameters": inside, key: 8192},
                           about)  # fmt: skip
        assert ulp_distance(read.inv_freq(), transformers_inv_freq(inside, 8192)) <= ULP
    with pytest.raises(RopeError, match=f"{key} is missing"):
        read_config({**keys, "rope_scaling": None, "rope_parameters": bare}, about)


@pytest.mark.parametrize("factor", [8.0, "8"])
def test_a_default_type_with_a_factor_is_a_contradiction(factor: object) -> None:
    block = {"rope_type": "default", "factor": factor}
    config = {"max_position_embeddings": 8192, "rope_theta": 1e4, "rope_scaling": block}
    with pytest.raises(RopeError, match="factor"):
        read_config(config, RopeContext("config.json", 128))
    config["rope_scaling"] = {"rope_type": "default", "factor": 1.0}
    assert read_config(config, RopeContext("config.json", 128)).kind == "default"


@pytest.mark.parametrize("scale", [1e9, 1e30, 1e300])
def test_a_context_beyond_32_bits_is_refused(scale: float) -> None:
    with pytest.raises(RopeError, match="beyond"):
        RopeParameters(10000.0, 64, 2048, 2048).interpolate(scale)


@pytest.mark.parametrize("key", ["rope.freq_base", "rope.scaling.attn_factor"])
def test_a_stored_zero_is_no_default(key: str) -> None:
    # llama.cpp computes with it; only the scaling factor's 0 means "not set" there.
    keys = {"context_length": 16384, key: 0.0}
    with pytest.raises(RopeError, match=f"{key} is 0"):
        effective_rope(keys, None, rotary_dim=128, where="x.gguf")
    keys = {"context_length": 16384, "rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}
    assert effective_rope(keys, None, rotary_dim=128, where="x.gguf").factor == 1.0
