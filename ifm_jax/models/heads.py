"""Heads for the pooled features: a linear layer, or a projection head of two."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ifm_jax.choices import HEADS, Head
from ifm_jax.models.batch_norm import BatchNorm
from ifm_jax.models.layers import Linear


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: jnp.dtype | None,
    param_dtype: jnp.dtype,
    reduce_over: jax.sharding.Mesh | None = None,
    rngs: nnx.Rngs,
) -> Linear:
    """Returns a linear layer initialized like PyTorch's: weight and bias uniform in +-1/sqrt(in_features)."""

    def init(rng: jax.Array, shape: Sequence[int], dtype: Any, out_sharding: Any = None) -> jax.Array:
        del out_sharding
        bound = in_features**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
        param_dtype=param_dtype,
        reduce_over=reduce_over,
        rngs=rngs,
    )


class MLPHead(nnx.Module):
    """MoCo-v2's and SimCLR's projection head: linear, ReLU, linear; the hidden layer as wide as its input.

    See Chen et al. 2020a, section 2.1, and 2020b, section 3.

    In the original's checkpoints `hidden` is `fc.0` and `output` is `fc.2`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        reduce_over: jax.sharding.Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "reduce_over": reduce_over, "rngs": rngs}
        self.hidden = linear(in_features, in_features, **options)
        self.output = linear(in_features, out_features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(N, in_features)` to `(N, out_features)`."""
        return self.output(nnx.relu(self.hidden(x)))


class HCLHead(nnx.Module):
    """The projection head of "Contrastive learning with hard negative samples", as in its released code.

    Linear without bias, BatchNorm, ReLU, linear; the hidden layer has 512 outputs. In a PyTorch `Sequential` of these
    four, `hidden` is `fc.0`, `norm` is `fc.1` and `output` is `fc.3`.

    Args:
      norm: makes a `BatchNorm` for a number of features; the same as in the backbone, so that the groups are equal.
    """

    hidden_features = 512

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: Callable[[int], BatchNorm],
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        reduce_over: jax.sharding.Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "reduce_over": reduce_over, "rngs": rngs}
        self.hidden = linear(in_features, self.hidden_features, use_bias=False, **options)
        self.norm = norm(self.hidden_features)
        self.output = linear(self.hidden_features, out_features, **options)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `(N, in_features)` to `(N, out_features)`; with `train`, moves the running averages."""
        return self.output(nnx.relu(self.norm(self.hidden(x), train=train)))


def create(
    head: Head, in_features: int, out_features: int, *, norm: Callable[[int], BatchNorm], **options: Any
) -> Linear | MLPHead | HCLHead:
    """Builds a head by name.

    Args:
      head: one of `HEADS`: "linear" (MoCo v1's, and a classifier), "mlp" (MoCo-v2's and SimCLR's) or "hcl".
      in_features: number of features of the backbone.
      out_features: length of an embedding.
      norm: makes a `BatchNorm` for a number of features.
      **options: dtype, param_dtype, reduce_over and rngs of the layers.

    Raises:
      ValueError: if the name is unknown.
    """
    if head == "linear":
        return linear(in_features, out_features, **options)
    if head == "mlp":
        return MLPHead(in_features, out_features, **options)
    if head == "hcl":
        return HCLHead(in_features, out_features, norm=norm, **options)
    raise ValueError(f"unknown head {head!r}: expected one of {', '.join(HEADS)}")
