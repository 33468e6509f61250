"""The training step: the same on any number of devices, and in the original's order."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ifm_jax import models, optim, pretrain, sharding
from ifm_jax.augment import TrifeatureAugmentation, example_rngs
from ifm_jax.methods import MoCo, Objective, SimCLR, losses
from ifm_jax.models import resnet
from tests import small

N, K, SIZE, STEPS = 16, 48, 16, 6
PLAIN, HARD = Objective(), Objective(beta=0.5, tau_plus=0.05)


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Architectures of the same class that compile in seconds."""
    resnet.ARCHITECTURES["tiny"] = resnet.Architecture(False, (1,), width=4)
    resnet.ARCHITECTURES["small"] = resnet.Architecture(False, (1, 1), width=4)
    yield
    del resnet.ARCHITECTURES["tiny"], resnet.ARCHITECTURES["small"]


def make(
    devices=1,
    *,
    method="moco",
    dtype="float64",
    groups=8,
    shuffle=True,
    mesh=True,
    queue_sharded=False,
    size=K,
    objective=PLAIN,
    whole=False,
    reduce=False,
):
    """Returns a step.

    With `whole`, it has a network of two stages and the augmentation of Trifeature; with `reduce`, layers whose
    gradients are summed over the devices in the parameters' dtype.
    """
    mesh = sharding.make_mesh(jax.devices()[:devices]) if mesh else None
    encoder = models.Encoder(
        "small" if whole else "tiny",
        dim=8,
        stem="small_stride2",
        bn_groups=groups,
        compute_dtype=dtype,
        param_dtype=dtype,
        reduce_over=mesh if reduce else None,
    )
    if method == "moco":
        method = MoCo(encoder, objective, size, momentum=0.9, shuffle=shuffle, queue_sharded=queue_sharded, mesh=mesh)
    else:
        method = SimCLR(encoder, objective, mesh)
    augment = TrifeatureAugmentation(dtype=jnp.dtype(dtype)) if whole else small.noise
    return pretrain.PretrainStep(method, optim.make("sgd", 0.9, 1e-2), augment)


def arguments(dtype="float64"):
    """The random key and the learning rates of a step."""
    return jax.random.key(7), jnp.linspace(0.1, 0.05, STEPS, dtype=dtype)


def shapes_of(step):
    """A state, a key and learning rates, as shapes."""
    return jax.eval_shape(lambda: fresh_state(step)), jax.eval_shape(lambda: arguments("float32"))


def images():
    return np.random.default_rng(0).integers(0, 256, (STEPS, N, SIZE, SIZE, 3), np.uint8)


def fresh_state(step):
    return pretrain.create(jax.random.key(1), step.method, step.optimizer)


def run(step, steps=STEPS):
    """Trains; returns the metrics of every step as arrays, and the last state."""
    mesh = step.method.mesh
    current = jax.device_put(fresh_state(step), pretrain.placements(mesh, step.method))
    rng, rates = arguments(step.method.encoder.param_dtype)
    rng_and_rates = sharding.place_key(mesh, rng), jax.device_put(rates, sharding.replicated(mesh))
    batches = images()
    history, compiled = [], None
    for i in range(steps):
        batch = sharding.put_batch(mesh, {"views": batches[i][:, None]})
        compiled = compiled or step.jit().lower(current, batch, *rng_and_rates).compile()
        current, metrics = compiled(current, batch, *rng_and_rates)
        history.append(jax.device_get(metrics))
    return {name: np.asarray([m[name] for m in history]) for name in history[0]}, current


@functools.cache
def on_one_device(**options):
    """The run that several tests compare with, once: metrics and last state."""
    return run(make(1, **options))


def assert_agree(many, last_many, one, last, devices):
    """Asserts that a run ends as the one on one device, but for rounding."""
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-10, err_msg=f"{name} on {devices} devices")
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(last_many), strict=True):
        scale = np.abs(np.asarray(a)).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * scale)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "groups", "shuffle"),
    [
        ("whole moco", 8, True),
        *(("moco", groups, shuffle) for groups, shuffle in itertools.product((8, 2, 1), (True, False))),
        ("moco", 4, "balanced"),
        *(("simclr", groups, True) for groups in (8, 1)),
    ],
)
def test_the_number_of_devices_changes_nothing(method, groups, shuffle):
    options = {"groups": groups, "shuffle": shuffle, "whole": method == "whole moco"}
    if method == "simclr":
        options |= {"method": method, "objective": HARD}
    one, last = on_one_device(**options)
    assert np.ptp(one["loss"]) > 0.01  # it moves, so that there is something to agree on
    for devices in (2, 4, 8):
        many, last_many = run(make(devices, **options))
        assert_agree(many, last_many, one, last, devices)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_where_gradients_are_summed_changes_nothing():
    """In the layers, also where BatchNorm's groups are spread over several devices."""
    many, last_many = run(make(8, groups=2, reduce=True))
    assert_agree(many, last_many, *on_one_device(groups=2, shuffle=True, whole=False), 8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_queue_split_over_the_devices_changes_nothing():
    """Six steps, in which a queue of three batches wraps twice."""
    one, last = on_one_device(groups=8, shuffle=True, whole=False)
    for devices in (2, 4, 8):
        many, last_many = run(make(devices, queue_sharded=True))
        assert last_many.memory.queue.addressable_shards[0].data.shape == (K // devices, 8)
        assert_agree(many, last_many, one, last, devices)


@pytest.mark.slow
def test_memory_of_a_queue_falls_with_the_devices():
    """No device holds all of it, nor in between: what a step computes takes no more than with all of it everywhere."""
    size, devices = 65536, 8
    held, computed = {}, {}
    for sharded in (False, True):
        step = make(devices, dtype="float32", queue_sharded=sharded, size=size)
        batch = {"views": jax.ShapeDtypeStruct((N, 1, SIZE, SIZE, 3), jnp.uint8)}
        shapes, others = shapes_of(step)
        memory = step.jit().lower(shapes, batch, *others).compile().memory_analysis()
        held[sharded], computed[sharded] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    whole = shapes.memory.queue.size * 4
    assert held[False] - held[True] == whole - whole // devices
    assert computed[True] < computed[False] + whole / devices


@pytest.mark.slow
def test_first_step_in_float32_on_any_number_of_devices():
    one, _ = run(make(1, dtype="float32", whole=True), steps=1)
    many, _ = run(make(8, dtype="float32", whole=True), steps=1)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_flops_and_memory_a_device_fall_with_the_devices(method):
    """Without the constraints around the shuffle, or around SimCLR's views, every device would encode all of them."""
    # A batch large enough that the encoder, not the replicated update, is what costs.
    flops, computed = {}, {}
    for devices in (1, 2, 4, 8):
        step = make(devices, method=method, dtype="float32", size=128)
        batch = {"views": jax.ShapeDtypeStruct((128, 1, 32, 32, 3), jnp.uint8)}
        shapes, others = shapes_of(step)
        program = step.jit().lower(shapes, batch, *others).compile()
        flops[devices] = program.cost_analysis()["flops"]
        computed[devices] = program.memory_analysis().temp_size_in_bytes
    for devices in (2, 4, 8):
        assert flops[devices] * devices / flops[1] == pytest.approx(1, rel=0.1), flops
        assert computed[devices] * devices / computed[1] == pytest.approx(1, abs=0.35), computed


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_order_of_a_step():
    """One step, re-derived line by line from the pieces: what is computed from what."""
    step = make(mesh=False, objective=Objective(epsilon=(0.1, 0.2), alpha=0.5))
    state, encoder = fresh_state(step), step.method.encoder
    # Query and key apart, so that it shows which is used.
    before = state.memory._replace(key_params=jax.tree.map(lambda x: x * 1.1, state.memory.key_params))
    batch, (rng, rates) = images()[0], arguments()
    new, metrics = jax.jit(step.__call__)(
        state._replace(memory=before), {"views": jnp.asarray(batch)[:, None]}, rng, rates
    )
    after = new.memory

    query_rng, key_rng, shuffle_rng = jax.random.split(jax.random.fold_in(rng, 0), 3)
    place = jnp.arange(N, dtype=jnp.int32)
    order = np.asarray(jax.random.permutation(shuffle_rng, place))
    assert (order != np.arange(N)).any()

    # The momentum update comes first, from the old query parameters.
    expected_key_params = jax.tree.map(lambda k, q: 0.9 * k + 0.1 * q, before.key_params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after.key_params, expected_key_params)

    # Keys: with the new key parameters, in shuffled order, each view with the randomness of its own place.
    @jax.jit
    def encode_keys(params, batch_stats):
        views = step.augment(example_rngs(key_rng, place), jnp.asarray(batch))
        return encoder(params, batch_stats, views[order], train=True)

    shuffled, key_stats = encode_keys(after.key_params, before.key_batch_stats)
    keys = np.empty_like(shuffled)
    keys[order] = shuffled
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), after.key_batch_stats, key_stats)

    # The loss sees the old queue; the gradient is the mean over the batch; epsilon comes before the temperature.
    @jax.jit
    @jax.value_and_grad
    def loss_fn(params):
        query_views = step.augment(example_rngs(query_rng, place), jnp.asarray(batch))
        queries, _ = encoder(params, state.batch_stats, query_views, train=True)
        return jnp.mean(losses.ifm_info_nce(queries, jnp.asarray(keys), before.queue, 0.2, (0.1, 0.2), 0.5))

    loss, gradient = loss_fn(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-10)

    # SGD's first step, weight decay on everything.
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * (g + 1e-2 * old), rtol=1e-8, atol=1e-12),
        new.params,
        state.params,
        gradient,
    )

    # The keys enter the queue last, in sample order.
    np.testing.assert_allclose(after.queue[:N], keys, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(after.queue[N:], before.queue[N:])
    assert int(after.queue_ptr) == N
    assert int(new.step) == 1
    assert metrics["lr"] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_epsilon_zero_trains_as_moco():
    """And InfoNCE reports IFM's loss beside its own, of which the joint objective is the mean."""
    moco, last = run(make(1, objective=Objective("infonce", epsilon=0.1)), steps=3)
    ifm, last_ifm = run(make(1, objective=Objective("ifm", epsilon=0.0)), steps=3)
    np.testing.assert_allclose(ifm["loss"], moco["loss"], rtol=1e-12)
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(last_ifm.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(moco["loss"], moco["loss_clean"])
    assert (moco["loss_ifm"] > moco["loss"]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_given_permutation_is_used():
    step = make(mesh=False)
    batch = {"views": jnp.asarray(images()[0])[:, None]}
    rng, rates = arguments()
    drawn = jax.random.permutation(jax.random.split(jax.random.fold_in(rng, 0), 3)[2], jnp.arange(N, dtype=jnp.int32))
    compiled = jax.jit(step.__call__)
    own = compiled(fresh_state(step), batch, rng, rates)[1]["loss"]
    given = compiled(fresh_state(step), batch | {"permutation": drawn}, rng, rates)[1]["loss"]
    other = compiled(fresh_state(step), batch | {"permutation": jnp.arange(N, dtype=jnp.int32)}, rng, rates)[1]["loss"]
    assert float(given) == pytest.approx(float(own), rel=1e-12)
    assert abs(float(other) - float(own)) > 1e-6


@pytest.mark.slow
def test_seeds_rates_and_steps_are_one_program():
    """Five random keys and three tables of rates: one compilation; a new step, and a new key, draw anew."""
    step, batch = make(dtype="float32", mesh=False), {"views": jnp.asarray(images()[0])[:, None]}
    program, seen = jax.jit(step.__call__), {}
    for seed, lr, number in itertools.product(range(5), (0.1, 0.2, 0.3), range(2)):
        start = fresh_state(step)._replace(step=jnp.asarray(number, jnp.int32))
        after, metrics = program(start, batch, jax.random.key(seed), jnp.full(STEPS, lr))
        seen[seed, lr, number] = float(metrics["loss"]), float(after.params["conv1"]["kernel"][0, 0, 0, 0])
    assert program._cache_size() == 1
    assert len({loss for loss, _ in seen.values()}) == 10
    assert len({weight for _, weight in seen.values()}) == 30


@pytest.mark.slow
def test_any_optax_transformation_is_an_optimizer():
    """Its own schedule is part of it, and it descends."""
    step = make(dtype="float32", mesh=False)
    schedule = optax.linear_schedule(0.1, 0.05, STEPS - 1)
    own = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(schedule, momentum=0.9))
    other = pretrain.PretrainStep(step.method, own, step.augment)
    batch, (rng, rates) = {"views": jnp.asarray(images()[0])[:, None]}, arguments("float32")
    ours, theirs = fresh_state(step), fresh_state(other)
    programs = jax.jit(step.__call__), jax.jit(other.__call__)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            ours, metrics = programs[0](ours, batch, rng, rates)
            theirs, without = programs[1](theirs, batch, rng)
            assert metrics.keys() - without.keys() == {"lr"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours.params, theirs.params)
