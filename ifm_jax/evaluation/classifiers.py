"""Linear classifiers on frozen features, several trained at once: a sweep at nearly the price of one.

The linear probe of He et al. (2020) and Robinson et al. (2021): weights N(0, 0.01), zero bias, SGD with momentum, the
learning rate times 0.1 at epochs 30, 40 and 50 of 60. The H heads of a sweep differ in learning rate and weight decay
only and read the same features, so that the backbone, which costs most, runs once for all of them. What a head does is
the same (on a CPU bit for bit) whichever other heads are trained beside it.
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
    """The whole state of a sweep, to be kept in a checkpoint as it is.

    Attributes:
      step: int32 scalar, updates done.
      params: `weight` `(H, C, D)` and `bias` `(H, C)`; head h is PyTorch's `fc.weight` and `fc.bias`.
      opt_state: state of `optim.sgd`, one for each head: the momentum buffers, of the shapes of `params`.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: optax.OptState


def create(
    rng: jax.Array, num_heads: int, num_features: int, num_classes: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> HeadsState:
    """Returns fresh heads, all of them the same: what a separate run with this `rng` would start from.

    Args:
      rng: a JAX random key.
      num_heads: H.
      num_features: D.
      num_classes: C.
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
    """Trains every head on one batch: mean cross entropy, then torch.optim.SGD's update with the head's own rates.

    A pure function for the caller to compile, together with the backbone or alone. With features, labels and mask split
    over a mesh and the state on every device, each device's share of the gradient is summed. No gradient flows into the
    features.

    Args:
      state: before the step.
      features: `(N, D)`, any float type; computed with in the heads' own.
      labels: int `(N,)` in [0, C).
      lr: `(H,)`, of this step.
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

    # One after another, not vmap: with one product for all heads the sums over D run in another order than for a single
    # head, and learning rates of 10 and 30 blow that rounding up. Each head has enough work to fill the device.
    params, opt_state, metrics = jax.lax.map(update_one, (state.params, state.opt_state, lr, weight_decay))
    return HeadsState(state.step + 1, params, opt_state), metrics


def evaluate(
    params: dict[str, jax.Array], features: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Counts what every head gets right in one batch; counts of batches are to be added up.

    Among equal logits the lower class comes first, and a logit that is not a number behind every number, so that a head
    that diverged is wrong (where there are more than 1 or 5 classes: the best 5 of 5 always hold the label).

    Args:
      params: as in `HeadsState`.
      features: `(N, D)`.
      labels: int `(N,)` in [0, C).
      mask: bool `(N,)`, False for what only fills the batch up; None: all count.

    Returns:
      `top1` and `top5`, int32 `(H,)`, how many labels are among the 1 and the min(5, C) highest logits; `loss`, `(H,)`,
      the sum of the cross entropies; `count`, int32 scalar, the examples that counted.
    """
    dtype = params["weight"].dtype
    features = features.astype(dtype)
    counts = jnp.ones(labels.shape, bool) if mask is None else mask

    def evaluate_one(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = _logits(params, features)
        rank = _rank(logits, labels)
        # Not a product: what fills the batch up may be anything, and 0 times infinity is no number.
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
    """Returns how many classes come before the label, int32 `(N,)`; ties as `evaluate` says."""
    own = _own(logits, labels)
    later = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None] > labels[:, None]
    # Those behind are counted, not those ahead: no comparison with NaN holds.
    behind = (logits < own) | ((logits == own) & later)
    return logits.shape[-1] - 1 - jnp.sum(behind, axis=-1, dtype=jnp.int32)
