"""Optimizers and learning-rate schedules: SGD as in PyTorch, LARS, AdamW.

`make` returns an optax transformation whose `update` takes the `learning_rate` of the step as an argument: the schedule
is computed before the run and is not a constant of the compiled program. The functions above it turn gradients into a
*direction*. The rate is applied to it last, as in PyTorch (after the momentum buffer), so that a new rate acts at once.
"""

import math
from typing import Any

import jax
import numpy as np
import optax

from ifm_jax.choices import OPTIMIZERS, SCHEDULES, Optimizer, Schedule


def sgd(momentum: float = 0.9, weight_decay: float | jax.Array = 0.0) -> optax.GradientTransformation:
    """torch.optim.SGD: `buffer = momentum * buffer + (gradient + weight_decay * p)`; the direction is the buffer.

    No dampening, no Nesterov; weight decay acts on every parameter, BatchNorm and biases too, as in the original.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


def lars(
    momentum: float = 0.9, weight_decay: float = 1e-6, trust_coefficient: float = 1e-3
) -> optax.GradientTransformation:
    """LARS (You et al. 2017) for large batches, in the form used by MoCo-v3's pre-training.

    Weight decay and the trust ratio `trust_coefficient * |p| / |gradient|` act on matrices and kernels only, not on
    BatchNorm and biases; then momentum as in SGD.
    """

    def matrices(params: optax.Params) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.masked(optax.add_decayed_weights(weight_decay), matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), matrices),
        optax.trace(decay=momentum),
    )


def adamw(weight_decay: float = 1e-4) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019): Adam's direction plus `weight_decay * p`."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay))


def adam(weight_decay: float = 0.0) -> optax.GradientTransformation:
    """torch.optim.Adam: `weight_decay * p` is added to the gradient (L2), before the moments see it."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.scale_by_adam())


def make(name: Optimizer, momentum: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """Returns the named optimizer; its `update` takes `learning_rate`, a scalar.

    Args:
      name: one of `OPTIMIZERS`.
      momentum: momentum of SGD and LARS; Adam and AdamW keep their own (0.9, 0.999).
      weight_decay: weight decay, as the named optimizer defines it.

    Raises:
      ValueError: if the name is unknown.
    """
    if name == "sgd":
        return descending(sgd(momentum, weight_decay))
    if name == "lars":
        return descending(lars(momentum, weight_decay))
    if name == "adamw":
        return descending(adamw(weight_decay))
    if name == "adam":
        return descending(adam(weight_decay))
    raise ValueError(f"unknown optimizer {name!r}: expected one of {', '.join(OPTIMIZERS)}")


def descending(direction: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that updates by `-learning_rate * direction`, each parameter in its own dtype.

    This does not use `optax.chain(direction, ...)`, whose state would have one more part than checkpoints hold.
    """

    def update(
        gradient: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.Array,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        steps, state = direction.update(gradient, state, params)
        return jax.tree.map(lambda d, p: -learning_rate.astype(p.dtype) * d.astype(p.dtype), steps, params), state

    # optax has no type for a required extra argument.
    return optax.GradientTransformationExtraArgs(direction.init, update)  # pyrefly: ignore[bad-argument-type]


def learning_rates(
    lr: float,
    *,
    schedule: Schedule,
    epochs: int,
    steps_per_epoch: int,
    milestones: tuple[int, ...] = (),
    warmup_epochs: float = 0.0,
    per_step: bool = False,
) -> np.ndarray:
    """Returns the learning rate of every step, float64 `(epochs * steps_per_epoch,)`.

    The original sets it once per epoch e = 0, 1, ...: cosine `lr / 2 * (1 + cos(pi e / epochs))`, or `lr` times 0.1 for
    every milestone reached. The rates are computed in double precision before the run, as in PyTorch, so that the step
    only looks them up.

    Args:
      lr: the base learning rate.
      schedule: "cosine" or "step".
      epochs: length of the run, E.
      steps_per_epoch: updates in an epoch.
      milestones: epochs at which "step" divides by ten.
      warmup_epochs: number of first epochs in which the rate rises linearly to `lr`, step by step; the cosine spans the
        rest.
      per_step: update the schedule every step instead of once per epoch.
    """
    step = np.arange(epochs * steps_per_epoch, dtype=np.float64)
    epoch = step / steps_per_epoch
    progress = epoch if per_step else np.floor(epoch)
    if schedule == "cosine":
        span = max(epochs - warmup_epochs, 1e-9)
        decay = 0.5 * (1.0 + np.cos(math.pi * np.clip(progress - warmup_epochs, 0, None) / span))
    elif schedule == "step":
        decay = np.prod([np.where(progress >= m, 0.1, 1.0) for m in milestones], axis=0) * np.ones_like(step)
    else:
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    rates = lr * decay
    warmup_steps = warmup_epochs * steps_per_epoch
    return np.where(step < warmup_steps, lr * (step + 1) / max(warmup_steps, 1), rates)


def scaled_learning_rate(lr: float, batch_size: int, reference_batch_size: int = 256) -> float:
    """Returns `lr * batch_size / reference_batch_size`, the linear scaling rule (Goyal et al. 2017)."""
    return lr * batch_size / reference_batch_size


def descend(params: optax.Params, direction: optax.Updates, lr: jax.Array) -> Any:
    """Returns `params - lr * direction`, each parameter in its own dtype."""
    return jax.tree.map(lambda p, d: p - lr.astype(p.dtype) * d.astype(p.dtype), params, direction)
