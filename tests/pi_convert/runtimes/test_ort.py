"""ONNX Runtime's sessions: one cache for past and present, cut and used again, against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters.containers.onnx import OnnxFile, read_onnx_file
from converters.errors import EnvironmentNotReadyError
from converters.sources import open_checkpoint
from converters.targets.onnx import PRECISIONS, GraphOptions, plan_onnx, write_onnx
from pi_convert.evaluate.statistics import kl_divergence
from pi_convert.runtimes.onnx_tables import stored_tables
from pi_convert.runtimes.ort import OrtModel, OrtOptions, OrtSession
from pi_convert.runtimes.pytorch import TorchModel
from tests.tiny import ODD, Shape, write_tiny

TOKENS = np.random.default_rng(3).integers(0, 512, 700).astype(np.int32)
WIDE = Shape(hidden=192, intermediate=160, layers=2, heads=6, kv_heads=2, head_dim=32)
# Of a logit: 4e-5 and 0.054 were measured.
LIMIT = {"fp32": 2e-4, "fp16": 0.2}


def run(session: OrtSession, tokens: np.ndarray, position: int, chunk: int) -> np.ndarray:
    found = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        logits = session.feed(part, position=position + start, logits=True)
        assert logits is not None
        found.append(logits)
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("precision", "shape", "portable"),
    [
        ("fp32", WIDE, False),
        ("fp32", ODD, False),
        ("fp32", WIDE, True),
        ("fp16", WIDE, False),
    ],
)
def test_a_cache_is_filled_cut_and_filled_again(
    precision: str, shape: Shape, portable: bool, tmp_path: Path
) -> None:
    source = open_checkpoint(str(write_tiny(tmp_path / "tiny", shape=shape)))
    checkpoint = source.interpolate(8.0)
    options = GraphOptions(portable=portable)
    write_onnx(checkpoint, [plan_onnx(checkpoint, precision)], tmp_path / "out", options, threads=1)
    file = read_onnx_file(tmp_path / "out" / "onnx" / PRECISIONS[precision].file_name)
    one = TorchModel(checkpoint)
    with (
        OrtModel(file, OrtOptions(threads=1), stored_tables(file)) as model,
        model.open_session(len(TOKENS)) as session,
        one.open_session(len(TOKENS)) as oracle,
    ):
        right = run(oracle, TOKENS, 0, 350)
        limit = LIMIT[precision]
        assert np.abs(run(session, TOKENS, 0, 350) - right).max() <= limit
        kept = session.keep(300)
        assert kept == 300
        again = run(session, TOKENS[300:], 300, 57)
        assert np.abs(again - right[300:]).max() <= limit
        assert session.keep(0) == 0
        other = run(session, TOKENS[:200], 324, 100)  # the last rows of the tables
        oracle.keep(0)
        assert np.abs(other - run(oracle, TOKENS[:200], 324, 100)).max() <= limit
        assert np.abs(other - right[:200]).max() <= limit  # RoPE is relative
        session.keep(0)
        swapped = np.concatenate([TOKENS[100:200], TOKENS[:100]])
        assert np.abs(run(session, swapped, 0, 100) - right[:200]).max() > 10 * limit


def exported(folder: Path, precision: str = "fp32") -> OnnxFile:
    source = open_checkpoint(str(write_tiny(folder / "tiny", shape=WIDE)))
    write_onnx(source, [plan_onnx(source, precision)], folder / "out", threads=1)
    return read_onnx_file(folder / "out" / "onnx" / PRECISIONS[precision].file_name)


def test_cuda_is_a_clear_error_where_it_does_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime itself goes on with the CPU, and complains on stderr."""
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(EnvironmentNotReadyError, match=r"does not run on cuda|no provider"):
        OrtModel(exported(tmp_path, "fp16"), OrtOptions(device="cuda"), None)
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    file, found = exported(tmp_path, "fp16"), []
    for device in ("cpu", "cuda"):
        with (
            OrtModel(file, OrtOptions(device=device), None) as model,  # type: ignore[arg-type]
            model.open_session(128) as session,
        ):
            first = run(session, TOKENS[:128], 0, 50)
            session.keep(60)
            found.append(np.concatenate([first[:60], run(session, TOKENS[60:128], 60, 1)]))
    assert kl_divergence(found[1], found[0]).mean() < 1e-4


def test_past_and_present_are_one_buffer(tmp_path: Path) -> None:
    file = exported(tmp_path)
    with OrtModel(file, OrtOptions(threads=1), None) as model, model.open_session(64) as session:
        session.feed(TOKENS[:8], position=0, logits=False)
        before = {name: value.data_ptr() for name, value in session._past.items()}
        first = {name: value.numpy()[:, :, :8].copy() for name, value in session._past.items()}
        session.feed(TOKENS[8:20], position=8, logits=False)
        for name, value in session._past.items():
            assert value.shape()[2] == 64
            assert value.data_ptr() == before[name]
            assert np.array_equal(value.numpy()[:, :, :8], first[name])
            assert np.any(value.numpy()[:, :, 19])
            assert not np.any(value.numpy()[:, :, 20:])
        with pytest.raises(ValueError, match="do not fit a cache of 64"):
            session.feed(TOKENS[:50], position=20, logits=False)
