"""What stands on the pooled features: a linear layer, or MoCo-v2's projection head."""

import jax
import jax.numpy as jnp
from flax import nnx


def linear(
    in_features: int, out_features: int, *, dtype: jnp.dtype | None, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a linear layer that starts as PyTorch's: weight and bias uniform in +-1/sqrt(in_features)."""

    def init(rng, shape, dtype, out_sharding=None):
        del out_sharding
        bound = in_features**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return nnx.Linear(
        in_features,
        out_features,
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class MLPHead(nnx.Module):
    """MoCo-v2's projection head (Chen et al. 2020b): linear, ReLU, linear; the hidden layer as wide as its input.

    In the original's checkpoints `hidden` is `fc.0` and `output` is `fc.2`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.hidden = linear(in_features, in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.output = linear(in_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(N, in_features)` to `(N, out_features)`."""
        return self.output(nnx.relu(self.hidden(x)))
