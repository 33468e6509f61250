"""Batch normalization in groups, with PyTorch's semantics.

"One BatchNorm per GPU" is part of MoCo's recipe: statistics over the whole batch would leak which key belongs to which
query. Here a number, `groups`, replaces this property of the machine: the batch is split into G contiguous groups, each
normalized with its own statistics, for any number of devices.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RunningStats = Literal["first_group", "mean"]


class BatchNorm(nnx.Module):
    """Batch normalization over `(N, ..., C)` with G groups.

    Training normalizes group g with the mean and the biased variance of its own N/G samples (all positions), computed
    in float32 or better, and moves the running averages by `(1 - momentum)`: towards the mean and the *unbiased*
    variance of group 0 (`running_stats="first_group"`: like the saved buffers of a DistributedDataParallel run of G
    processes, which broadcasts rank 0's), or towards the mean of all groups' (`"mean"`). Evaluation uses these
    averages.

    Args:
      num_features: number of channels, C.
      groups: number of groups, G; N must be a multiple of it.
      running_stats: which statistics the running averages follow.
      momentum: weight of the old running average (PyTorch's `1 - momentum`).
      epsilon: added to the variance.
      param_dtype: dtype of scale, bias and the running averages.

    Raises:
      ValueError: in training, if N is not a multiple of `groups`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 1,
        running_stats: RunningStats = "first_group",
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.groups = groups
        self.running_stats = running_stats
        self.momentum = momentum
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalizes `x`, `(N, ..., C)`; the result has its dtype. With `train`, moves the running averages."""
        dtype = np.promote_types(x.dtype, jnp.float32)
        scale, bias = self.scale[...].astype(dtype), self.bias[...].astype(dtype)
        if not train:
            multiplier = scale * jax.lax.rsqrt(self.var[...].astype(dtype) + self.epsilon)
            offset = bias - self.mean[...].astype(dtype) * multiplier
            return (x.astype(dtype) * _channels(multiplier, x.ndim) + _channels(offset, x.ndim)).astype(x.dtype)

        batch, channels = x.shape[0], x.shape[-1]
        if batch % self.groups:
            raise ValueError(
                f"a batch of {batch} cannot be split into {self.groups} equal BatchNorm groups (bn_groups)"
            )
        # With the groups on the leading axis each device reduces only over its own samples.
        grouped = x.reshape(self.groups, batch // self.groups, *x.shape[1:])
        axes = tuple(range(1, grouped.ndim - 1))
        values = grouped.astype(dtype)
        mean = jnp.mean(values, axis=axes, keepdims=True)
        centered = values - mean
        var = jnp.mean(jnp.square(centered), axis=axes, keepdims=True)
        y = centered * (jax.lax.rsqrt(var + self.epsilon) * _channels(scale, grouped.ndim))
        y = y + _channels(bias, grouped.ndim)

        count = values.size // (self.groups * channels)
        self._move_averages(mean.reshape(self.groups, channels), var.reshape(self.groups, channels), count)
        return y.astype(x.dtype).reshape(x.shape)

    def _move_averages(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running averages towards the groups' `(G, C)` statistics, each over `count` values."""
        # PyTorch divides by count - 1 here although it normalizes with the biased variance.
        unbiased = var * (count / max(count - 1, 1))
        pick = (lambda s: s[0]) if self.running_stats == "first_group" else (lambda s: jnp.mean(s, axis=0))
        for average, new in ((self.mean, pick(mean)), (self.var, pick(unbiased))):
            old = average[...]
            new = jax.lax.stop_gradient(new).astype(old.dtype)
            # Not `average[...] = `: that reads a traced value's sharding, which searches the whole trace so far.
            average.set_value(self.momentum * old + (1 - self.momentum) * new)


def _channels(vector: jax.Array, ndim: int) -> jax.Array:
    """Reshapes `(C,)` to `(1, ..., 1, C)` of rank `ndim`."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
