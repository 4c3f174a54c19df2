"""pi-convert's K-quant kernels against ggml's own: every byte, on every kind of values."""

from __future__ import annotations

import os
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
from converters.ggml import Floats, load_ggml, load_quantizer, quantizer
from converters.ggml.kernels import INSTRUCTION_SETS, Agreement, Kernels
from converters.sources import open_checkpoint
from converters.targets.stream import CHUNK_ELEMENTS
from converters.tensor import Tensor
from tests.native import REPOSITORY, TYPES, compiled, load, loadable, weights
from tests.tiny import write_tiny

MANY = 100_000_000  # elements of each type
HANDED_SHARE = 1e-3  # of real weights' blocks, made by ggml's own function


@pytest.fixture(params=INSTRUCTION_SETS)
def built(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


def assert_same(built: Kernels, name: str, values: Floats) -> int:
    """The kernels' bytes are ggml's; how many blocks ggml made of them."""
    made = built.quantize(ENCODINGS[name], values)
    np.testing.assert_array_equal(made.raw, load_ggml().quantize(ENCODINGS[name], values))
    return made.handed


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


def fitting(columns: int) -> list[str]:
    """The types that have rows of so many elements."""
    return [name for name in TYPES if columns % ENCODINGS[name].block_elements == 0]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40).map(lambda n: 32 * n) | st.integers(1, 9).map(lambda n: 256 * n),
    special=st.lists(st.tuples(st.integers(0, 2303), FINITE | LIKE_WEIGHTS), max_size=40),
    scale=st.sampled_from([1.0, 1e-30, 1e-15, 1e15, 1e30]),
)
def test_any_values(
    instruction_set: str, seed: int, rows: int, columns: int,
    special: list[tuple[int, float]], scale: float,
) -> None:  # fmt: skip
    built = load(instruction_set)
    values = weights(rows, seed, columns=columns) * np.float32(scale)
    for column, value in special:
        values[seed % rows, column % columns] = value
    for name in fitting(columns):
        assert_same(built, name, values)


@pytest.mark.parametrize("name", TYPES)
def test_default_model(built: Kernels, name: str, default_gguf: Path) -> None:
    """Its weights go through the kernels, not to ggml; one layer here, all of them below."""
    checkpoint = open_checkpoint(str(default_gguf))
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        tensor = checkpoint.tensors[f"model.layers.7.{part}.weight"]
        handed, blocks = handed_blocks([built], name, tensor)
        assert handed <= HANDED_SHARE * blocks, tensor.name


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_every_matrix_of_the_default_model(name: str, default_gguf: Path) -> None:
    """Five of q2_k's 525,312 blocks are handed over, of the other types none."""
    matrices = [t for t in open_checkpoint(str(default_gguf)).tensors.values() if t.rows > 1]
    assert len(matrices) == 30 * 7 + 1
    sets = loadable()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda tensor: handed_blocks(sets, name, tensor), matrices))
    assert sum(handed for handed, _ in found) <= HANDED_SHARE * sum(blocks for _, blocks in found)
    for tensor, (handed, blocks) in zip(matrices, found, strict=True):
        # Two of a small matrix' 1,296 blocks are more than its share.
        assert handed <= max(2, HANDED_SHARE * blocks), tensor.name


def handed_blocks(sets: list[Kernels], name: str, tensor: Tensor) -> tuple[int, int]:
    """How many blocks ggml made, of how many, once all bytes are ggml's."""
    encoding = ENCODINGS[name]
    rows = max(1, CHUNK_ELEMENTS // tensor.row_elements) // 4 * 4  # 4 of 576 are whole blocks
    handed, blocks = [0] * len(sets), 0
    for start in range(0, tensor.rows, rows):
        values = tensor.read_f32(start, min(start + rows, tensor.rows)).reshape(-1, 256)
        right = load_ggml().quantize(encoding, values)
        for index, built in enumerate(sets):
            made = built.quantize(encoding, values)
            np.testing.assert_array_equal(made.raw, right)
            handed[index] += made.handed
        blocks += values.size // encoding.block_elements
    return max(handed), blocks


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
    """The instruction sets of this processor against one run of ggml."""
    sets = loadable()
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


SANITIZED = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from converters.encodings import ENCODINGS
from converters.ggml import load_ggml
from converters.ggml.kernels import Kernels
from tests.converters.test_kernels import SPECIAL, fitting
from tests.native import weights
path = Path(sys.argv[1])
built = Kernels(path, ctypes.CDLL(str(path)), load_ggml())
made = [weights(rows, 1, columns=columns) for rows, columns in
        ((37, 256), (1, 32), (3, 96), (5, 288), (2, 768), (7, 1280), (1, 4096))]
for values in (*made, *(v.astype(np.float32)[None] for v in SPECIAL.values())):
    for name in fitting(values.shape[1]):
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
