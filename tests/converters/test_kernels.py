"""pi-convert's K-quant kernels against ggml's own: every byte, on every kind of values."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.encodings import ENCODINGS, Encoding
from converters.errors import ConvertError
from converters.ggml import Floats, kernels, load_ggml, load_quantizer, quantizer
from converters.ggml.kernels import INSTRUCTION_SETS, Agreement, Kernels, agrees, find_kernels
from converters.sources import open_checkpoint
from tests.tiny import write_tiny

REPOSITORY = Path(__file__).parents[2]
BUILT = REPOSITORY / "converters" / "ggml"
TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
MANY = 100_000_000  # elements of each type
HANDED_SHARE = 1e-3  # of real weights' blocks, made by ggml's own function


def load(name: str) -> Kernels:
    path = BUILT / f"_kquants_{name}.so"
    if not path.is_file():
        pytest.skip(f"{path.name} was not compiled with this installation")
    library = ctypes.CDLL(str(path))
    if not library.pi_supported():
        pytest.skip(f"this processor has no {name}")
    return Kernels(path, library, load_ggml())


@pytest.fixture(params=INSTRUCTION_SETS)
def built(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


def assert_same(built: Kernels, name: str, values: Floats) -> int:
    """The kernels' bytes are ggml's; how many blocks ggml made of them."""
    made = built.quantize(ENCODINGS[name], values)
    np.testing.assert_array_equal(made.raw, load_ggml().quantize(ENCODINGS[name], values))
    return made.handed


def weights(rows: int, seed: int, tail: float = 5.0) -> Floats:
    """Like trained weights: rows of different spread, heavy tails."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(-4, 0.5, (rows, 1)))
    values: Floats = (random.standard_t(tail, (rows, 256)) * spread).astype(np.float32)
    return values


SPECIAL = {
    "zeros": np.zeros(1024),
    "minus zeros": -np.zeros(1024),
    "a constant": np.full(1024, 0.1),
    "a negative constant": np.full(1024, -0.1),
    "one outlier": np.where(np.arange(1024) == 300, 1e4, 1e-3),
    "zero sub-blocks": np.where(np.arange(1024) // 16 % 3, 0.3, 0.0) * np.sin(np.arange(1024)),
    "denormals": np.sin(np.arange(1024)) * 1e-40,
    "tiny": np.sin(np.arange(1024)) * 1e-30,
    "huge": np.sin(np.arange(1024)) * 1e30,
    "the largest": np.where(np.arange(1024) % 2, 3.4e38, -3.4e38),
    "all negative": -np.abs(np.sin(np.arange(1024))) - 5,
    "all positive": np.abs(np.sin(np.arange(1024))) + 5,
    "a narrow range far from zero": 1000 + np.sin(np.arange(1024)) * 1e-4,
    "two values": np.where(np.arange(1024) % 5, 0.25, -0.5),
    "a ramp": np.linspace(-1, 1, 1024),
    "magnitudes": np.sin(np.arange(1024)) * np.exp2(np.arange(1024) % 60 - 30.0),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", TYPES)
def test_special_values(built: Kernels, name: str, special: str) -> None:
    assert_same(built, name, SPECIAL[special].astype(np.float32)[None])


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LIKE_WEIGHTS = st.floats(-1, 1, width=32)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    special=st.lists(st.tuples(st.integers(0, 255), FINITE | LIKE_WEIGHTS), max_size=40),
    scale=st.sampled_from([1.0, 1e-30, 1e-15, 1e15, 1e30]),
)
def test_any_values(
    instruction_set: str, seed: int, rows: int, special: list[tuple[int, float]], scale: float
) -> None:
    built = load(instruction_set)
    values = weights(rows, seed) * np.float32(scale)
    for column, value in special:
        values[seed % rows, column] = value
    for name in TYPES:
        assert_same(built, name, values)


@pytest.mark.parametrize("name", TYPES)
def test_default_model(built: Kernels, name: str, default_gguf: Path) -> None:
    """Its weights go through the kernels, not to ggml."""
    checkpoint = open_checkpoint(str(default_gguf))
    handed = blocks = 0
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        tensor = checkpoint.tensors[f"model.layers.7.{part}.weight"]
        values = tensor.read_f32(0, tensor.rows).reshape(-1, 256)
        handed += assert_same(built, name, values)
        blocks += values.size // ENCODINGS[name].block_elements
    assert handed <= HANDED_SHARE * blocks


@pytest.mark.parametrize("name", TYPES)
def test_tiny_models(built: Kernels, name: str, tmp_path: Path) -> None:
    for architecture in ("llama", "qwen2"):
        source = open_checkpoint(
            str(write_tiny(tmp_path / architecture, architecture=architecture))
        )
        for tensor in source.tensors.values():
            flat = tensor.read_f32(0, tensor.rows).reshape(-1)
            assert_same(built, name, flat[: flat.size // 256 * 256].reshape(-1, 256))


@pytest.mark.slow
def test_many_realistic_elements() -> None:
    """Both instruction sets against one run of ggml."""
    sets = [load(name) for name in INSTRUCTION_SETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, handed in zip(TYPES, pool.map(lambda n: _many(sets, n), TYPES), strict=True):
            assert handed <= HANDED_SHARE, name


def _many(sets: list[Kernels], name: str) -> float:
    """The largest share of blocks handed over."""
    encoding, rows = ENCODINGS[name], 4096
    handed, done, blocks = [0] * len(sets), 0, 0
    for seed in range(-(-MANY // (rows * 256))):
        values = weights(rows, seed, tail=(4.0, 8.0, 30.0)[seed % 3])
        right = load_ggml().quantize(encoding, values)
        for index, built in enumerate(sets):
            made = built.quantize(encoding, values)
            assert np.array_equal(made.raw, right), (name, built.instruction_set, seed)
            handed[index] += made.handed
        done += values.size
        blocks += values.size // encoding.block_elements
    assert done >= MANY
    return max(handed) / blocks


@pytest.mark.parametrize("name", TYPES)
def test_threads_and_chunks_change_nothing(built: Kernels, name: str) -> None:
    encoding, values = ENCODINGS[name], weights(67, 3)
    whole = built.quantize(encoding, values).raw
    with ThreadPoolExecutor(4) as pool:
        for rows in (1, 2, 5, 66):
            chunks = [values[at : at + rows] for at in range(0, len(values), rows)]
            parts = pool.map(lambda chunk: built.quantize(encoding, chunk).raw, chunks)
            np.testing.assert_array_equal(np.concatenate(list(parts)), whole)


def compiled(folder: Path, name: str, *flags: str) -> Path:
    """The kernels compiled anew with other flags; ``folder`` is made."""
    sys.path.insert(0, str(REPOSITORY))
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    hook = {}
    source = (REPOSITORY / "hatch_build.py").read_text("utf-8")
    constants = source[source.index("SOURCE =") : source.index("class CompileKernels")]
    exec(constants, hook)  # its flags, without hatchling
    folder.mkdir()
    out = folder / f"_kquants_{name}.so"
    command = [compiler, *hook["FLAGS"], *hook["INSTRUCTION_SETS"][name], *flags]
    subprocess.run([*command, hook["SOURCE"], "-o", str(out)], cwd=REPOSITORY, check=True)
    return out


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_contracted_build_is_found_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(name)
    ggml = load_ggml()
    compiled(tmp_path / "bad", name, "-mfma", "-ffp-contract=fast")
    compiled(tmp_path / "good", name)
    bad, good = find_kernels(ggml, tmp_path / "bad"), find_kernels(ggml, tmp_path / "good")
    assert isinstance(bad, Kernels)
    assert isinstance(good, Kernels)
    for kind in TYPES:
        assert agrees(good, ggml, ENCODINGS[kind]), kind
    for kind in ("q2_k", "q4_k", "q5_k", "q6_k"):
        assert not agrees(bad, ggml, ENCODINGS[kind]), kind
    with caplog.at_level(logging.WARNING):
        asked = quantizer.Quantizer(ggml, "auto", bad, None, Agreement(bad, ggml, None))
        assert asked.kernels_of(ENCODINGS["q4_k"]) is None
    assert "do not agree" in caplog.text
    values = weights(600, 1)
    for kind in TYPES:
        right = ggml.quantize(ENCODINGS[kind], values)
        np.testing.assert_array_equal(asked.quantize(ENCODINGS[kind], values), right)
    native = quantizer.Quantizer(ggml, "native", bad, None, Agreement(bad, ggml, None))
    with pytest.raises(ConvertError, match="do not agree with this build of ggml for q4_k"):
        native.quantize(ENCODINGS["q4_k"], values)


SANITIZED = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from converters.encodings import ENCODINGS
from converters.ggml import load_ggml
from converters.ggml.kernels import Kernels
from tests.converters.test_kernels import SPECIAL, TYPES, weights
path = Path(sys.argv[1])
built = Kernels(path, ctypes.CDLL(str(path)), load_ggml())
for name in TYPES:
    for values in (weights(37, 1), *(v.astype(np.float32)[None] for v in SPECIAL.values())):
        raw = built.quantize(ENCODINGS[name], values).raw
        assert np.array_equal(raw, load_ggml().quantize(ENCODINGS[name], values)), name
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_sanitized_build_is_clean(name: str, tmp_path: Path) -> None:
    load(name)
    library = compiled(
        tmp_path / "s", name, "-g", "-O1", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )  # fmt: skip
    runtime = subprocess.run(
        [os.environ.get("CXX", "c++"), "-print-file-name=libasan.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), str(REPOSITORY)],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout.strip() == "clean", found.stderr[-3000:]


def test_agreement_is_kept_by_build_and_processor(built: Kernels, tmp_path: Path) -> None:
    ggml, cache = load_ggml(), tmp_path / "c" / "k.json"
    assert Agreement(built, ggml, cache)(ENCODINGS["q4_k"])
    assert cache.read_text() == '{"q4_k": true}'
    cache.write_text('{"q4_k": false}')
    assert not Agreement(built, ggml, cache)(ENCODINGS["q4_k"])  # it is read
    for damaged in ("{", "[]", '{"q4_k": 1}'):
        cache.write_text(damaged)
        assert Agreement(built, ggml, cache)(ENCODINGS["q4_k"])
    other = load("avx2" if built.instruction_set == "avx512" else "avx512")
    assert kernels.cache_file(built, ggml) != kernels.cache_file(other, ggml)


def test_a_cache_that_cannot_be_written_is_no_error(built: Kernels, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Agreement(built, load_ggml(), tmp_path / "file" / "k.json")(ENCODINGS["q6_k"])


def test_types_without_a_kernel_are_ggmls(built: Kernels) -> None:
    asked = quantizer.Quantizer(
        load_ggml(), "native", built, None, Agreement(built, load_ggml(), None)
    )
    values = weights(3, 1)
    for name in ("q4_0", "q8_0", "f16", "tq2_0"):
        encoding: Encoding = ENCODINGS[name]
        assert asked.kernels_of(encoding) is None
        right = load_ggml().quantize(encoding, values)
        np.testing.assert_array_equal(asked.quantize(encoding, values), right)


def test_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantizer, "find_kernels", lambda ggml: "there are none")
    quantizer._load.cache_clear()
    try:
        monkeypatch.setenv(quantizer.VARIABLE, "auto")
        assert load_quantizer().unavailable == "there are none"
        assert load_quantizer("ggml").kernels is None
        with pytest.raises(ConvertError, match="no kernels: there are none"):
            load_quantizer("native")
        monkeypatch.setenv(quantizer.VARIABLE, "fast")
        with pytest.raises(ConvertError, match="PI_CONVERT_QUANTIZER is 'fast'"):
            load_quantizer()
    finally:
        quantizer._load.cache_clear()
