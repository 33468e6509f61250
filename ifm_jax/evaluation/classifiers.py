"""Linear classifiers on frozen features, several trained at once: a sweep at nearly the price of one.

The linear probe of He et al. (2020) and Robinson et al. (2021): weights N(0, 0.01), zero bias, SGD with momentum, the
learning rate times 0.1 at epochs 30, 40 and 50 of 60. The H heads of a sweep differ only in learning rate and weight
decay and read the same features, so the backbone, which costs most, runs once for all of them. The other heads of a
sweep do not change a head's results (on a CPU bit for bit).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ifm_jax import optim

MILESTONES = (30, 40, 50)


class HeadsState(NamedTuple):
    """The whole state of a sweep, which is saved unchanged in a checkpoint.

    Attributes:
      step: int32 scalar, updates done.
      params: `weight` `(H, C, D)` and `bias` `(H, C)`; head h is PyTorch's `fc.weight` and `fc.bias`.
      opt_state: state of `optim.sgd` for each head: momentum buffers with the shapes of `params`.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: optax.OptState


def create(
    rng: jax.Array, num_heads: int, num_features: int, num_classes: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> HeadsState:
    """Returns fresh, identical heads, like those of a separate run with this `rng`.

    Args:
      rng: a JAX random key.
      num_heads: number of heads, H.
      num_features: number of features, D.
      num_classes: number of classes, C.
      dtype: dtype of weights, biases and momentum buffers.
    """
    weight = 0.01 * jax.random.normal(rng, (num_classes, num_features), dtype)
    params = {
        "weight": jnp.repeat(weight[None], num_heads, axis=0),
        "bias": jnp.zeros((num_heads, num_classes), dtype),
    }
    return HeadsState(jnp.zeros((), jnp.int32), params, jax.vmap(optim.sgd().init)(params))


def learning_rates(
    lr: Sequence[float], *, epochs: int, steps_per_epoch: int, milestones: tuple[int, ...] = MILESTONES
) -> np.ndarray:
    """Returns the learning rate of every step and head, float64 `(epochs * steps_per_epoch, H)`.

    Args:
      lr: the base learning rate of each head.
      epochs: length of the run.
      steps_per_epoch: updates in an epoch.
      milestones: epochs at which every rate is divided by ten.
    """
    factor = optim.learning_rates(
        1.0, schedule="step", epochs=epochs, steps_per_epoch=steps_per_epoch, milestones=milestones
    )
    return np.outer(factor, np.asarray(lr, np.float64))


def update(
    state: HeadsState,
    features: jax.Array,
    labels: jax.Array,
    lr: jax.Array,
    weight_decay: jax.Array,
    momentum: float = 0.9,
    mask: jax.Array | None = None,
) -> tuple[HeadsState, dict[str, jax.Array]]:
    """Trains every head on one batch: mean cross entropy, then the update of torch.optim.SGD with the head's rates.

    This is a pure function for the caller to compile, alone or together with the backbone. With features, labels and
    mask split over a mesh and the state on every device, each device's share of the gradient is summed. No gradient
    flows into the features.

    Args:
      state: state before the step.
      features: `(N, D)`, any float type; the computation uses the heads' dtype.
      labels: int `(N,)` in [0, C).
      lr: learning rates of this step, `(H,)`.
      weight_decay: `(H,)`; acts on the biases too, as in PyTorch.
      momentum: momentum of all heads.
      mask: bool or float `(N,)`, the weight of each example; None: all count alike. The loss is the weighted mean.

    Returns:
      The state after the step, and `(H,)` metrics from before it: `loss`, `acc1` and `acc5` (percent).
    """
    dtype = state.params["weight"].dtype
    features = jax.lax.stop_gradient(features).astype(dtype)
    share = jnp.ones(labels.shape, dtype) if mask is None else mask.astype(dtype)
    share = share / jnp.sum(share)

    def update_one(head: tuple[dict[str, jax.Array], optax.OptState, jax.Array, jax.Array]) -> Any:
        params, opt_state, lr, weight_decay = head

        def loss_fn(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits = _logits(params, features)
            return jnp.sum(share * _cross_entropy(logits, labels)), _rank(logits, labels)

        (loss, rank), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        optimizer = optim.sgd(momentum, weight_decay.astype(dtype))
        direction, opt_state = optimizer.update(gradient, opt_state, params)
        metrics = {"loss": loss} | {f"acc{top}": 100 * jnp.sum(share * (rank < top).astype(dtype)) for top in (1, 5)}
        return optim.descend(params, direction, lr), opt_state, metrics

    # One after another, not vmap: one product for all heads would sum over D in another order than for a single head,
    # and learning rates of 10 and 30 amplify that rounding. Each head has enough work to fill the device.
    params, opt_state, metrics = jax.lax.map(update_one, (state.params, state.opt_state, lr, weight_decay))
    return HeadsState(state.step + 1, params, opt_state), metrics


def evaluate(
    params: dict[str, jax.Array], features: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Counts the correct predictions of every head in one batch; add up the counts of all batches.

    Among equal logits the lower class comes first. NaN ranks behind every number, so that a diverged head is wrong
    (with more than 1 or 5 classes: the best 5 of 5 always include the label).

    Args:
      params: parameters as in `HeadsState`.
      features: `(N, D)`.
      labels: int `(N,)` in [0, C).
      mask: bool `(N,)`, False for padding; None: all count.

    Returns:
      `top1` and `top5`, int32 `(H,)`, the number of labels among the 1 and the min(5, C) highest logits; `loss`,
      `(H,)`, the sum of the cross entropies; `count`, int32 scalar, the number of examples counted.
    """
    dtype = params["weight"].dtype
    features = features.astype(dtype)
    counts = jnp.ones(labels.shape, bool) if mask is None else mask

    def evaluate_one(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = _logits(params, features)
        rank = _rank(logits, labels)
        # Not a product: padding may hold any values, and 0 times infinity is NaN.
        loss = jnp.where(counts, _cross_entropy(logits, labels), jnp.zeros((), dtype))
        return {f"top{top}": jnp.sum(counts & (rank < top), dtype=jnp.int32) for top in (1, 5)} | {
            "loss": jnp.sum(loss)
        }

    return jax.lax.map(evaluate_one, params) | {"count": jnp.sum(counts, dtype=jnp.int32)}


def _logits(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Returns one head's logits, `(N, C)`, at the highest matmul precision."""
    return jnp.matmul(features, params["weight"].T, precision=jax.lax.Precision.HIGHEST) + params["bias"][None]


def _own(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logit of each example's label, `(N, 1)`."""
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of every example, `(N,)`."""
    return jax.nn.logsumexp(logits, axis=-1) - _own(logits, labels)[:, 0]


def _rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many classes rank before the label, int32 `(N,)`; for ties see `evaluate`."""
    own = _own(logits, labels)
    later = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None] > labels[:, None]
    # Count the classes behind, not those ahead: every comparison with NaN is false.
    behind = (logits < own) | ((logits == own) & later)
    return logits.shape[-1] - 1 - jnp.sum(behind, axis=-1, dtype=jnp.int32)
