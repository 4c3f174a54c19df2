"""Means and divergences against torch, scipy-free arithmetic and resampling."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from pi_convert.evaluate.statistics import (
    Comparison,
    clustered_mean,
    compare_positions,
    kl_divergence,
    limit_threads,
    negative_log_likelihood,
    student_t95,
)


def logits(seed: int, rows: int = 70, vocabulary: int = 513) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (rows, vocabulary)).astype(np.float32)


# Relative, of the worst position: float32 rounds the exponentials, and where the models are near
# what a difference adds. Measured: 3e-8, 3e-4 and 3e-2, at mean KLs of 5, 4e-5 and 4e-11.
@pytest.mark.parametrize(("spread", "agrees"), [(4, 1e-6), (1e-2, 1e-3), (1e-5, 0.1)])
def test_kl_is_torchs_in_float64(spread: float, agrees: float) -> None:
    p, q = logits(0), logits(0) + spread * logits(1) / 4
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert np.allclose(kl_divergence(p, q), expected.numpy(), rtol=agrees, atol=0)
    assert np.array_equal(kl_divergence(p, p), np.zeros(len(p)))


def test_no_more_threads_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    log = np.log

    def counted(values: np.ndarray) -> np.ndarray:
        seen.add(threading.get_ident())
        if limit == 3:
            together.wait()
        result: np.ndarray = log(values)
        return result

    monkeypatch.setattr(np, "log", counted)
    following = np.zeros(48, dtype=np.int32)  # three parts of 16 positions
    try:
        for limit in (1, 3):
            together = threading.Barrier(limit, timeout=30)
            seen.clear()
            limit_threads(limit)
            negative_log_likelihood(logits(0, rows=48), following)
            assert len(seen) == limit
    finally:
        limit_threads(None)


def test_paired_nlls_are_torchs_and_so_is_their_difference_between_near_models() -> None:
    p, q = logits(0), logits(0) + 1e-5 * logits(1)
    following = np.arange(len(p), dtype=np.int32)
    pair = compare_positions(p, q, following)
    chosen = np.arange(len(p)), following
    right = [-torch.log_softmax(torch.from_numpy(x).double(), -1).numpy()[chosen] for x in (p, q)]
    assert np.abs(pair.nll_p - right[0]).max() <= 1e-6
    assert np.abs(pair.nll_q - right[1]).max() <= 1e-6
    assert np.abs((pair.nll_p - pair.nll_q) - (right[0] - right[1])).max() <= 1e-9


def test_kl_of_what_is_not_finite_is_not_small() -> None:
    p, q = logits(0), logits(1)
    q[3, 5] = np.nan
    assert np.isnan(kl_divergence(p, q)[3])
    assert not np.isnan(kl_divergence(p, q)[2])


def test_nll_is_torchs_cross_entropy_and_nan_without_a_token() -> None:
    p = logits(2)
    following = np.arange(len(p), dtype=np.int32)
    following[-1] = -1
    found = negative_log_likelihood(p, following)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(p[:-1]).double(),
        torch.from_numpy(following[:-1].astype(np.int64)),
        reduction="none",
    )
    assert np.abs(found[:-1] - expected.numpy()).max() <= 1e-6  # nats; exponentials are float32
    assert np.isnan(found[-1])


def test_a_clustered_error_is_what_resampling_documents_gives() -> None:
    draw = np.random.default_rng(3)
    sizes = draw.integers(20, 60, 40)
    cluster = np.repeat(np.arange(40), sizes).astype(np.int32)
    values = np.repeat(draw.normal(0, 1, 40), sizes) + draw.normal(0, 0.2, len(cluster))
    found = clustered_mean(values, cluster)
    parts = [values[cluster == i] for i in range(40)]
    means = []
    for _ in range(4000):
        picked = [parts[i] for i in draw.integers(0, 40, 40)]
        means.append(np.concatenate(picked).mean())
    assert found.standard_error == pytest.approx(np.std(means), rel=0.1)
    independent = values.std() / np.sqrt(len(values))
    assert found.standard_error > 3 * independent  # what ignoring the documents would claim
    low, high = found.interval or (0, 0)
    assert high - found.value == pytest.approx(2.0227 * found.standard_error, rel=1e-4)
    assert low < found.value < high


# Student's table, two-sided 95 %
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (7, 2.365),
     (10, 2.228), (15, 2.131), (30, 2.042), (39, 2.023), (120, 1.980), (1000, 1.962)],
)  # fmt: skip
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t95(degrees) == pytest.approx(expected, abs=6e-4)


def test_an_interval_of_few_documents_holds_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    cluster = np.repeat(np.arange(4), 10).astype(np.int32)
    hits = 0
    for _ in range(2000):
        found = clustered_mean(np.repeat(draw.normal(0, 1, 4), 10), cluster)
        low, high = found.interval or (0, 0)
        hits += low <= 0 <= high
    # 0.95 within 4 standard errors of sqrt(0.95 x 0.05 / 2000) = 0.0049; 1.96 would give 0.86.
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_one_document_has_no_error() -> None:
    found = clustered_mean(np.ones(5), np.zeros(5, dtype=np.int32))
    assert found.standard_error is None
    assert found.interval is None


def test_a_comparison_leaves_out_positions_without_a_token() -> None:
    p, q = logits(4, rows=3), logits(5, rows=3)
    following = np.array([1, 2, -1], dtype=np.int32)
    document = np.array([0, 1, -1], dtype=np.int32)
    compared = Comparison()
    compared.add(p, q, following, document)
    assert compared.positions == 3
    assert compared.clustered_kl().tokens == 2
    assert compared.mean_kl == pytest.approx(kl_divergence(p, q).mean())
    agreement = np.mean(p.argmax(1) == q.argmax(1))
    assert compared.top1_agreement == pytest.approx(agreement)
