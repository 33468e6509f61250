"""Diagnostics of embeddings against their formulas over all pairs at once, and where the answer is known."""

import jax
import numpy as np
import pytest
import torch

from ifm_jax.errors import RunError, UsageError
from ifm_jax.evaluation import diagnostics


def views(count=50, dim=12, dtype=np.float64):
    """Embeddings of two views, near each other, of any length."""
    random = np.random.default_rng(0)
    first = random.normal(size=(count, dim)) + 0.5
    second = first + 0.4 * random.normal(size=(count, dim))
    return (3 * first).astype(dtype), second.astype(dtype)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [7, 25, 64])
def test_alignment_and_uniformity_are_the_authors(dtype, rtol, chunk):
    first, second = views(dtype=dtype)
    x, y = (torch.tensor(unit(view.astype(np.float64))) for view in (first, second))
    assert diagnostics.alignment(first, second) == pytest.approx(float((x - y).norm(dim=1).pow(2).mean()), rel=rtol)
    for t in (2.0, 3.0):
        expected = float(torch.pdist(x).pow(2).mul(-t).exp().mean().log())
        assert diagnostics.uniformity(first, t, chunk=chunk) == pytest.approx(expected, rel=rtol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [7, 25, 64])
def test_histograms_count_every_pair_once(chunk):
    first, second = views()
    found = diagnostics.similarity_histograms(first, second, bins=40, chunk=chunk)
    similarity = unit(first) @ unit(second).T
    positive, negative = np.diag(similarity), similarity[~np.eye(50, dtype=bool)]
    np.testing.assert_array_equal(found["positive_histogram"], np.histogram(positive, found["edges"])[0])
    np.testing.assert_array_equal(found["negative_histogram"], np.histogram(negative, found["edges"])[0])
    assert found["negative_histogram"].sum() == 50 * 49
    assert found["positive_mean"] == pytest.approx(positive.mean(), rel=1e-12)
    assert found["negative_mean"] == pytest.approx(negative.mean(), rel=1e-12)


def test_effective_rank_is_the_formula():
    features = views()[0] @ np.diag(10.0 ** -np.arange(12))
    values = torch.linalg.svdvals(torch.tensor(features))
    share = values / values.sum() + 1e-7
    assert diagnostics.effective_rank(features) == pytest.approx(
        float(torch.exp(-(share * share.log()).sum())), rel=1e-9
    )


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(8, 8)))[0][:rank]
    weights = np.linalg.qr(random.normal(size=(40, rank)))[0]
    # Epsilon adds a little for each of the other directions.
    assert diagnostics.effective_rank(5 * weights @ basis) == pytest.approx(rank, rel=2e-5)


def test_identical_embeddings():
    same = np.tile(np.float32([[3, 4, 0]]), (9, 1))
    found = diagnostics.diagnose(same, 2 * same, bins=10, chunk=4)
    assert found["alignment"] == pytest.approx(0, abs=1e-12)
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(found["positive_histogram"], [0] * 9 + [9])
    np.testing.assert_array_equal(found["negative_histogram"], [0] * 9 + [72])


def test_orthogonal_embeddings():
    basis = np.eye(6, dtype=np.float32)
    found = diagnostics.diagnose(basis, -basis, bins=4, chunk=4)
    assert found["alignment"] == pytest.approx(4)
    assert found["uniformity"] == pytest.approx(-4)  # all at squared distance 2
    assert found["effective_rank"] == pytest.approx(6, rel=1e-5)
    np.testing.assert_array_equal(found["positive_histogram"], [6, 0, 0, 0])
    np.testing.assert_array_equal(found["negative_histogram"], [0, 0, 30, 0])
    assert (found["positive_mean"], found["negative_mean"]) == (-1, 0)


def test_uniform_on_the_circle():
    """Points at equal angles: the mean over the circle of exp(-4 (1 - cos)) is e^-4 I0(4)."""
    count = 400
    angle = 2 * np.pi * np.arange(count) / count
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    # With each point's pair with itself, the sum over equal angles is the integral.
    everything = np.exp(diagnostics.uniformity(points, chunk=150)) * (count - 1) / count + 1 / count
    assert everything == pytest.approx(np.exp(-4) * np.i0(4.0), rel=1e-5)


def test_a_row_of_zeros_is_no_trouble_and_values_are_plain():
    first, second = views(dtype=np.float32)
    first[3] = 0
    found = diagnostics.diagnose(jax.numpy.asarray(first), second, chunk=16)
    assert all(type(value) is float or isinstance(value, np.ndarray) for value in found.values())
    assert all(np.isfinite(value).all() for value in found.values())


def test_mistakes_are_named():
    first, second = views()
    with pytest.raises(UsageError, match=r"embeddings \(50, 12\) and \(49, 12\)"):
        diagnostics.diagnose(first, second[1:])
    with pytest.raises(UsageError, match=r"embeddings \(1, 12\): .* at least two rows"):
        diagnostics.uniformity(first[:1])
    first[2, 2] = np.nan
    for call in (diagnostics.uniformity, diagnostics.effective_rank, lambda x: diagnostics.alignment(x, second)):
        with pytest.raises(RunError, match="not finite"):
            call(first)
