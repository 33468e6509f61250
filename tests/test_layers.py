"""Layers whose gradients are summed over the devices in the parameters' dtype: the same function, more precise sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import collectives
from ifm_jax import sharding
from ifm_jax.models import heads, layers

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


def gradients(dtype, summed, *, devices=DEVICES, param_dtype=jnp.float32):
    """The loss, the gradient of every parameter by name, and what the devices exchange."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    graphdef, params = nnx.split(Net(dtype, jnp.float32, mesh if summed else None))
    params = jax.tree.map(lambda p: p.astype(param_dtype), params)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(N, 6, 6, 3)), dtype)
    weights = jnp.asarray(random.normal(size=(N, 5)), param_dtype)

    def loss(params, x, weights):
        return jnp.mean(nnx.merge(graphdef, params)(x).astype(param_dtype) * weights)

    split, whole = sharding.split(mesh), sharding.replicated(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split, split), out_shardings=whole)
    compiled = step.lower(params, x, weights).compile()
    value, found = compiled(params, x, weights)
    names = {
        jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree.leaves_with_path(nnx.to_pure_dict(found))
    }
    return float(value), names, collectives.read(compiled.as_text(), devices)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_same_function_in_float64():
    value, expected, _ = gradients(jnp.float64, False, param_dtype=jnp.float64)
    again, found, _ = gradients(jnp.float64, True, param_dtype=jnp.float64)
    assert again == pytest.approx(value, rel=1e-13)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-13 * np.abs(expected[name]).max())


@pytest.mark.slow
def test_sums_of_bfloat16_gradients_are_not_rounded():
    """Nor exchanged one by one. A CPU's compiler makes every exchange one of float32; the compiler's sum is rounded."""
    value, compilers, _ = gradients(jnp.bfloat16, False)
    again, found, exchanged = gradients(jnp.bfloat16, True)
    assert again == pytest.approx(value, rel=1e-3)
    assert [(one.kind, one.dtype, one.count) for one in exchanged] == [("all-reduce", "f32", 1)]
    for name, gradient in found.items():
        rounded = [np.asarray(jnp.asarray(each, jnp.bfloat16), np.float32) for each in (compilers[name], gradient)]
        np.testing.assert_array_equal(rounded[0], compilers[name])
        assert (rounded[1] != gradient).any()
        # Equal but for the rounding of each device's part and of the compiler's sum.
        scale = np.abs(compilers[name]).max()
        np.testing.assert_allclose(gradient, compilers[name], rtol=0, atol=2**-6 * scale)
