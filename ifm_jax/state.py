"""Everything a training step reads and writes, and how it starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ifm_jax import sharding
from ifm_jax.methods import queue as key_queue
from ifm_jax.models import Encoder

Tree = dict[str, Any]


class TrainState(NamedTuple):
    """The whole state of a run: with the config and the data it determines everything that follows.

    Attributes:
      step: int32 scalar, updates done.
      params: of the query encoder, nested dicts under torchvision's names.
      batch_stats: running averages of the query encoder.
      key_params: of the key encoder, the momentum average of the query's.
      key_batch_stats: running averages of the key encoder; its own, not averaged by the momentum update.
      queue: `(K, dim)` keys, L2-normalised; the oldest at row `queue_ptr`.
      queue_ptr: int32 scalar.
      opt_state: of the optimiser (for SGD: the momentum buffers).
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    key_params: Tree
    key_batch_stats: Tree
    queue: jax.Array
    queue_ptr: jax.Array
    opt_state: optax.OptState


def create(rng: jax.Array, encoder: Encoder, optimizer: optax.GradientTransformation, queue_size: int) -> TrainState:
    """Returns a fresh state: the key encoder a copy of the query's, the queue random unit vectors.

    Args:
      rng: a JAX random key.
      encoder: architecture of both encoders; its `param_dtype` is the queue's too.
      optimizer: whose state is carried.
      queue_size: K.
    """
    encoder_rng, queue_rng = jax.random.split(rng)
    params, batch_stats = encoder.init(encoder_rng)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        # Copies, not the same arrays: the step gives its state's memory away.
        key_params=jax.tree.map(jnp.copy, params),
        key_batch_stats=jax.tree.map(jnp.copy, batch_stats),
        queue=key_queue.create(queue_rng, queue_size, encoder.dim, jnp.dtype(encoder.param_dtype)),
        queue_ptr=jnp.zeros((), jnp.int32),
        opt_state=optimizer.init(params),
    )


def placements(mesh: jax.sharding.Mesh, queue_sharded: bool = False) -> TrainState:
    """Returns where a state lies on the devices: a sharding for each field, standing for all arrays in it.

    Args:
      mesh: the devices.
      queue_sharded: each device holds K / devices rows of the queue; otherwise all of them, as everything else.
    """
    everywhere = TrainState(*[sharding.replicated(mesh)] * len(TrainState._fields))
    return everywhere._replace(queue=sharding.split(mesh)) if queue_sharded else everywhere
