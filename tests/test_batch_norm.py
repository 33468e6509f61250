"""Grouped BatchNorm against G separate BatchNorms of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ifm_jax import platforms
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


def gradients(x, groups, scale, bias, weights, dtype, shift=None):
    """Returns the gradients of a weighted sum of the result, with respect to x, scale and bias."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    module = make(groups, "first_group", scale, bias, wide)
    if shift is not None:
        module.mean[...] = jnp.asarray(shift, wide)
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    def loss(x, params):
        y = nnx.merge(graph, params, stats, copy=True)(x, train=True)
        return jnp.sum(y.astype(wide) * jnp.asarray(weights, wide))

    of_x, of_params = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x, dtype), params)
    return of_x, of_params["scale"][...], of_params["bias"][...]


def torch_gradients(x, groups, scale, bias, weights):
    """Returns the same gradients by PyTorch, in float64."""
    peer_x = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    weight, offset = (torch.tensor(v, requires_grad=True) for v in (scale, bias))
    pieces = [
        torch.nn.functional.batch_norm(piece, None, None, weight, offset, training=True)
        for piece in peer_x.permute(0, 3, 1, 2).chunk(groups)
    ]
    (torch.cat(pieces).permute(0, 2, 3, 1) * torch.tensor(weights)).sum().backward()
    return peer_x.grad.numpy(), weight.grad.numpy(), offset.grad.numpy()


@pytest.mark.torch
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-6), (64, 1e-12)])
def test_gradient_equals_torch(values, groups, bits, tolerance):
    x, scale, bias = values[0][0], *values[1:]
    weights = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(bits == 64):
        ours = gradients(x, groups, scale, bias, weights, jnp.float64 if bits == 64 else jnp.float32)
    for found, expected in zip(ours, torch_gradients(x, groups, scale, bias, weights), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.torch
@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_bfloat16_gradient_is_as_near_as_autodiff_s(values, ratio):
    """Of a mean of 1, 10, 100 standard deviations, with running averages that know the mean and that do not."""
    scale, bias = values[1:]
    random = np.random.default_rng(2)
    x = np.asarray(jnp.asarray(ratio + random.normal(size=(256, 4, 4, C)), jnp.bfloat16), np.float64)
    weights = random.normal(size=x.shape)
    weights = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float64)
    exact = torch_gradients(x, 2, scale, bias, weights)

    def autodiff(x, scale, bias):
        values = x.reshape(2, -1, *x.shape[1:]).astype(jnp.float32)
        mean = jnp.mean(values, axis=(1, 2, 3), keepdims=True)
        var = jnp.mean(jnp.square(values - mean), axis=(1, 2, 3), keepdims=True)
        y = (values - mean) * (jax.lax.rsqrt(var + 1e-5) * scale[None, None, None, None])
        y = (y + bias[None, None, None, None]).astype(x.dtype).reshape(x.shape)
        return jnp.sum(y.astype(jnp.float32) * jnp.asarray(weights, jnp.float32))

    arguments = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    before = jax.jit(jax.grad(autodiff, (0, 1, 2)))(*arguments)

    def distance(gradient, expected):
        return np.linalg.norm(np.asarray(gradient, np.float64) - expected) / np.linalg.norm(expected)

    for shift in (None, np.full(C, 0.9 * ratio)):
        ours = gradients(x, 2, scale, bias, weights, jnp.bfloat16, shift)
        of_x, *of_parameters = (distance(found, expected) for found, expected in zip(ours, exact, strict=True))
        print(f"mean/std {ratio}, shifted {shift is not None}: x {of_x:.1e}, scale, bias {of_parameters}")
        assert of_x <= 1.02 * distance(before[0], exact[0])
        # These are float32: without a shift the variance's error shows, far below the gradient of x.
        assert max(of_parameters) <= 1.7e-3


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


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 8])
def test_with_a_relu_it_is_the_two_after_each_other(values, groups, dtype, on_gpu, monkeypatch):
    """Bit for bit, gradients too; with the form of the gradient for GPUs as well, which computes the mask twice."""
    if on_gpu:
        monkeypatch.setattr(platforms, "select", lambda *operands, default, gpu: gpu(*operands))
    with jax.enable_x64(dtype == "float64"):
        x, scale, bias = (jnp.asarray(value, dtype) for value in (values[0][0], *values[1:]))
        gradient = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)
        results = []
        for fused in (False, True):

            def run(x, scale, bias, fused=fused):
                module = make(groups, "mean", scale, bias, scale.dtype)
                y = module(x, train=True, relu=fused)
                return (y if fused else nnx.relu(y)), (module.mean[...], module(x, train=False, relu=True))

            y, back, others = jax.vjp(run, x, scale, bias, has_aux=True)
            results.append((y, back(gradient), others))
    before, after = jax.tree.map(lambda array: np.asarray(array).astype("float64"), results)
    assert 0.2 < np.mean(before[0] > 0) < 0.8
    assert after[2][1].min() == 0
    jax.tree.map(np.testing.assert_array_equal, before, after)
