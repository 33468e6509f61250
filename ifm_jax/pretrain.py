"""One step of MoCo-v2 pre-training with implicit feature modification: the method on one screen.

The order of a step is the original's (He et al. 2020, algorithm 1; Robinson et al. 2021, section 4):
momentum update, keys, loss against the old queue, gradient and update, enqueue.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ifm_jax import optim, sharding
from ifm_jax.augment import example_rngs
from ifm_jax.methods import losses, queue
from ifm_jax.models import Encoder
from ifm_jax.state import TrainState, placements

METHODS = ("moco", "ifm", "ifm_only")

# (a random key for each example (N,), images (N, H, W, 3)) -> views (N, h, w, 3), float, normalised.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainStep:
    """`(state, batch) -> (state, metrics)`, written as if for one device on the global batch.

    Attributes:
      encoder: of query and key.
      optimizer: gives a direction, to which the step applies the learning rate: what `optim.make` returns. Not an optax
        optimizer with a rate of its own, which already points downhill: with `optax.sgd(0.1)` the loss would climb.
      learning_rates: float `(steps,)`, the rate of every step.
      augment: makes a view of every image; applied to query and key images with different randomness.
      rng: a JAX random key; what a step draws depends on it, the step's number and the example's place alone.
      key_momentum: m of the key encoder's moving average.
      temperature: tau.
      method: "moco" (InfoNCE), "ifm" (both losses) or "ifm_only" (the shifted one alone).
      epsilon: IFM's budget, or the pair (positive, negative).
      alpha: weight of IFM's loss under "ifm".
      shuffle: keys are computed in a random order of the batch, so that the key's BatchNorm group is not the query's.
      mesh: the devices; None: wherever the arrays are.
      queue_sharded: each device holds its part of the queue and compares all queries with it.
    """

    encoder: Encoder
    optimizer: optax.GradientTransformation
    learning_rates: np.ndarray
    augment: Augment
    rng: jax.Array
    key_momentum: float = 0.999
    temperature: float = 0.2
    method: Literal["moco", "ifm", "ifm_only"] = "ifm"
    epsilon: float | tuple[float, float] = 0.1
    alpha: float = 1.0
    shuffle: bool = True
    mesh: jax.sharding.Mesh | None = None
    queue_sharded: bool = False

    def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        """Trains on one batch.

        Args:
          state: before the step.
          batch: `query` `(N, H, W, 3)` images; `key` likewise, where the key's images are others than the query's;
            `permutation` int32 `(N,)`, where the shuffled order is given and not drawn.

        Returns:
          The state after the step, and scalars: `loss`, `loss_clean` (InfoNCE), `loss_ifm` (shifted), `acc1` and
          `acc5` (contrast accuracy, percent), `lr`, `grad_norm`.
        """
        query_rng, key_rng, shuffle_rng = jax.random.split(jax.random.fold_in(self.rng, state.step), 3)
        query_images, key_images = batch["query"], batch.get("key", batch["query"])
        place = jnp.arange(query_images.shape[0], dtype=jnp.int32)

        # 1. The key encoder follows the query encoder as it was before this step; parameters only, not statistics.
        m = self.key_momentum
        key_params = jax.tree.map(lambda k, q: m * k + (1 - m) * q, state.key_params, state.params)

        # 2. Keys of the shuffled views, back in sample order, no gradient. The images are shuffled before augmentation,
        # while they are smallest; each keeps the randomness of its own place.
        order = place
        if self.shuffle:
            order = batch.get("permutation", jax.random.permutation(shuffle_rng, place)).astype(jnp.int32)
            # Without the constraint every device would compute the keys of the whole batch.
            key_images = self._split(key_images[order])
        key_views = self._split(self.augment(example_rngs(key_rng, order), key_images))
        keys, key_batch_stats = self.encoder(key_params, state.key_batch_stats, key_views, train=True)
        if self.shuffle:
            keys = self._split(keys[jnp.argsort(order)])
        keys = jax.lax.stop_gradient(keys)
        all_keys = self._replicate(keys)  # every device writes its queue itself

        # 3. Loss against the queue as it was before this step's keys.
        query_views = self._split(self.augment(example_rngs(query_rng, place), query_images))

        def loss_fn(params):
            queries, batch_stats = self.encoder(params, state.batch_stats, query_views, train=True)
            positives = keys
            if self.queue_sharded:
                # All queries against each device's part of the queue; the compiler combines the parts' sums and ranks.
                queries, positives = self._replicate(queries), all_keys
            found = losses.contrast(queries, positives, state.queue, self.temperature)
            clean, ifm = (
                jnp.mean(jax.nn.softplus(margin)) for margin in losses.margins(found, self.temperature, self.epsilon)
            )
            loss = {"moco": clean, "ifm": (clean + self.alpha * ifm) / (1 + self.alpha), "ifm_only": ifm}[self.method]
            return loss, (clean, ifm, found.rank, batch_stats)

        (loss, (clean, ifm, rank, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)

        # 4. Update of the query encoder.
        direction, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        lr = jnp.asarray(self.learning_rates, loss.dtype)[state.step]
        params = optim.descend(state.params, direction, lr)

        # 5. The newest keys replace the oldest.
        new_queue, queue_ptr = queue.enqueue(state.queue, state.queue_ptr, all_keys, by_row=self.queue_sharded)

        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            key_params=key_params,
            key_batch_stats=key_batch_stats,
            queue=new_queue,
            queue_ptr=queue_ptr,
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "loss_clean": clean,
            "loss_ifm": ifm,
            "acc1": losses.contrast_accuracy(rank, 1),
            "acc5": losses.contrast_accuracy(rank, 5),
            "lr": lr,
            "grad_norm": optax.tree.norm(gradient),
        }
        return state, metrics

    def jit(self) -> Callable:
        """Returns the compiled form, placed on the mesh; the state's memory is reused for the new state."""
        if self.mesh is None:
            return jax.jit(self.__call__, donate_argnums=0)
        state, batch = placements(self.mesh, self.queue_sharded), sharding.split(self.mesh)
        metrics = sharding.replicated(self.mesh)
        return jax.jit(self.__call__, donate_argnums=0, in_shardings=(state, batch), out_shardings=(state, metrics))

    def _split(self, x: jax.Array) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, sharding.split(self.mesh))

    def _replicate(self, x: jax.Array) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(self.mesh))
