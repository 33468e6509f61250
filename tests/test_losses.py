"""The losses against the two-logit-matrix form of the original, and what IFM costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax.methods import losses


def unit(rng, *shape):
    x = jax.random.normal(rng, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(seed, n=12, k=40, dim=8):
    rngs = jax.random.split(jax.random.key(seed), 3)
    query, key, queue = unit(rngs[0], n, dim), unit(rngs[1], n, dim), unit(rngs[2], k, dim)
    # Keys near their queries, as in training.
    key = key + 2 * query
    return query, key / jnp.linalg.norm(key, axis=-1, keepdims=True), queue


def original(query, key, queue, temperature, eps_positive, eps_negative):
    """Cross entropy over the (N, 1 + K) logits, as the original builds them; returns the losses (N,) and the logits."""
    positive = jnp.sum(query * key, axis=-1, keepdims=True) - eps_positive
    negatives = query @ queue.T + eps_negative
    logits = jnp.concatenate([positive, negatives], axis=1) / temperature
    return -jax.nn.log_softmax(logits)[:, 0], logits


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(8))
def test_ifm_equals_the_two_logit_matrices(seed):
    random = np.random.default_rng(seed)
    temperature, alpha = random.uniform(0.05, 1.0), random.uniform(0, 3)
    epsilon = tuple(random.uniform(0, 0.5, 2))
    query, key, queue = embeddings(seed)

    def ours(query):
        return losses.ifm_info_nce(query, key, queue, temperature, epsilon, alpha)

    def theirs(query):
        clean, _ = original(query, key, queue, temperature, 0, 0)
        shifted, _ = original(query, key, queue, temperature, *epsilon)
        return (clean + alpha * shifted) / (1 + alpha)

    np.testing.assert_allclose(ours(query), theirs(query), rtol=1e-12, atol=1e-12)
    weights = jnp.asarray(random.uniform(size=len(query)))
    np.testing.assert_allclose(
        jax.grad(lambda q: ours(q) @ weights)(query),
        jax.grad(lambda q: theirs(q) @ weights)(query),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.usefixtures("x64")
def test_info_nce_equals_cross_entropy():
    query, key, queue = embeddings(1)
    np.testing.assert_allclose(
        losses.info_nce(query, key, queue, 0.2), original(query, key, queue, 0.2, 0, 0)[0], rtol=1e-12
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
def test_epsilon_zero_is_moco_exactly(alpha):
    query, key, queue = embeddings(2)
    moco = losses.info_nce(query, key, queue, 0.2)
    ifm = losses.ifm_info_nce(query, key, queue, 0.2, 0.0, alpha)
    # (x + alpha x) / (1 + alpha) rounds; with the weight 1 of the paper it is exact.
    np.testing.assert_allclose(ifm, moco, rtol=0 if alpha != 0.3 else 2e-7)


def test_one_epsilon_is_the_pair_of_it():
    query, key, queue = embeddings(3)
    one = losses.ifm_info_nce(query, key, queue, 0.2, 0.1)
    np.testing.assert_array_equal(one, losses.ifm_info_nce(query, key, queue, 0.2, (0.1, 0.1)))
    np.testing.assert_allclose(one, losses.ifm_info_nce(query, key, queue, 0.2, (0.2, 0.0)), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_ifm_rescales_each_gradient_by_the_saturation():
    """The gradient of the shifted loss is the clean one times (1 - p+_eps) / (1 - p+), query by query."""
    query, key, queue = embeddings(4)
    temperature, epsilon = 0.2, 0.1

    def gradient(shift):
        def loss(query):
            return jnp.sum(jax.nn.softplus(losses.contrast(query, key, queue, temperature).margin + shift))

        return jax.grad(loss)(query)

    def positive(eps):
        return jax.nn.softmax(original(query, key, queue, temperature, eps, eps)[1])[:, :1]

    ratio = (1 - positive(epsilon)) / (1 - positive(0.0))
    assert float(jnp.ptp(ratio)) > 0.1  # the test would be empty if all queries were alike
    shifted = gradient(losses.margin_shift(temperature, epsilon))
    np.testing.assert_allclose(shifted, gradient(0.0) * ratio, rtol=1e-10, atol=1e-14)


def test_contrast_accuracy_is_topk_of_the_unperturbed_logits():
    query, _, queue = embeddings(5, n=64, k=30)
    key = query[::-1] + query  # half of them near
    key = key / jnp.linalg.norm(key, axis=1, keepdims=True)
    _, logits = original(query, key, queue, 0.2, 0, 0)
    order = jnp.argsort(-logits, axis=1)
    rank = losses.contrast(query, key, queue, 0.2).rank
    for top in (1, 5):
        expected = 100 * float(jnp.mean(jnp.any(order[:, :top] == 0, axis=1).astype(jnp.float32)))
        assert 0 < expected < 100
        assert float(losses.contrast_accuracy(rank, top)) == pytest.approx(expected)


def test_bfloat16_embeddings_are_compared_in_float32():
    query, key, queue = (x.astype(jnp.bfloat16) for x in embeddings(6))
    loss = losses.info_nce(query, key, queue, 0.1)
    assert loss.dtype == jnp.float32
    exact = losses.info_nce(*(x.astype(jnp.float32) for x in (query, key, queue)), 0.1)
    np.testing.assert_array_equal(loss, exact)


def test_extreme_margins_stay_finite():
    query = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    key, queue = jnp.asarray([[1.0, 0.0], [1.0, 0.0]]), jnp.asarray([[-1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda q: jnp.sum(losses.ifm_info_nce(q, key, queue, 1e-3, 0.1)))(query)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_misfitting_shapes_are_named():
    query, key, queue = embeddings(7)
    with pytest.raises(ValueError, match=r"query \(12, 8\) and key \(12, 8\) .* queue \(40, 7\)"):
        losses.info_nce(query, key, queue[:, :7], 0.2)
    with pytest.raises(ValueError, match="key"):
        losses.info_nce(query, key[:5], queue, 0.2)


def _compiled_memory(method, n, k):
    def loss(query, key, queue):
        if method == "moco":
            return jnp.mean(losses.info_nce(query, key, queue, 0.2))
        return jnp.mean(losses.ifm_info_nce(query, key, queue, 0.2, 0.1))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 32), (n, 32), (k, 32))]
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_ifm_needs_no_second_matrix():
    """The compiled gradient of IFM holds no (N, K) array that MoCo's does not."""
    n, k = 128, 4096
    moco, ifm = _compiled_memory("moco", n, k), _compiled_memory("ifm", n, k)
    assert moco >= 4 * n * k  # the one matrix is there ...
    assert ifm - moco < 4 * n * k / 8  # ... and IFM's own share is of size N
