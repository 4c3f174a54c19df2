"""Logits of the written graphs against transformers' float32, however they are fed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.checkpoint import Checkpoint
from converters.errors import ConvertError
from converters.transforms import interleave_rope
from tests.converters.targets.onnx.decoders import (
    CONTEXT,
    FUSED,
    KINDS,
    KL_LIMIT,
    KL_LIMIT_FP16,
    KL_WRONG,
    PI,
    Array,
    Decoder,
    Kind,
    expected,
    export,
    in_chunks,
    kl,
    padded,
    reference,
    some_tokens,
    tiny,
    with_rope,
)
from tests.tiny import APART, ODD, WIDE, Shape

FORMS = pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "qwen2"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
ROWS = (CONTEXT + 40, CONTEXT - 3, 5)  # the first passes L in its prompt, the second in decoding
DECODED = 8


@ARCHITECTURES
@pytest.mark.parametrize("kind", KINDS, ids=str)
@FORMS
def test_every_kind_of_rope(tmp_path: Path, kind: Kind, architecture: str, portable: bool) -> None:
    checkpoint = tiny(tmp_path / "m", kind, architecture=architecture)
    length = min(checkpoint.rope.context, 3 * CONTEXT)
    assert kind.name == "default" or length > CONTEXT
    tokens = some_tokens(length)
    right = expected(reference(tmp_path / "m", kind.scale), tokens)
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=portable))
    fed = {
        "whole": decoder.feed(tokens[None])[0],
        "chunks": in_chunks(decoder.restart(), tokens, [37]),
        "one by one": in_chunks(decoder.restart(), tokens, [1]),
    }
    for name, found in fed.items():
        assert kl(right[:CONTEXT], found[:CONTEXT]) <= KL_LIMIT, name
        assert kl(right, found) <= KL_LIMIT, name


SHAPES = {
    "odd": (ODD, {}),
    "apart": (APART, {}),
    "fused": (FUSED, {}),
    "untied": (FUSED, {"tied": False}),
    "tied": (FUSED, {"tied": True}),
    "biases": (FUSED, {"config": {"attention_bias": True, "mlp_bias": True}}),
    "one kv head": (Shape(96, 64, 2, heads=4, kv_heads=1, head_dim=16, context=CONTEXT), {}),
    "all kv heads": (Shape(96, 64, 2, heads=4, kv_heads=4, head_dim=40, context=CONTEXT), {}),
    "bf16": (FUSED, {"dtype": "bf16"}),
    "one layer": (dataclasses.replace(FUSED, layers=1), {}),
    "wide": (WIDE, {}),
}


@pytest.mark.parametrize("name", SHAPES)
@FORMS
def test_every_shape(tmp_path: Path, name: str, portable: bool) -> None:
    shape, options = SHAPES[name]
    checkpoint = tiny(tmp_path / "m", shape=shape, **options)
    tokens = some_tokens(2 * shape.context)
    right = expected(reference(tmp_path / "m", PI.scale), tokens)
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=portable))
    assert kl(right, decoder.feed(tokens[None])[0]) <= KL_LIMIT
    assert kl(right, in_chunks(decoder.restart(), tokens, [100, 1, 29, 1])) <= KL_LIMIT


def rows_and_answers(
    model: Any, lengths: tuple[int, ...] = ROWS
) -> tuple[list[Array], list[Array]]:
    """Tokens of each row, prompt and continuation, and their logits without any padding."""
    rows = [some_tokens(length + DECODED, seed) for seed, length in enumerate(lengths)]
    return rows, [expected(model, row) for row in rows]


def worst_padded_kl(
    decoder: Decoder, rows: list[Array], answers: list[Array], side: str
) -> list[float]:
    """KL of a padded batch from its rows alone: each row's prompt, and each token after it."""
    lengths = [len(row) - DECODED for row in rows]
    batch = padded([row[:length] for row, length in zip(rows, lengths, strict=True)], side)
    found = decoder.restart().feed(batch.ids, batch.mask)
    divergences = [
        kl(answer[:length], found[row, batch.columns[row]])
        for row, (answer, length) in enumerate(zip(answers, lengths, strict=True))
    ]
    mask = batch.mask
    for step in range(DECODED):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        following = [row[length + step] for row, length in zip(rows, lengths, strict=True)]
        found = decoder.feed(np.array(following)[:, None], mask)
        for row, answer in enumerate(answers):
            divergences.append(kl(answer[lengths[row] + step], found[row, 0]))
    return divergences


@ARCHITECTURES
@pytest.mark.parametrize("kind", KINDS, ids=str)
@FORMS
def test_padded_batches(tmp_path: Path, kind: Kind, architecture: str, portable: bool) -> None:
    checkpoint = tiny(tmp_path / "m", kind, architecture=architecture)
    # The first row passes L in its prompt, the second in decoding, wherever there is more than L.
    room = min(0, checkpoint.rope.context - ROWS[0] - DECODED)
    lengths = (ROWS[0] + room, ROWS[1] + room, ROWS[2])
    rows, answers = rows_and_answers(reference(tmp_path / "m", kind.scale), lengths)
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=portable))
    for side in ("left", "right"):
        assert max(worst_padded_kl(decoder, rows, answers, side)) <= KL_LIMIT, side


@ARCHITECTURES
@SIDES
@FORMS
def test_padded_batches_that_are_rotated_inside_attention(
    tmp_path: Path, architecture: str, side: str, portable: bool
) -> None:
    checkpoint = tiny(tmp_path / "m", architecture=architecture, shape=FUSED)
    rows, answers = rows_and_answers(reference(tmp_path / "m", PI.scale))
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=portable))
    assert max(worst_padded_kl(decoder, rows, answers, side)) <= KL_LIMIT


def test_a_row_of_a_batch_is_right_whatever_ids_its_padding_has(tmp_path: Path) -> None:
    decoder = Decoder(export(tiny(tmp_path / "m"), tmp_path / "o"))
    for side in ("left", "right"):
        batch = padded([some_tokens(30), some_tokens(9)], side)
        ids = np.where(batch.mask == 1, batch.ids, 300)
        first = decoder.restart().feed(batch.ids, batch.mask)
        second = decoder.restart().feed(ids, batch.mask)
        for row, columns in enumerate(batch.columns):
            np.testing.assert_array_equal(first[row, columns], second[row, columns])


def test_portable_takes_a_batch_of_several_new_tokens_after_a_past(tmp_path: Path) -> None:
    """And padding in every chunk, on both sides: each cache column is a column of the mask."""
    checkpoint = tiny(tmp_path / "m")
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=True))
    model = reference(tmp_path / "m", PI.scale)
    fed, right = [[], []], []
    rows = [some_tokens(40, 3), some_tokens(40, 4)]
    used, mask = [0, 0], np.zeros((2, 0), np.int64)
    for lengths, side in (
        ((12, 5), "left"),
        ((3, 9), "right"),
        ((7, 7), "left"),
        ((1, 4), "right"),
    ):
        parts = [row[at : at + n] for row, at, n in zip(rows, used, lengths, strict=True)]
        batch = padded(parts, side)
        mask = np.concatenate([mask, batch.mask], axis=1)
        found = decoder.feed(batch.ids, mask)
        for row in range(2):
            fed[row].append(found[row, batch.columns[row]])
            used[row] += lengths[row]
    for row in range(2):
        right = expected(model, rows[row][: used[row]])
        assert kl(right, np.concatenate(fed[row])) <= KL_LIMIT


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_hole_in_the_new_columns_gives_nan_for_that_row_alone(
    tmp_path: Path, precision: str
) -> None:
    path = export(tiny(tmp_path / "m"), tmp_path / "o", precision)
    ids, mask = some_tokens(24).reshape(2, 12), np.ones((2, 12), np.int64)
    mask[0, 5] = 0
    found = Decoder(path).feed(ids, mask)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_portable_takes_a_hole(tmp_path: Path) -> None:
    decoder = Decoder(export(tiny(tmp_path / "m"), tmp_path / "o", portable=True))
    tokens, mask = some_tokens(12), np.ones((1, 12), np.int64)
    mask[0, 5] = 0
    right = expected(reference(tmp_path / "m", PI.scale), np.delete(tokens, 5))
    assert kl(right, np.delete(decoder.feed(tokens[None], mask)[0], 5, axis=0)) <= KL_LIMIT


@SIDES
@FORMS
def test_last_logits_are_those_of_each_rows_last_real_token(
    tmp_path: Path, side: str, portable: bool
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    rows, answers = rows_and_answers(reference(tmp_path / "m", PI.scale))
    decoder = Decoder(export(checkpoint, tmp_path / "o", last_logits=True, portable=portable))
    batch = padded([row[:length] for row, length in zip(rows, ROWS, strict=True)], side)
    found = decoder.feed(batch.ids, batch.mask)
    assert found.shape == (3, 1, 512)
    mask = np.concatenate([batch.mask, np.ones((3, 1), np.int64)], axis=1)
    following = np.array([row[n] for row, n in zip(rows, ROWS, strict=True)])
    next_found = decoder.feed(following[:, None], mask)
    for row, answer in enumerate(answers):
        assert kl(answer[ROWS[row] - 1], found[row, 0]) <= KL_LIMIT
        assert kl(answer[ROWS[row]], next_found[row, 0]) <= KL_LIMIT
    alone = decoder.restart().feed(rows[0][None])  # no padding at all
    assert kl(answers[0][-1], alone[0, 0]) <= KL_LIMIT


@FORMS
def test_fp16_is_as_near_as_fp16_gets(tmp_path: Path, portable: bool) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    tokens = some_tokens(3 * CONTEXT)
    right = expected(reference(tmp_path / "m", PI.scale), tokens)
    decoder = Decoder(export(checkpoint, tmp_path / "o", "fp16", portable=portable))
    found = decoder.feed(tokens[None])
    assert found.dtype == np.float32
    assert KL_LIMIT / 1e3 < kl(right, found[0]) <= KL_LIMIT_FP16
    assert kl(right, in_chunks(decoder.restart(), tokens, [50, 1])) <= KL_LIMIT_FP16


def interleaved(checkpoint: Checkpoint) -> Checkpoint:
    """Queries and keys in llama.cpp's order."""
    sizes = checkpoint.hparams
    tensors = {
        name: interleave_rope(tensor, heads)
        for name, tensor in checkpoint.tensors.items()
        for part, heads in (("q_proj", sizes.heads), ("k_proj", sizes.kv_heads))
        if part in name
    }
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


def swapped(checkpoint: Checkpoint) -> Checkpoint:
    """Queries where keys belong."""
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.tensors:
        for old, new in other.items():
            if old in name:
                source = checkpoint.tensors[name.replace(old, new)]
                tensors[name] = dataclasses.replace(source, name=name)
    return dataclasses.replace(checkpoint, tensors=tensors)


FAULTS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "factor dropped": lambda c: with_rope(c, factor=1.0),
    "factor halved": lambda c: with_rope(c, factor=c.rope.factor / 2),
    "factor doubled": lambda c: with_rope(c, factor=c.rope.factor * 2),
    "theta": lambda c: with_rope(c, theta=c.rope.theta * 10),
    "interleaved": interleaved,
    "swapped": swapped,
}
SCALED = {"pi", "linear", "pi-over-llama3"}


@ARCHITECTURES
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in SCALED], ids=str)
@FORMS
def test_a_faulty_graph_is_far_off_past_l(
    tmp_path: Path, kind: Kind, architecture: str, portable: bool
) -> None:
    shape = Shape(96, 64, 2, heads=4, kv_heads=4, head_dim=32, context=CONTEXT)
    checkpoint = tiny(tmp_path / "m", kind, architecture=architecture, shape=shape)
    tokens = some_tokens(min(checkpoint.rope.context, 3 * CONTEXT))
    right = expected(reference(tmp_path / "m", kind.scale), tokens)[CONTEXT:]

    def divergence(model: Checkpoint, name: str) -> float:
        path = export(model, tmp_path / name, portable=portable)
        return kl(right, Decoder(path).feed(tokens[None])[0, CONTEXT:])

    assert divergence(checkpoint, "right") <= KL_LIMIT
    found = {name: divergence(fault(checkpoint), name) for name, fault in FAULTS.items()}
    assert min(found.values()) > KL_WRONG, found


@FORMS
def test_positions_past_the_table_are_an_error(tmp_path: Path, portable: bool) -> None:
    checkpoint = tiny(tmp_path / "m")
    decoder = Decoder(export(checkpoint, tmp_path / "o", portable=portable))
    decoder.feed(some_tokens(checkpoint.rope.context)[None])
    with pytest.raises(Exception, match=r"(?i)position|cos_cache|seqlens_k|index"):
        decoder.feed(some_tokens(1)[None])


RUN = """
import sys
import numpy as np
from pathlib import Path
from tests.converters.targets.onnx.decoders import Decoder, padded, some_tokens
decoder = Decoder(Path(sys.argv[1]))
batch = padded([some_tokens(90), some_tokens(41, 2)], "left")
mask = np.concatenate([batch.mask, np.ones((2, 1), np.int64)], axis=1)
whole = decoder.feed(batch.ids, batch.mask)
after = decoder.feed(np.array([[1], [2]]), mask)
real = [whole[row, columns] for row, columns in enumerate(batch.columns)]
np.save(sys.argv[2], np.concatenate([*real, after[:, 0]]))
"""


def test_without_flash_attention_the_logits_are_the_same(tmp_path: Path) -> None:
    path = export(tiny(tmp_path / "m", shape=FUSED), tmp_path / "o")
    found = []
    for disabled in ("0", "1"):
        result = tmp_path / f"{disabled}.npy"
        environment = {**os.environ, "ORT_GQA_DISABLE_FLASH_ATTENTION": disabled}
        subprocess.run(
            [sys.executable, "-c", RUN, str(path), str(result)],
            env={**environment, "PYTHONPATH": str(Path.cwd())}, check=True,
        )  # fmt: skip
        found.append(np.load(result))
    assert kl(*found) <= KL_LIMIT


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m")
    sizes = dataclasses.replace(checkpoint.hparams, sliding_window=32)
    with pytest.raises(ConvertError, match="sliding window of 32"):
        export(dataclasses.replace(checkpoint, hparams=sizes), tmp_path / "o")
