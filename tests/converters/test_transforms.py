"""The rope permutation against llama.cpp's converter's own formula, and its inverse."""

from __future__ import annotations

import numpy as np
import pytest

from converters.encodings import ENCODINGS, F32
from converters.errors import UnsupportedError
from converters.tensor import Tensor
from converters.transforms import deinterleave_rope, interleave_rope


def tensor_of(values: np.ndarray) -> Tensor:
    raw = np.ascontiguousarray(values, dtype=np.float32)
    rows = raw.reshape(-1, raw.shape[-1]).view(np.uint8)
    return Tensor("q", raw.shape, F32, lambda start, stop: rows[start:stop])


def values_of(tensor: Tensor, step: int = 10**9) -> np.ndarray:
    parts = [
        tensor.read_f32(start, min(start + step, tensor.rows))
        for start in range(0, tensor.rows, step)
    ]
    return np.concatenate(parts).reshape(tensor.shape)


def by_reshaping(values: np.ndarray, heads: int) -> np.ndarray:
    # (heads, 2, head_dim / 2, ...) -> (heads, head_dim / 2, 2, ...): halves become neighbours
    shape = values.shape
    split = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return split.swapaxes(1, 2).reshape(shape)


@pytest.mark.parametrize("step", [1, 5, 24, 31, 10**9])
@pytest.mark.parametrize("heads", [2, 6])
def test_interleaving_rows_in_any_chunks(heads: int, step: int) -> None:
    values = np.random.default_rng(0).standard_normal((heads * 24, 7)).astype(np.float32)
    moved = interleave_rope(tensor_of(values), heads)
    assert np.array_equal(values_of(moved, step), by_reshaping(values, heads))
    assert not np.array_equal(values_of(moved), values)
    assert np.array_equal(values_of(deinterleave_rope(moved, heads), step), values)


def test_rotating_neighbours_of_the_permuted_is_rotating_halves() -> None:
    # What the permutation is for: q . k is the same under either pairing.
    rng = np.random.default_rng(1)
    heads, dim = 2, 24
    weight = rng.standard_normal((heads * dim, 16))
    hidden = rng.standard_normal(16)
    angles = 3.7 * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))

    halves = (weight @ hidden).reshape(heads, dim)
    a, b = halves[:, : dim // 2], halves[:, dim // 2 :]
    rotated = np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=1
    )
    pairs = (by_reshaping(weight, heads) @ hidden).reshape(heads, dim // 2, 2)
    x, y = pairs[..., 0], pairs[..., 1]
    neighbours = np.stack(
        [x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)], axis=-1
    ).reshape(heads, dim)
    assert np.allclose(by_reshaping(rotated.reshape(-1), heads).reshape(heads, dim), neighbours)


def test_a_bias_moves_by_elements() -> None:
    bias = np.arange(48, dtype=np.float32)
    moved = interleave_rope(tensor_of(bias), 2)
    assert np.array_equal(values_of(moved), by_reshaping(bias, 2))


def test_blocks_of_a_vector_are_not_torn() -> None:
    vector = Tensor("q.bias", (64,), ENCODINGS["q8_0"], lambda start, stop: np.zeros((1, 68)))
    with pytest.raises(UnsupportedError, match="blocks"):
        interleave_rope(vector, 2)
    with pytest.raises(UnsupportedError, match="heads"):
        interleave_rope(vector, 5)
