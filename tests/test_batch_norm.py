"""Grouped BatchNorm against G separate BatchNorms of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ifm_jax.models import BatchNorm

N, H, W, C = 16, 5, 3, 6


def torch_groups(x, groups, steps, scale, bias):
    """Runs G torch BatchNorms on the G pieces of every batch; returns outputs and the G modules."""
    modules = [torch.nn.BatchNorm2d(C).double() for _ in range(groups)]
    for module in modules:
        module.weight.data = torch.tensor(scale)
        module.bias.data = torch.tensor(bias)
    outputs = []
    for step in range(steps):
        pieces = torch.tensor(x[step]).permute(0, 3, 1, 2).chunk(groups)
        outputs.append(
            torch.cat([m(p) for m, p in zip(modules, pieces, strict=True)]).permute(0, 2, 3, 1).detach().numpy()
        )
    return outputs, modules


def make(groups, running_stats, scale, bias, dtype):
    module = BatchNorm(C, groups=groups, running_stats=running_stats, param_dtype=dtype)
    module.scale[...] = jnp.asarray(scale, dtype)
    module.bias[...] = jnp.asarray(bias, dtype)
    return module


@pytest.fixture(scope="module")
def values():
    random = np.random.default_rng(0)
    x = 3 + 2 * random.normal(size=(3, N, H, W, C))
    return x, random.uniform(0.5, 2, C), random.normal(size=C)


@pytest.mark.torch
@pytest.mark.parametrize("running_stats", ["first_group", "mean"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-6), (64, 1e-12)])
def test_equals_separate_torch_modules(values, groups, running_stats, bits, tolerance):
    x, scale, bias = values
    with jax.enable_x64(bits == 64):
        dtype = jnp.float64 if bits == 64 else jnp.float32
        module = make(groups, running_stats, scale, bias, dtype)
        run = nnx.jit(lambda m, x, train: m(x, train=train), static_argnames="train")
        outputs, modules = torch_groups(x, groups, len(x), scale, bias)
        for step, expected in enumerate(outputs):
            ours = run(module, jnp.asarray(x[step], dtype), train=True)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())

        # Each group starts from the same averages, so that the mean of the modules' is the average of the means.
        kept = modules[:1] if running_stats == "first_group" else modules
        mean = torch.stack([m.running_mean for m in kept]).mean(0)
        var = torch.stack([m.running_var for m in kept]).mean(0)
        np.testing.assert_allclose(module.mean[...], mean.numpy(), rtol=tolerance)
        np.testing.assert_allclose(module.var[...], var.numpy(), rtol=tolerance)

        # Evaluation: the running averages normalize and stay.
        before = np.asarray(module.mean[...])
        peer = modules[0].eval()
        peer.running_mean, peer.running_var = mean, var
        expected = peer(torch.tensor(x[0]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
        ours = run(module, jnp.asarray(x[0], dtype), train=False)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
        np.testing.assert_array_equal(module.mean[...], before)


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_gradient_equals_torch(values):
    x, scale, bias = values
    weights = np.random.default_rng(1).normal(size=(N, H, W, C))
    module = make(4, "first_group", scale, bias, jnp.float64)
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    def loss(x):
        return jnp.sum(nnx.merge(graph, params, stats, copy=True)(x, train=True) * weights)

    ours = jax.jit(jax.grad(loss))(jnp.asarray(x[0]))
    peer_x = torch.tensor(x[0], requires_grad=True)
    peers = [torch.nn.BatchNorm2d(C).double() for _ in range(4)]
    for peer in peers:
        peer.weight.data, peer.bias.data = torch.tensor(scale), torch.tensor(bias)
    pieces = peer_x.permute(0, 3, 1, 2).chunk(4)
    outputs = torch.cat([m(p) for m, p in zip(peers, pieces, strict=True)]).permute(0, 2, 3, 1)
    (outputs * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(ours, peer_x.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_one_group_is_plain_batch_norm(values):
    x, scale, bias = values
    ours = make(1, "first_group", scale, bias, jnp.float32)(jnp.asarray(x[0], jnp.float32), train=True)
    flax_norm = nnx.BatchNorm(C, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    flax_norm.scale[...], flax_norm.bias[...] = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    np.testing.assert_allclose(ours, flax_norm(jnp.asarray(x[0], jnp.float32)), atol=2e-6)


def test_bfloat16_has_float32_statistics(values):
    x = jnp.asarray(values[0][0], jnp.bfloat16)
    module = BatchNorm(C, groups=2)
    y = module(x, train=True)
    assert y.dtype == jnp.bfloat16
    exact = BatchNorm(C, groups=2)
    exact(x.astype(jnp.float32), train=True)
    np.testing.assert_array_equal(module.mean[...], exact.mean[...])


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="a batch of 6 cannot be split into 4 equal"):
        BatchNorm(C, groups=4)(jnp.zeros((6, 2, 2, C)), train=True)
