"""Batch normalization in groups, with PyTorch's semantics.

"One BatchNorm per GPU" is part of MoCo's recipe: statistics over the whole batch would leak which key belongs to which
query. Here a number, `groups`, replaces this property of the machine: the batch is split into G contiguous groups, each
normalized with its own statistics, for any number of devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ifm_jax import platforms
from ifm_jax.choices import RunningStats


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

    def __call__(self, x: jax.Array, *, train: bool, relu: bool = False) -> jax.Array:
        """Normalizes `x`, `(N, ..., C)`; the result has its dtype.

        Args:
          x: values.
          train: normalize with the batch's statistics and move the running averages.
          relu: return max(y, 0) of the result y; on a GPU its gradient takes less memory traffic than `nnx.relu`'s.
        """
        dtype = np.promote_types(x.dtype, jnp.float32)
        scale, bias = self.scale[...].astype(dtype), self.bias[...].astype(dtype)
        if not train:
            multiplier = scale * jax.lax.rsqrt(self.var[...].astype(dtype) + self.epsilon)
            offset = bias - self.mean[...].astype(dtype) * multiplier
            y = (x.astype(dtype) * _channels(multiplier, x.ndim) + _channels(offset, x.ndim)).astype(x.dtype)
            return jax.nn.relu(y) if relu else y

        batch, channels = x.shape[0], x.shape[-1]
        if batch % self.groups:
            raise ValueError(
                f"a batch of {batch} cannot be split into {self.groups} equal BatchNorm groups (bn_groups)"
            )
        # With the groups on the leading axis each device reduces only over its own samples.
        grouped = x.reshape(self.groups, batch // self.groups, *x.shape[1:])
        shift = jax.lax.stop_gradient(self.mean[...].astype(dtype))
        y, mean, var = _normalize(grouped, scale, bias, shift, self.epsilon, relu)
        count = x.size // (self.groups * channels)
        self._move_averages(mean.reshape(self.groups, channels), var.reshape(self.groups, channels), count)
        return y.reshape(x.shape)

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


class _Saved(NamedTuple):
    """What the gradient needs: the input, and the statistics and parameters that normalize it."""

    x: jax.Array
    mean: jax.Array
    inverse: jax.Array  # 1 / standard deviation
    scale: jax.Array
    bias: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes every group of `(G, N/G, ..., C)` with its own statistics.

    The gradient is written by hand because a training step on an accelerator waits for memory here: autodiff does not
    know that the centered values sum to zero and reduces once more, and it keeps them in float32. What is kept is `x`
    as it is, in bfloat16 for example, and the statistics. (docs/benchmarks.md has the bytes before and after.)

    Args:
      x: values; statistics are computed in float32 or better.
      scale: `(C,)`, in the dtype of the statistics, like `bias` and `shift`.
      bias: `(C,)`.
      shift: `(C,)`, an estimate of the mean, which changes rounding only.
      epsilon: added to the variance.
      relu: whether the result y is max(y, 0).

    Returns:
      The result, shape and dtype of `x`; the groups' means and biased variances, `(G, 1, ..., 1, C)`, through which no
      gradient flows.
    """
    return _normalize_forward(x, scale, bias, shift, epsilon, relu)[0]


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, relu: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Saved]:
    mean, var = _statistics(x, shift)
    saved = _Saved(x, mean, jax.lax.rsqrt(var + epsilon), scale, bias)
    y = _normalized(saved)
    return (jax.nn.relu(y) if relu else y, mean, var), saved


def _normalized(saved: _Saved) -> jax.Array:
    """Returns the result without a ReLU, shape and dtype of `x`."""
    x, mean, inverse, scale, bias = saved
    y = (x.astype(mean.dtype) - mean) * (inverse * _channels(scale, x.ndim)) + _channels(bias, x.ndim)
    return y.astype(x.dtype)


def _normalize_backward(
    epsilon: float, relu: bool, saved: _Saved, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    def values(saved: _Saved, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the gradient before the ReLU and the normalized input, float32 or better."""
        if relu:
            gradient = jnp.where(_normalized(saved) > 0, gradient, jnp.zeros_like(gradient))
        return gradient.astype(saved.mean.dtype), (saved.x.astype(saved.mean.dtype) - saved.mean) * saved.inverse

    x, _, inverse, scale, _ = saved
    axes = _positions(x)
    gradient, normalized = values(saved, gradients[0])
    of_bias = jnp.sum(gradient, axes, keepdims=True)
    of_scale = jnp.sum(gradient * normalized, axes, keepdims=True)
    if relu:
        # Behind a barrier the second pass computes the mask anew; without, the first one writes the masked gradient.
        again = platforms.select(
            x, gradients[0], gpu=lambda *arrays: jax.lax.optimization_barrier(arrays), default=lambda *arrays: arrays
        )
        gradient, normalized = values(saved._replace(x=again[0]), again[1])
    count = x.size // (x.shape[0] * x.shape[-1])
    of_x = (gradient - (of_bias + normalized * of_scale) / count) * (inverse * _channels(scale, x.ndim))
    if x.shape[0] > 1:
        # Otherwise the compiler makes one sum of the sums over groups and within groups, and reads everything again.
        of_scale, of_bias = jax.lax.optimization_barrier((of_scale, of_bias))
    return of_x.astype(x.dtype), _over_groups(of_scale), _over_groups(of_bias), None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _statistics(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of each group of `(G, N/G, ..., C)`, each `(G, 1, ..., 1, C)`.

    For bfloat16 both sums come from one pass over `x`, which can ride in the convolution before it. The error of the
    difference of the two sums is far below that of rounding `x` to bfloat16, the more so with `x` shifted by about
    its mean. For wider types it would not be (6.7e-5 in float32 where the mean is 30 standard deviations): two passes.
    """
    dtype, axes = np.promote_types(x.dtype, jnp.float32), _positions(x)
    values = x.astype(dtype)
    if x.dtype != jnp.bfloat16:
        mean = jnp.mean(values, axes, keepdims=True)
        return mean, jnp.mean(jnp.square(values - mean), axes, keepdims=True)
    values = values - _channels(shift, x.ndim)
    mean = jnp.mean(values, axes, keepdims=True)
    var = jnp.mean(jnp.square(values), axes, keepdims=True) - jnp.square(mean)
    return mean + _channels(shift, x.ndim), jnp.maximum(var, 0)


def _positions(x: jax.Array) -> tuple[int, ...]:
    """Returns the axes of `(G, N/G, ..., C)` over which a group's statistics are taken."""
    return tuple(range(1, x.ndim - 1))


def _over_groups(sums: jax.Array) -> jax.Array:
    """Sums `(G, 1, ..., 1, C)` to `(C,)`."""
    return jnp.sum(sums, axis=tuple(range(sums.ndim - 1)))


def _channels(vector: jax.Array, ndim: int) -> jax.Array:
    """Reshapes `(C,)` to `(1, ..., 1, C)` of rank `ndim`."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
