"""Max-pooling and the block's ReLU: on every platform the gradient of autodiff, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ifm_jax.models import pooling
from ifm_jax.models.activation import block_relu


def plain(x):
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3), (1, 1)])
def test_pooling_by_place_is_pooling(size, dtype):
    """Of a map with many ties: half of it is zero, as behind a ReLU, the rest are small integers."""
    random = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(random.integers(-3, 4, (4, *size, 5)), 0), dtype)
    y, back = jax.vjp(plain, x)
    gradient = jnp.asarray(random.integers(-8, 9, y.shape), dtype)  # integers: sums are exact in any order
    maxima, zeros, places = pooling._forward_by_place(x)
    np.testing.assert_array_equal(maxima, y)
    np.testing.assert_array_equal(pooling._backward_by_place(zeros, places, gradient), back(gradient)[0])
    here, of_x = jax.jit(lambda x, g: (lambda y, back: (y, back(g)[0]))(*jax.vjp(pooling.max_pool, x)))(x, gradient)
    np.testing.assert_array_equal(here, y)
    np.testing.assert_array_equal(of_x, back(gradient)[0])


def test_gradient_of_the_block_s_relu():
    """Zero where the sum is zero or less; also from the mask of the result, which GPUs use."""
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0])
    gradient = jnp.arange(1.0, 6.0)
    y, back = jax.vjp(jax.nn.relu, x)
    here, back_here = jax.vjp(block_relu, x)
    np.testing.assert_array_equal(here, y)
    np.testing.assert_array_equal(back_here(gradient)[0], back(gradient)[0])
    np.testing.assert_array_equal(jnp.where(y > 0, gradient, 0), back(gradient)[0])
