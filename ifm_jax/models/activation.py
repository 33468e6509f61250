"""The ReLU at the end of a residual block, whose gradient on a GPU reads only what is in memory anyway."""

import jax
import jax.numpy as jnp

from ifm_jax import platforms


@jax.custom_vjp
def block_relu(x: jax.Array) -> jax.Array:
    """Computes max(x, 0) of the sum of a block's two branches; its gradient is 0 where x <= 0.

    The next block needs the result in memory; nothing else needs the sum. So on a GPU the gradient takes its mask from
    the result, where autodiff would keep the sum too, or compute it again. Elsewhere that gains nothing (see
    `platforms`).

    Args:
      x: array of floats.

    Returns:
      An array, shape and dtype of `x`.
    """
    return jax.nn.relu(x)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jax.nn.relu(x)
    # Without the barrier the compiler sees that y > 0 is x > 0, and uses x.
    kept = platforms.select(x, y, gpu=lambda x, y: jax.lax.optimization_barrier(y), default=lambda x, y: x)
    return y, kept


def _backward(kept: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(kept > 0, gradient, jnp.zeros_like(gradient)),)


block_relu.defvjp(_forward, _backward)
