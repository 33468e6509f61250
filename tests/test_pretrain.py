"""The training step: the same on any number of devices, and in the original's order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax import models, optim, pretrain, sharding, state
from ifm_jax.augment import TrifeatureAugmentation, example_rngs
from ifm_jax.methods import losses
from ifm_jax.models import resnet

N, K, SIZE, STEPS = 16, 48, 16, 6


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """An architecture of the same class that compiles in seconds."""
    resnet.ARCHITECTURES["tiny"] = resnet.Architecture(False, (1, 1), width=4)
    yield "tiny"
    del resnet.ARCHITECTURES["tiny"]


def make(devices=1, *, dtype="float64", groups=8, shuffle=True, mesh=True, **options):
    encoder = models.Encoder(
        "tiny", dim=8, stem="small_stride2", bn_groups=groups, compute_dtype=dtype, param_dtype=dtype
    )
    fields = {
        "encoder": encoder,
        "optimizer": optim.sgd(0.9, 1e-2),
        "learning_rates": np.linspace(0.1, 0.05, STEPS),
        "augment": TrifeatureAugmentation(dtype=jnp.dtype(dtype)),
        "rng": jax.random.key(7),
        "key_momentum": 0.9,
        "shuffle": shuffle,
        "mesh": sharding.make_mesh(jax.devices()[:devices]) if mesh else None,
    }
    return pretrain.PretrainStep(**fields | options)


def images():
    return np.random.default_rng(0).integers(0, 256, (STEPS, N, SIZE, SIZE, 3), np.uint8)


def fresh_state(step):
    return state.create(jax.random.key(1), step.encoder, step.optimizer, K)


def run(step, steps=STEPS):
    """Trains; returns the metrics of every step as arrays, and the last state."""
    current = jax.device_put(fresh_state(step), state.placements(step.mesh, step.queue_sharded))
    batches = images()
    history, compiled = [], None
    for i in range(steps):
        batch = sharding.put_batch(step.mesh, {"query": batches[i]})
        compiled = compiled or step.jit().lower(current, batch).compile()
        current, metrics = compiled(current, batch)
        history.append(jax.device_get(metrics))
    return {name: np.asarray([m[name] for m in history]) for name in history[0]}, current, compiled


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "shuffle"), list(itertools.product((8, 2, 1), (True, False))))
def test_the_number_of_devices_changes_nothing(groups, shuffle):
    one, last, _ = run(make(1, groups=groups, shuffle=shuffle))
    assert np.ptp(one["loss"]) > 0.01  # it moves, so that there is something to agree on
    for devices in (2, 4, 8):
        many, last_many, _ = run(make(devices, groups=groups, shuffle=shuffle))
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-10, err_msg=f"{name} on {devices} devices")
        for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(last_many), strict=True):
            scale = np.abs(np.asarray(a)).max()
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * scale)


@pytest.mark.usefixtures("x64")
def test_a_queue_split_over_the_devices_changes_nothing():
    """Six steps, in which a queue of three batches wraps twice."""
    one, last, _ = run(make(1))
    for devices in (2, 4, 8):
        many, last_many, _ = run(make(devices, queue_sharded=True))
        assert last_many.queue.addressable_shards[0].data.shape == (K // devices, 8)
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-10, err_msg=f"{name} on {devices} devices")
        for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(last_many), strict=True):
            scale = np.abs(np.asarray(a)).max()
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * scale)


def test_memory_of_a_queue_falls_with_the_devices():
    """No device holds all of it, nor in between: what a step computes takes no more than with all of it everywhere."""
    size, devices = 65536, 8
    held, computed = {}, {}
    for sharded in (False, True):
        step = make(devices, dtype="float32", queue_sharded=sharded)
        batch = {"query": jax.ShapeDtypeStruct((N, SIZE, SIZE, 3), jnp.uint8)}
        shapes = jax.eval_shape(lambda step=step: state.create(jax.random.key(1), step.encoder, step.optimizer, size))
        memory = step.jit().lower(shapes, batch).compile().memory_analysis()
        held[sharded], computed[sharded] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    whole = shapes.queue.size * 4
    assert held[False] - held[True] == whole - whole // devices
    assert computed[True] < computed[False] + whole / devices


def test_first_step_in_float32_on_any_number_of_devices():
    one, _, _ = run(make(1, dtype="float32"), steps=1)
    many, _, _ = run(make(8, dtype="float32"), steps=1)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, err_msg=name)


def test_flops_a_device_fall_with_the_devices():
    """Without the constraints around the shuffle every device would encode the whole batch."""
    # A batch large enough that the encoder, not the replicated update, is what costs.
    flops = {}
    for devices in (1, 2, 4, 8):
        step = make(devices, dtype="float32")
        batch = {"query": jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.uint8)}
        shapes = jax.eval_shape(lambda step=step: state.create(jax.random.key(1), step.encoder, step.optimizer, 128))
        flops[devices] = step.jit().lower(shapes, batch).compile().cost_analysis()["flops"]
    for devices in (2, 4, 8):
        assert flops[devices] * devices / flops[1] == pytest.approx(1, rel=0.1), flops


@pytest.mark.usefixtures("x64")
def test_order_of_a_step():
    """One step, re-derived line by line from the pieces: what is computed from what."""
    step = make(mesh=False, method="ifm", epsilon=(0.1, 0.2), alpha=0.5)
    before = fresh_state(step)
    # Query and key apart, so that it shows which is used.
    before = before._replace(key_params=jax.tree.map(lambda x: x * 1.1, before.key_params))
    batch = images()[0]
    after, metrics = jax.jit(step.__call__)(before, {"query": jnp.asarray(batch)})

    query_rng, key_rng, shuffle_rng = jax.random.split(jax.random.fold_in(step.rng, 0), 3)
    place = jnp.arange(N, dtype=jnp.int32)
    order = np.asarray(jax.random.permutation(shuffle_rng, place))
    assert (order != np.arange(N)).any()

    # The momentum update comes first, from the old query parameters.
    expected_key_params = jax.tree.map(lambda k, q: 0.9 * k + 0.1 * q, before.key_params, before.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after.key_params, expected_key_params)

    # Keys: with the new key parameters, in shuffled order, each view with the randomness of its own place.
    key_views = step.augment(example_rngs(key_rng, place), jnp.asarray(batch))
    shuffled, key_stats = step.encoder(after.key_params, before.key_batch_stats, key_views[order], train=True)
    keys = np.empty_like(shuffled)
    keys[order] = shuffled
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), after.key_batch_stats, key_stats)

    # The loss sees the old queue; the gradient is the mean over the batch; epsilon comes before the temperature.
    query_views = step.augment(example_rngs(query_rng, place), jnp.asarray(batch))

    def loss_fn(params):
        queries, _ = step.encoder(params, before.batch_stats, query_views, train=True)
        return jnp.mean(losses.ifm_info_nce(queries, jnp.asarray(keys), before.queue, 0.2, (0.1, 0.2), 0.5))

    loss, gradient = jax.value_and_grad(loss_fn)(before.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-10)

    # SGD's first step, weight decay on everything.
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * (g + 1e-2 * old), rtol=1e-8, atol=1e-12),
        after.params,
        before.params,
        gradient,
    )

    # The keys enter the queue last, in sample order.
    np.testing.assert_allclose(after.queue[:N], keys, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(after.queue[N:], before.queue[N:])
    assert int(after.queue_ptr) == N
    assert int(after.step) == 1
    assert metrics["lr"] == pytest.approx(0.1)


@pytest.mark.usefixtures("x64")
def test_methods():
    """One compiled network, three objectives: each is what its name says of the two losses."""
    metrics = {}
    for method in pretrain.METHODS:
        step = make(mesh=False, method=method, epsilon=0.1, alpha=0.5)
        _, metrics[method] = jax.jit(step.__call__)(fresh_state(step), {"query": jnp.asarray(images()[0])})
    clean, ifm = metrics["moco"]["loss_clean"], metrics["moco"]["loss_ifm"]
    assert ifm > clean
    assert float(metrics["moco"]["loss"]) == pytest.approx(float(clean), rel=1e-12)
    assert float(metrics["ifm_only"]["loss"]) == pytest.approx(float(ifm), rel=1e-12)
    assert float(metrics["ifm"]["loss"]) == pytest.approx(float((clean + 0.5 * ifm) / 1.5), rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_epsilon_zero_trains_as_moco():
    moco, last, _ = run(make(1, method="moco"), steps=3)
    ifm, last_ifm, _ = run(make(1, method="ifm", epsilon=0.0), steps=3)
    np.testing.assert_allclose(ifm["loss"], moco["loss"], rtol=1e-12)
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(last_ifm.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_given_permutation_is_used():
    step = make(mesh=False)
    batch = {"query": jnp.asarray(images()[0])}
    drawn = jax.random.permutation(
        jax.random.split(jax.random.fold_in(step.rng, 0), 3)[2], jnp.arange(N, dtype=jnp.int32)
    )
    compiled = jax.jit(step.__call__)
    own = compiled(fresh_state(step), batch)[1]["loss"]
    given = compiled(fresh_state(step), batch | {"permutation": drawn})[1]["loss"]
    other = compiled(fresh_state(step), batch | {"permutation": jnp.arange(N, dtype=jnp.int32)})[1]["loss"]
    assert float(given) == pytest.approx(float(own), rel=1e-12)
    assert abs(float(other) - float(own)) > 1e-6


def test_a_new_step_draws_anew():
    step = make(dtype="float32")
    batch = images()[0]
    losses_seen = []
    compiled = None
    for number in range(2):
        start = jax.device_put(
            fresh_state(step)._replace(step=jnp.asarray(number, jnp.int32)), sharding.replicated(step.mesh)
        )
        placed = sharding.put_batch(step.mesh, {"query": batch})
        compiled = compiled or step.jit().lower(start, placed).compile()
        losses_seen.append(float(compiled(start, placed)[1]["loss"]))
    assert losses_seen[0] != losses_seen[1]
