"""Layers whose gradients are summed over the devices in the parameters' dtype: the same function, more precise sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import collectives
from ifm_jax import assembly, sharding
from ifm_jax.models import heads, layers
from tests import small

N, DEVICES = 32, 8


class Net(nnx.Module):
    """A convolution, a grouped one and a head."""

    def __init__(self, dtype, param_dtype, reduce_over):
        options = {"dtype": dtype, "param_dtype": param_dtype, "reduce_over": reduce_over, "rngs": nnx.Rngs(0)}
        self.conv = layers.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, **options)
        self.grouped = layers.Conv(4, 8, (3, 3), feature_group_count=2, use_bias=False, **options)
        self.fc = heads.MLPHead(8, 5, **options)

    def __call__(self, x):
        return self.fc(jnp.mean(nnx.relu(self.grouped(nnx.relu(self.conv(x)))), axis=(1, 2)))


def gradients(dtype, param_dtype, summed, devices=DEVICES):
    """The gradient of every parameter, and the compiled program."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    graphdef, params = nnx.split(Net(dtype, param_dtype, mesh if summed else None))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(N, 6, 6, 3)), dtype)
    weights = jnp.asarray(random.normal(size=(N, 5)), param_dtype)

    def loss(params, x, weights):
        return jnp.mean(nnx.merge(graphdef, params)(x).astype(param_dtype) * weights)

    split, whole = sharding.split(mesh), sharding.replicated(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split, split), out_shardings=whole)
    lowered = step.lower(params, x, weights)
    found = lowered.compile()(params, x, weights)
    return found[0], jax.tree.map(np.asarray, nnx.to_pure_dict(found[1])), lowered


@pytest.mark.usefixtures("x64")
def test_equal_the_compilers_sums_in_float64():
    value, expected, _ = gradients(jnp.float64, jnp.float64, False)
    again, found, _ = gradients(jnp.float64, jnp.float64, True)
    assert float(again) == pytest.approx(float(value), rel=1e-13)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())
