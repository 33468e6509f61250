"""Optimisers and schedules against torch.optim's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ifm_jax import optim


def trajectory(optimizer, params, gradients, rates):
    opt_state = optimizer.init(params)
    for gradient, lr in zip(gradients, rates, strict=True):
        updates, opt_state = optimizer.update(gradient, opt_state, params, learning_rate=jnp.asarray(lr))
        params = optax.apply_updates(params, updates)
    return params


def torch_trajectory(make, params, gradients, rates):
    tensors = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in params.items()}
    optimizer = make(list(tensors.values()))
    for gradient, lr in zip(gradients, rates, strict=True):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(np.asarray(gradient[name]))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return {name: t.detach().numpy() for name, t in tensors.items()}


def problem():
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(3, 4))), "bias": jnp.asarray(random.normal(size=4))}
    gradients = [{n: jnp.asarray(random.normal(size=p.shape)) for n, p in params.items()} for _ in range(6)]
    return params, gradients, [0.3, 0.3, 0.1, 0.1, 0.03, 0.03]


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_sgd_is_torch_s():
    params, gradients, rates = problem()
    ours = trajectory(optim.make("sgd", 0.9, 0.05), params, gradients, rates)
    theirs = torch_trajectory(
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.05), params, gradients, rates
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_adamw_is_torch_s():
    params, gradients, rates = problem()
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction is decay ** count
        ours = trajectory(optim.make("adamw", 0.9, 0.05), params, gradients, rates)
    theirs = torch_trajectory(lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.05), params, gradients, rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_adam_is_torch_s():
    params, gradients, rates = problem()
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction is decay ** count
        ours = trajectory(optim.make("adam", 0.9, 0.05), params, gradients, rates)
    theirs = torch_trajectory(lambda p: torch.optim.Adam(p, lr=1.0, weight_decay=0.05), params, gradients, rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.usefixtures("x64")
def test_lars_scales_matrices_only():
    params, gradients, _ = problem()
    direction, _ = (tx := optim.lars(0.9, 0.1)).update(gradients[0], tx.init(params), params)
    np.testing.assert_allclose(direction["bias"], gradients[0]["bias"], rtol=1e-12)
    decayed = gradients[0]["kernel"] + 0.1 * params["kernel"]
    ratio = 1e-3 * jnp.linalg.norm(params["kernel"]) / jnp.linalg.norm(decayed)
    np.testing.assert_allclose(direction["kernel"], ratio * decayed, rtol=1e-10)


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_lars_is_that_of_mocos_third_version():
    """Six steps against its update, written out in PyTorch; a parameter that starts at zero has no trust ratio yet."""
    params, gradients, rates = problem()
    params["zero"] = jnp.zeros((2, 3))
    for gradient in gradients:
        gradient["zero"] = jnp.ones((2, 3))
    ours = trajectory(optim.make("lars", 0.9, 0.05), params, gradients, rates)
    for name, start in params.items():
        parameter, buffer = torch.tensor(np.asarray(start)), torch.zeros(start.shape, dtype=torch.float64)
        for gradients_of_step, lr in zip(gradients, rates, strict=True):
            update = torch.tensor(np.asarray(gradients_of_step[name]))
            if parameter.ndim > 1:
                update = update + 0.05 * parameter
                norm = parameter.norm()
                update = update * (1e-3 * norm / update.norm() if norm > 0 else 1.0)
            buffer = 0.9 * buffer + update
            parameter = parameter - lr * buffer
        np.testing.assert_allclose(ours[name], parameter.numpy(), rtol=1e-10)


def test_cosine_once_an_epoch_is_the_original_s():
    rates = optim.learning_rates(0.03, schedule="cosine", epochs=5, steps_per_epoch=3)
    expected = [0.5 * 0.03 * (1 + np.cos(np.pi * e / 5)) for e in range(5) for _ in range(3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-15)
    assert rates.dtype == np.float64


@pytest.mark.torch
def test_cosine_is_torch_s_scheduler():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    theirs = []
    for _ in range(8):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(
        optim.learning_rates(0.03, schedule="cosine", epochs=8, steps_per_epoch=1), theirs, rtol=1e-12
    )


def test_milestones_divide_by_ten():
    rates = optim.learning_rates(1.0, schedule="step", epochs=6, steps_per_epoch=2, milestones=(2, 4))
    np.testing.assert_allclose(rates, [1] * 4 + [0.1] * 4 + [0.01] * 4)
    np.testing.assert_allclose(optim.learning_rates(1.0, schedule="step", epochs=2, steps_per_epoch=1), [1, 1])


def test_warmup_rises_step_by_step_and_the_cosine_spans_the_rest():
    rates = optim.learning_rates(1.0, schedule="cosine", epochs=6, steps_per_epoch=4, warmup_epochs=2, per_step=True)
    np.testing.assert_allclose(rates[:8], np.arange(1, 9) / 8)
    assert rates[8] == 1.0
    assert rates[16] == pytest.approx(0.5)
    assert (np.diff(rates[8:]) < 0).all()


def test_linear_scaling():
    assert optim.scaled_learning_rate(0.03, 4096) == pytest.approx(0.48)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'rmsprop'"):
        optim.make("rmsprop", 0.9, 0.0)
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        optim.learning_rates(1.0, schedule="linear", epochs=1, steps_per_epoch=1)
