"""Weighted nearest neighbors against scikit-learn's, over devices and chunks, and what they hold in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ifm_jax import sharding
from ifm_jax.errors import RunError, UsageError
from ifm_jax.evaluation import knn


def problem(examples, queries, features, classes, noise, dtype=np.float32):
    """Classes that overlap, so that neighbors disagree."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(classes, features))

    def draw(count):
        labels = random.integers(0, classes, count)
        return (centers[labels] + noise * random.normal(size=(count, features))).astype(dtype), labels

    return *draw(examples), *draw(queries)


def sklearn_shares(bank, labels, queries, classes, k, temperature):
    """Returns the share of the votes of every class, `(N, C)`, in double precision."""
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    model.fit(bank.astype(np.float64), labels)
    shares = np.zeros((len(queries), classes))
    shares[:, model.classes_] = model.predict_proba(queries.astype(np.float64))
    return shares


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_predictions_are_scikit_learn_s():
    bank, labels, queries, truth = problem(5000, 1000, 512, 100, noise=6.0)
    shares = sklearn_shares(bank, labels, queries, 100, 200, 0.07)
    ranked = -np.sort(-shares, axis=1)[:, :5]
    clear = ranked[:, 0] - ranked[:, 1] > 1e-6
    assert clear.mean() > 0.99
    assert 0.2 < np.mean(np.argmax(shares, axis=1) == truth) < 0.98
    for dtype, close in [(np.float32, 1e-5), (np.float64, 1e-9)]:
        votes = knn.classify(bank.astype(dtype), labels, queries, 100, bank_chunk=1500, query_chunk=300)
        assert votes.classes.shape == votes.scores.shape == (1000, 5)
        np.testing.assert_array_equal(votes.predicted[clear], np.argmax(shares, axis=1)[clear])
        # In float32 the 200th and the 201st neighbor of a query may be one.
        same = np.abs(votes.scores - ranked).max(axis=1) < close
        assert same.mean() >= (0.995 if dtype == np.float32 else 1)


SMALL = (300, 101, 16, 7, 2.0)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("chunks", [(7, 300), (101, 90), (64, 1)])
def test_devices_and_chunks_do_not_matter(devices, chunks):
    bank, labels, queries, _ = problem(*SMALL)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    # A chunk of one example is smaller than k.
    bank, labels = (bank[:30], labels[:30]) if chunks[1] == 1 else (bank, labels)
    votes = knn.classify(bank, labels, queries, 7, k=20, mesh=mesh, query_chunk=chunks[0], bank_chunk=chunks[1])
    expected = knn.classify(bank, labels, queries, 7, k=20)
    np.testing.assert_array_equal(votes.classes, expected.classes)
    np.testing.assert_allclose(votes.scores, expected.scores, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [0.07, 1e-4])
def test_double_precision(temperature):
    bank, labels, queries, _ = problem(*SMALL, dtype=np.float64)
    votes = knn.classify(bank, labels, queries, 7, k=20, temperature=temperature, bank_chunk=70)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    for query, classes, scores in zip(unit[1], votes.classes, votes.scores, strict=True):
        similarity = unit[0] @ query
        nearest = np.argsort(-similarity, kind="stable")[:20]
        share = np.zeros(7)
        for i in nearest:
            share[labels[i]] += np.exp((similarity[i] - similarity[nearest[0]]) / temperature)
        share /= share.sum()
        np.testing.assert_allclose(scores, np.sort(share)[::-1][:5], rtol=1e-9, atol=1e-300)
        assert classes[0] == np.argmax(share)


def test_length_does_not_matter():
    bank, labels, queries, _ = problem(*SMALL)
    lengths = 2.0 ** np.random.default_rng(1).integers(-9, 9, (300, 1))
    expected = knn.classify(bank, labels, queries, 7, k=20)
    votes = knn.classify((bank * lengths).astype(np.float32), labels, queries * np.float32(8), 7, k=20)
    np.testing.assert_array_equal(votes.classes, expected.classes)
    np.testing.assert_allclose(votes.scores, expected.scores, rtol=0, atol=1e-5)


def test_of_equals_the_first_is_nearer_and_the_lower_class_first():
    bank = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 2, 2]]
    labels = np.asarray([2, 0, 1, 3, 4, 5])
    query = bank[:1]
    for chunk in (1, 2, 4, 6):
        votes = knn.classify(bank, labels, query, 9, k=2, bank_chunk=chunk)  # the third equal one has no vote
        np.testing.assert_array_equal(votes.classes, [[0, 2, -1, -1, -1]])
        np.testing.assert_allclose(votes.scores, [[0.5, 0.5, 0, 0, 0]])
    zero = knn.classify(bank, labels, 0 * query, 9, k=1)  # no direction: as far from all
    assert zero.predicted[0] == 2


def test_a_small_bank_votes_as_a_whole():
    bank, labels, queries, _ = problem(30, 5, 16, 3, 1.0)
    votes = knn.classify(bank, labels, queries, 3)
    assert votes.classes.shape == (5, 3)
    np.testing.assert_array_equal(votes.classes, knn.classify(bank, labels, queries, 3, k=30).classes)
    np.testing.assert_allclose(votes.scores.sum(axis=1), 1)


def test_memory_is_bounded_by_the_chunks():
    """The program sees the bank a chunk at a time, and holds a few arrays of the similarities' size."""
    rows, chunk, features, k = 256, 2048, 64, 50
    shapes = [(rows, k), (rows, k), (rows, features), (chunk, features), (), ()]
    kinds = [jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    memory = jax.jit(knn.merge).lower(*arguments).compile().memory_analysis()
    inputs = 4 * (2 * rows * k + rows * features + chunk * features)
    assert memory.argument_size_in_bytes <= inputs + 64
    assert memory.temp_size_in_bytes <= 4 * (3 * rows * (k + chunk) + 2 * features * (rows + chunk))


def test_mistakes_are_named():
    bank, labels, queries, _ = problem(*SMALL)
    for changed, message in [
        ({"queries": queries[:, :3]}, r"bank \(300, 16\) and queries \(101, 3\)"),
        ({"queries": queries[:0]}, "300 examples in the bank and 0 queries"),
        ({"bank": bank[:0], "bank_labels": labels[:0]}, "0 examples in the bank"),
        ({"bank_labels": labels[1:]}, r"bank_labels \(299,\): expected one label for each of 300"),
        ({"num_classes": 6}, "from 0 to 6: expected 0 to 5 for 6 classes"),
        ({"bank_labels": labels - 1}, "from -1 to 5"),
        ({"k": 0}, "k=0"),
        ({"bank_chunk": 0}, "bank_chunk=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ]:
        arguments = {"bank": bank, "bank_labels": labels, "queries": queries, "num_classes": 7} | changed
        with pytest.raises(UsageError, match=message):
            knn.classify(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(value):
    bank, labels, queries, _ = problem(*SMALL)
    broken = bank.copy()
    broken[17, 3] = value
    with pytest.raises(RunError, match="not finite"):
        knn.classify(broken, labels, queries, 7, k=20, bank_chunk=90)
    with pytest.raises(RunError, match="not finite"):
        knn.classify(bank, labels, broken, 7, k=20)
