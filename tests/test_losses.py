"""The losses against the originals' matrices of logits and other libraries, over devices, and what they cost."""

import doctest
import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import torch

from ifm_jax import sharding
from ifm_jax.methods import losses, method
from references.torchvision_peer import torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is deprecated inside them is not ours to mend
    assert torchvision  # lightly imports it, which takes our peer's declarations
    import lightly.loss
    import pytorch_metric_learning.losses


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- SimCLR and hard negatives ---------------------------------------------------------------------------------------

# beta, tau_plus, (epsilon of the positive, epsilon of the negatives), alpha
VARIANTS = {
    "plain": (0.0, 0.0, (0.0, 0.0), 1.0),
    "ifm": (0.0, 0.0, (0.1, 0.2), 0.7),
    "hard": (1.5, 0.0, (0.0, 0.0), 1.0),
    "debiased": (0.0, 0.3, (0.0, 0.0), 1.0),
    "all": (0.5, 0.1, (0.1, 0.2), 0.7),
}

SEEDS, TEMPERATURES = range(8), (0.1, 0.5, 1.0)


def hcl_loss(pos, neg, temperature, beta, tau_plus):
    """The released code's `criterion`, line by line, from exponentiated similarities (Q,) and (Q, K), torch's."""
    N = neg.shape[1]
    imp = (beta * neg.log()).exp()
    reweight_neg = (imp * neg).sum(dim=-1) / imp.mean(dim=-1)
    Ng = (-tau_plus * N * pos + reweight_neg) / (1 - tau_plus)
    Ng = torch.clamp(Ng, min=N * np.e ** (-1 / temperature))
    return -torch.log(pos / (pos + Ng))


def weighted(of_shift, temperature, variant):
    """(clean + alpha shifted) / (1 + alpha), of exponentiated similarities times e^(shift / temperature)."""
    beta, tau_plus, (lower, higher), alpha = VARIANTS[variant]
    clean, shifted = (
        hcl_loss(*of_shift(np.exp(-low / temperature), np.exp(high / temperature)), temperature, beta, tau_plus)
        for low, high in ((0.0, 0.0), (lower, higher))
    )
    return (clean + alpha * shifted) / (1 + alpha)


def original_queue(query, key, queue, temperature, variant):
    """MoCo's similarities, the released code's loss."""
    pos, neg = torch.exp((query * key).sum(1) / temperature), torch.exp(query @ queue.T / temperature)
    return weighted(lambda low, high: (pos * low, neg * high), temperature, variant)


def original_batch(out_1, out_2, temperature, variant):
    """SimCLR's similarities as the released code has them: the full matrix, masked."""
    batch_size = len(out_1)
    out = torch.cat([out_1, out_2], dim=0)
    neg = torch.exp(torch.mm(out, out.t()) / temperature)
    mask = torch.ones((batch_size, 2 * batch_size), dtype=bool)
    for i in range(batch_size):
        mask[i, i] = mask[i, i + batch_size] = False
    neg = neg.masked_select(torch.cat((mask, mask), 0)).view(2 * batch_size, -1)
    pos = torch.exp(torch.sum(out_1 * out_2, dim=-1) / temperature)
    pos = torch.cat([pos, pos], dim=0)
    return weighted(lambda low, high: (pos * low, neg * high), temperature, variant)


@functools.cache
def ours(kind, variant):
    """Ours, compiled once: `(arrays, temperature, weights)` to the losses, and the gradients of their weighted sum."""
    beta, tau_plus, epsilon, alpha = VARIANTS[variant]
    function = {"queue": losses.ifm_info_nce, "batch": losses.nt_xent}[kind]

    def total(arrays, temperature, weights):
        found = function(*arrays, temperature, epsilon, alpha, beta=beta, tau_plus=tau_plus)
        return found @ weights, found

    def both(arrays, temperature, weights):
        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(arrays, temperature, weights)
        return found, gradient

    return jax.jit(both)


def some(kind, seed=0, n=4, dim=4):
    """Embeddings whose positives are near, far, and between."""
    query, key, queue = embeddings(seed, n=n, k=9, dim=dim)
    key = unit(jax.random.key(seed + 100), n, dim) + jnp.linspace(-2, 2, n)[:, None] * query
    key = key / jnp.linalg.norm(key, axis=1, keepdims=True)
    return {"queue": (query, key, queue), "batch": (query, key)}[kind]


def assert_near(actual, expected, tolerance=1e-12):
    """Relative to the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["queue", "batch"])
def test_equals_the_released_code_of_hard_negatives(kind, variant):
    for seed, temperature in itertools.product(SEEDS, TEMPERATURES):
        arrays = some(kind, seed)
        weights = np.random.default_rng(seed).uniform(size=8 if kind == "batch" else 4)
        values, gradient = ours(kind, variant)(arrays, temperature, weights)
        assert values.dtype == jnp.float64
        peers = [torch.tensor(np.asarray(x), requires_grad=True) for x in arrays]
        theirs = {"queue": original_queue, "batch": original_batch}[kind](*peers, temperature, variant)
        assert_near(values, theirs.detach().numpy())
        (theirs * torch.tensor(weights)).sum().backward()
        for by_ours, peer in zip(gradient, peers, strict=True):
            assert_near(by_ours, peer.grad.numpy())


def test_both_sides_of_the_debiasing_floor_are_met():
    """The cases above are on the estimate, on the floor, and where the estimate has no logarithm."""
    met = set()
    with jax.enable_x64(True):
        for seed, temperature in itertools.product(SEEDS, TEMPERATURES):
            query, key, queue = some("queue", seed)
            pos, neg = jnp.exp(jnp.sum(query * key, 1) / temperature), jnp.exp(query @ queue.T / temperature)
            estimate = (neg.sum(1) - 0.3 * 9 * pos) / 0.7
            met |= {("floor" if e < 9 * np.exp(-1 / temperature) else "estimate", bool(e > 0)) for e in estimate}
    assert met == {("estimate", True), ("floor", True), ("floor", False)}


@pytest.mark.parametrize("d", [0.0, -1.0, -1e4, 1e-3])
def test_gradient_is_finite_where_the_estimate_has_no_logarithm(d):
    """R = tau+ K e^s+ to the bit, less, and hardly more."""
    with jax.enable_x64(True):

        def margin(s):
            found = losses.Contrast(positive=s[0], negatives=s[1], rank=jnp.zeros((), jnp.int32), count=2)
            return losses.margins(found, 0.1, 0.0, tau_plus=0.5)[0]

        value, gradient = jax.value_and_grad(margin)(jnp.asarray([1.0, 1.0 + d]))
        if d <= 0:
            np.testing.assert_allclose(value, np.log(2) - 10 - 1, rtol=1e-15)  # the floor
            np.testing.assert_array_equal(gradient, [-1, 0])
        else:
            np.testing.assert_allclose(value, np.log(-np.expm1(-d)) + d - np.log(0.5), rtol=1e-11)
            np.testing.assert_allclose(gradient, [-1 / np.expm1(d) - 1, -1 / np.expm1(-d)], rtol=1e-11)


def exact(kind, arrays, temperature, variant):
    """The released code's loss of each query, in 60 digits; exponentials as they come."""
    beta, tau_plus, (lower, higher), alpha = VARIANTS[variant]
    T = mpmath.mpf(temperature)

    def dot(a, b):
        return mpmath.fsum(x * y for x, y in zip(a, b, strict=True))

    if kind == "queue":
        query, key, queue = arrays
        rows = [(dot(q, k), [dot(q, n) for n in queue]) for q, k in zip(query, key, strict=True)]
    else:
        out, n = [*arrays[0], *arrays[1]], len(arrays[0])
        rows = [
            (dot(out[i], out[(i + n) % (2 * n)]), [dot(out[i], out[j]) for j in range(2 * n) if (j - i) % n])
            for i in range(2 * n)
        ]

    def loss(positive, negatives):
        pos, neg = mpmath.exp(positive / T), [mpmath.exp(x / T) for x in negatives]
        imp = [x**beta for x in neg]
        N = len(neg)
        reweighted = dot(imp, neg) / (mpmath.fsum(imp) / N)
        Ng = max((reweighted - tau_plus * N * pos) / (1 - tau_plus), N * mpmath.exp(-1 / T))
        return mpmath.log(1 + Ng / pos)

    return [(loss(p, ns) + alpha * loss(p - lower, [x + higher for x in ns])) / (1 + alpha) for p, ns in rows]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["queue", "batch"])
def test_holds_at_temperature_one_hundredth(kind, variant):
    """Value and gradient to 1e-12 of 60 digits, where exponentials span 1e-43 to 1e43; float32 stays with them."""
    temperature, arrays = 0.01, some(kind, seed=1)
    weights = np.linspace(0.5, 1.5, 8 if kind == "batch" else 4)
    values, gradient = ours(kind, variant)(arrays, temperature, weights)
    with mpmath.workdps(60):
        numbers = [[[mpmath.mpf(float(x)) for x in row] for row in array] for array in arrays]
        assert_near(values, [float(x) for x in exact(kind, numbers, temperature, variant)])
        step = mpmath.mpf(10) ** -20  # of central differences: their error is of the order of its square
        for array, row in itertools.product(range(2), (0, 3)):  # query and key, the farthest and the nearest pair
            expected = []
            for column in range(4):
                totals = []
                for sign in (1, -1):
                    numbers[array][row][column] += sign * step
                    found = exact(kind, numbers, temperature, variant)
                    totals.append(mpmath.fsum(w * x for w, x in zip(weights.tolist(), found, strict=True)))
                    numbers[array][row][column] -= sign * step
                expected.append(float((totals[0] - totals[1]) / (2 * step)))
            # Relative to the largest of all gradients: of a pair that is told apart it may be 1e-30.
            scale = np.abs(np.asarray(gradient[array])).max()
            np.testing.assert_allclose(gradient[array][row], expected, rtol=0, atol=1e-12 * scale)
    if variant == "all":
        small = tuple(x.astype(jnp.float32) for x in arrays)
        values_32, gradient_32 = ours(kind, variant)(small, temperature, weights.astype(np.float32))
        assert values_32.dtype == jnp.float32
        assert_near(values_32, values, 1e-5)
        for low, high in zip(gradient_32, gradient, strict=True):
            assert np.isfinite(low).all()
            assert_near(low, high, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_asked_for_is_info_nce_exactly(dtype):
    with jax.enable_x64(dtype == "float64"):
        query, key, queue = (x.astype(dtype) for x in embeddings(2))
        plain = (
            jax.nn.logsumexp(jnp.matmul(query, queue.T, precision=jax.lax.Precision.HIGHEST) / 0.2, axis=-1)
            - jnp.sum(query * key, axis=-1) / 0.2
        )
        plain = jax.nn.softplus(plain)
        np.testing.assert_array_equal(losses.info_nce(query, key, queue, 0.2), plain)
        np.testing.assert_array_equal(losses.info_nce(query, key, queue, 0.2, beta=0.0, tau_plus=0.0), plain)
        np.testing.assert_array_equal(losses.ifm_info_nce(query, key, queue, 0.2, 0.0, 1.0, 0.0, 0.0), plain)
        np.testing.assert_array_equal(
            losses.ifm_info_nce(query, key, queue, 0.2, 0.0, 1.0, 1.5, 0.1),
            losses.info_nce(query, key, queue, 0.2, 1.5, 0.1),
        )
        batch = losses.nt_xent(query, key, 0.2)
        np.testing.assert_array_equal(losses.nt_xent(query, key, 0.2, 0.0, 1.0, 0.0, 0.0), batch)
        # The queries of the batch one by one, each against a queue of its own.
        both, n = np.concatenate([query, key]), len(query)
        one = jax.jit(lambda query, key, queue: losses.info_nce(query, key, queue, 0.2))
        for i in range(2 * n):
            j = (i + n) % (2 * n)
            alone = one(both[[i]], both[[j]], np.delete(both, (i, j), axis=0))
            np.testing.assert_allclose(batch[i], alone[0], rtol=1e-5 if dtype == "float32" else 1e-13)


def test_small_beta_and_tau_plus_come_to_none():
    """No jump where the code takes another way."""
    with jax.enable_x64(True):
        arrays = embeddings(2)
        plain = losses.info_nce(*arrays, 0.2)
        np.testing.assert_allclose(losses.info_nce(*arrays, 0.2, beta=1e-9), plain, rtol=1e-7)
        np.testing.assert_allclose(losses.info_nce(*arrays, 0.2, tau_plus=1e-9), plain, rtol=1e-7)


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_nt_xent_equals_other_libraries():
    first, second, _ = embeddings(3)
    temperature = 0.07
    ours, by_ours = jax.value_and_grad(lambda arrays: jnp.mean(losses.nt_xent(*arrays, temperature)))((first, second))

    peers = [torch.tensor(np.asarray(x), requires_grad=True) for x in (first, second)]
    labels = torch.arange(len(first)).repeat(2)
    of_torch = {
        "lightly": lightly.loss.NTXentLoss(temperature)(*peers),
        "pytorch-metric-learning": pytorch_metric_learning.losses.NTXentLoss(temperature)(torch.cat(peers), labels),
    }
    # The other libraries normalize, which takes the radial part out of the gradient; ours is of what it is given.
    tangent = [g - jnp.sum(g * x, axis=1, keepdims=True) * x for g, x in zip(by_ours, (first, second), strict=True)]
    for name, theirs in of_torch.items():
        np.testing.assert_allclose(ours, theirs.item(), rtol=1e-12, err_msg=name)
        for actual, expected in zip(tangent, torch.autograd.grad(theirs, peers), strict=True):
            assert_near(actual, expected.numpy())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        of_optax = optax.losses.ntxent(jnp.concatenate([first, second]), jnp.asarray(labels.numpy()), temperature)
    np.testing.assert_allclose(ours, of_optax, rtol=1e-12)


@pytest.mark.slow
def test_ranks_in_the_batch_are_those_of_the_full_matrix():
    first, second = embeddings(5, n=64)[0], some("queue", 5, n=64, dim=8)[1]
    found = losses.contrast_in_batch(jnp.stack([first, second], axis=1), 0.2, beta=1.0)
    assert found.rank.shape == (64, 2)
    assert found.count == 126
    both = np.concatenate([first, second]).astype(np.float64)
    similarity = both @ both.T
    expected = [
        sum(similarity[i, j] > similarity[i, (i + 64) % 128] for j in range(128) if (j - i) % 64) for i in range(128)
    ]
    assert len(set(expected)) > 20
    np.testing.assert_array_equal(found.rank.T.reshape(-1), expected)
    alike = jnp.ones((3, 2, 1))  # equal is not above, as in the queue
    np.testing.assert_array_equal(losses.contrast_in_batch(alike, 0.2).rank, np.zeros((3, 2)))


def _on_devices(devices, n, dim, dtype, **options):
    """The compiled loss and gradient of split views, and the mesh."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    split, whole = sharding.split(mesh), sharding.replicated(mesh)
    objective = method.Objective(temperature=0.2, **options)

    def loss(views):
        found = losses.contrast_in_batch(
            views,
            objective.temperature,
            objective.beta,
            gather=lambda views: jax.lax.with_sharding_constraint(views, whole),
        )
        return objective(found)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=split, out_shardings=(whole, split))
    return step.lower(jax.ShapeDtypeStruct((n, 2, dim), dtype)).compile(), mesh


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{"kind": "infonce"}, {"kind": "ifm", "beta": 1.0, "tau_plus": 0.1}])
def test_the_number_of_devices_changes_nothing_in_the_batch(options):
    views = jnp.stack(embeddings(6, n=16)[:2], axis=1)
    results = {}
    for devices in (1, 2, 4, 8):
        compiled, mesh = _on_devices(devices, 16, 8, jnp.float64, **options)
        results[devices] = jax.device_get(compiled(jax.device_put(views, sharding.split(mesh))))
        (_, metrics), gradient = results[devices]
        (_, expected), of_one = results[1]
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)
        assert_near(gradient, of_one)
    # One device, no sharding, and the public function: the same.
    epsilon = 0.1 if options["kind"] == "ifm" else 0.0
    plain = losses.nt_xent(
        views[:, 0], views[:, 1], 0.2, epsilon, 1.0, options.get("beta", 0.0), options.get("tau_plus", 0.0)
    )
    np.testing.assert_allclose(results[8][0][0], jnp.mean(plain), rtol=1e-12)


def _largest(compiled):
    """The number of entries of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("options", [{"kind": "ifm"}, {"kind": "ifm", "beta": 1.0, "tau_plus": 0.1}])
def test_each_device_holds_its_rows_of_the_similarities(options):
    n, dim = 256, 32
    matrix, memory = (2 * n) ** 2, {}
    for devices in (1, 8):
        compiled, _ = _on_devices(devices, n, dim, jnp.float32, **options)
        assert _largest(compiled) == matrix // devices
        memory[devices] = compiled.memory_analysis().temp_size_in_bytes
    gathered = 4 * 2 * n * dim
    assert memory[8] < memory[1] / 8 + 4 * gathered


def test_ifm_needs_no_second_matrix_in_the_batch():
    n, dim = 256, 32
    programs = [_on_devices(1, n, dim, jnp.float32, kind=kind)[0] for kind in ("infonce", "ifm")]
    plain, ifm = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert plain >= 4 * (2 * n) ** 2
    assert abs(ifm - plain) < 4 * (2 * n) ** 2 / 8
    whole = [len(re.findall(rf"= \w+\[{n},2,{n},2\]", program.as_text())) for program in programs]
    assert 0 < whole[1] <= whole[0]


def test_mistakes_in_the_batch_are_named():
    views = jnp.ones((4, 2, 3))
    for shape in ((4, 3), (4, 3, 3), (1, 2, 3)):
        with pytest.raises(ValueError, match=re.escape(f"views {shape} must be (N, 2, dim)")):
            losses.contrast_in_batch(jnp.ones(shape), 0.2)
    with pytest.raises(ValueError, match=r"first \(4, 3\) and second \(3, 3\)"):
        losses.nt_xent(views[:, 0], views[:3, 1], 0.2)
    with pytest.raises(ValueError, match="beta is -1"):
        losses.nt_xent(views[:, 0], views[:, 1], 0.2, beta=-1)
    for tau_plus in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"tau_plus is {tau_plus}: expected a share in"):
            losses.nt_xent(views[:, 0], views[:, 1], 0.2, tau_plus=tau_plus)


# --- The objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", method.OBJECTIVES)
def test_objective_is_what_its_name_says(kind):
    arrays = embeddings(8)
    objective = method.Objective(kind, temperature=0.1, epsilon=(0.1, 0.3), alpha=0.7, beta=0.5, tau_plus=0.05)

    @jax.jit
    def of(*arrays):
        return objective(losses.contrast(*arrays, objective.temperature, objective.beta))

    loss, metrics = of(*arrays)
    clean = jnp.mean(losses.info_nce(*arrays, 0.1, 0.5, 0.05))
    both = jnp.mean(losses.ifm_info_nce(*arrays, 0.1, (0.1, 0.3), 0.7, 0.5, 0.05))
    shifted = (both * 1.7 - clean) / 0.7
    assert metrics.keys() == {"loss", "loss_clean", "loss_ifm", "acc1", "acc5"}
    assert loss == metrics["loss"]
    expected = {"infonce": clean, "ifm": both, "ifm_only": shifted}[kind]
    np.testing.assert_allclose(
        [loss, metrics["loss_clean"], metrics["loss_ifm"]], [expected, clean, shifted], rtol=1e-5
    )
    with pytest.raises(ValueError, match="unknown objective 'moco': expected one of infonce, ifm, ifm_only"):
        method.Objective("moco")


@pytest.mark.slow
def test_examples_run():
    assert doctest.testmod(losses) == (0, 15)
