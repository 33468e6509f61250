"""Batched linear heads against PyTorch's classifier and optimizer, against separate runs, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ifm_jax import sharding
from ifm_jax.evaluation import classifiers

N, D, C, STEPS = 16, 512, 7, 20
RATES, DECAYS = (0.1, 10.0, 30.0), (0.0, 0.0, 1e-3)
# Four epochs of five steps, divided by ten at the last three.
SCHEDULE = {"epochs": 4, "steps_per_epoch": 5, "milestones": (1, 2, 3)}


def batches(dtype=np.float64):
    """What a backbone gives: pooled after a ReLU, not negative, below one; classes that can be told apart."""
    random = np.random.default_rng(0)
    centers = random.uniform(0, 0.6, (C, D))
    labels = random.integers(0, C, (STEPS, N))
    return np.maximum(centers[labels] + 0.2 * random.normal(size=(STEPS, N, D)), 0).astype(dtype), labels.astype(
        "int32"
    )


def sweep(rates, decays, dtype=np.float64, mesh=None):
    """Returns the params after 20 steps and the losses `(20, H)`."""
    state = classifiers.create(jax.random.key(0), len(rates), D, C, dtype)
    update = jax.jit(classifiers.update)
    if mesh is not None:
        one, split = sharding.replicated(mesh), sharding.split(mesh)
        update = jax.jit(classifiers.update, in_shardings=(one, split, split, one, one), out_shardings=one)
    losses = []
    decays = jnp.asarray(decays, dtype)
    for features, labels, lr in zip(*batches(dtype), classifiers.learning_rates(rates, **SCHEDULE), strict=True):
        state, metrics = update(state, features, labels, jnp.asarray(lr, dtype), decays)
        losses.append(metrics["loss"])
    assert int(state.step) == STEPS
    return jax.device_get(state.params), np.stack(jax.device_get(losses))


def torch_run(params, lr, decay, momentum=0.9):
    """The original's loop for one head: its classifier, loss, optimizer and `adjust_learning_rate`."""
    fc = torch.nn.Linear(D, C, dtype=torch.float64)
    with torch.no_grad():
        fc.weight.copy_(torch.tensor(np.asarray(params["weight"][0])))
        fc.bias.copy_(torch.tensor(np.asarray(params["bias"][0])))
    optimizer = torch.optim.SGD(fc.parameters(), lr, momentum=momentum, weight_decay=decay)
    losses = []
    for step, (features, labels) in enumerate(zip(*batches(), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.1 ** sum(step // SCHEDULE["steps_per_epoch"] >= m for m in SCHEDULE["milestones"])
        loss = torch.nn.functional.cross_entropy(fc(torch.tensor(features)), torch.tensor(labels, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return fc.weight.detach().numpy(), fc.bias.detach().numpy(), losses


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_twenty_steps_are_torch_s():
    params, losses = sweep(RATES, DECAYS)
    start = classifiers.create(jax.random.key(0), 1, D, C, np.float64).params
    assert np.ptp(losses[:, 2]) > 10  # the large rate does overshoot
    for h, (lr, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        weight, bias, expected = torch_run(start, lr, decay)
        np.testing.assert_allclose(losses[:, h], expected, rtol=1e-9)
        np.testing.assert_allclose(params["weight"][h], weight, rtol=1e-9)
        np.testing.assert_allclose(params["bias"][h], bias, rtol=1e-9)


def assert_close(a, b, tolerance):
    """Relative to the largest entry of the array."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_a_sweep_is_its_separate_runs(dtype, tolerance):
    params, losses = sweep(RATES, DECAYS, dtype)
    for h, (lr, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        alone, alone_losses = sweep([lr], [decay], dtype)
        assert_close(losses[:, h], alone_losses[:, 0], tolerance)
        assert_close(params["weight"][h], alone["weight"][0], tolerance)
        assert_close(params["bias"][h], alone["bias"][0], tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices_do_not_matter(devices):
    expected, expected_losses = sweep(RATES, DECAYS)
    params, losses = sweep(RATES, DECAYS, mesh=sharding.make_mesh(jax.devices()[:devices]))
    assert_close(losses, expected_losses, 1e-11)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-11), params, expected)


@pytest.mark.usefixtures("x64")
def test_a_mask_is_the_subset():
    features, labels = (x[0] for x in batches())
    state = classifiers.create(jax.random.key(0), 2, D, C, np.float64)
    rates, decays = jnp.asarray([0.1, 10.0]), jnp.zeros(2)
    keep = np.arange(N) < 11
    update = jax.jit(classifiers.update)
    masked, metrics = update(state, features, labels, rates, decays, mask=keep)
    subset, expected = update(state, features[keep], labels[keep], rates, decays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), masked, subset)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), metrics, expected)


def test_fresh_heads_are_alike_and_as_the_original_s():
    state = classifiers.create(jax.random.key(0), 3, 200, 50)
    weight = np.asarray(state.params["weight"])
    assert weight.shape == (3, 50, 200)
    np.testing.assert_array_equal(weight[1:], weight[[0, 0]])
    np.testing.assert_array_equal(weight[0], classifiers.create(jax.random.key(0), 1, 200, 50).params["weight"][0])
    assert weight[0].std() == pytest.approx(0.01, rel=0.05)
    assert abs(weight[0].mean()) < 5e-4
    assert not np.any(state.params["bias"])


def test_schedule_of_the_linear_probe():
    rates = classifiers.learning_rates([10.0, 30.0], epochs=60, steps_per_epoch=2)
    assert rates.shape == (120, 2)
    np.testing.assert_allclose(rates[[0, 59, 60, 79, 80, 99, 100, 119], 1], [30, 30, 3, 3, 0.3, 0.3, 0.03, 0.03])
    np.testing.assert_allclose(rates[:, 0], rates[:, 1] / 3)


@pytest.mark.torch
@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_counts_are_torch_s_and_add_up(classes, devices):
    random = np.random.default_rng(1)
    features, labels = random.normal(size=(40, D)).astype(np.float32), random.integers(0, classes, 40, np.int32)
    params = {
        "weight": random.normal(size=(2, classes, D)).astype(np.float32),
        "bias": random.normal(size=(2, classes)).astype(np.float32),
    }
    mesh = sharding.make_mesh(jax.devices()[:devices])
    one, split = sharding.replicated(mesh), sharding.split(mesh)
    evaluate = jax.jit(classifiers.evaluate, in_shardings=(one, split, split, split), out_shardings=one)
    total = None
    for begin in (0, 16, 32):  # the last batch is half full
        index = np.arange(begin, begin + 16)
        filled = np.minimum(index, 39)
        counts = evaluate(params, features[filled], labels[filled], index < 40)
        total = counts if total is None else jax.tree.map(jnp.add, total, counts)
    assert int(total["count"]) == 40
    for h in range(2):
        predicted = torch.tensor(features @ params["weight"][h].T + params["bias"][h])
        loss = torch.nn.functional.cross_entropy(predicted, torch.tensor(labels).long(), reduction="sum")
        assert float(total["loss"][h]) == pytest.approx(loss.item(), rel=1e-5)
        for top in (1, 5):
            _, best = predicted.topk(min(top, classes), dim=1)
            assert int(total[f"top{top}"][h]) == int((best == torch.tensor(labels)[:, None]).sum())


def test_ties_go_to_the_lower_class_and_what_is_no_number_is_wrong():
    params = {"weight": jnp.zeros((2, 7, D)), "bias": jnp.stack([jnp.zeros(7), jnp.full(7, jnp.nan)])}
    labels = jnp.arange(7)
    evaluate = jax.jit(classifiers.evaluate)
    counts = evaluate(params, jnp.ones((7, D)), labels)
    np.testing.assert_array_equal(counts["top1"], [1, 0])  # class 0 alone
    np.testing.assert_array_equal(counts["top5"], [5, 0])
    filled = evaluate(params, jnp.full((7, D), jnp.inf), labels, jnp.zeros(7, bool))
    jax.tree.map(lambda count: np.testing.assert_array_equal(count, np.zeros_like(count)), filled)
