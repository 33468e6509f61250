"""MoCo: negatives from a queue of earlier batches' keys (He et al. 2020, algorithm 1), as in IFM's original."""

import dataclasses
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ifm_jax import sharding
from ifm_jax.choices import ShuffleBN
from ifm_jax.methods import losses, queue
from ifm_jax.methods.method import Leaf, Objective, Outcome, Part, Tree, Views
from ifm_jax.methods.shuffle import Order, balanced_order, uniform_order
from ifm_jax.models import Encoder


class MoCoMemory(NamedTuple, Generic[Leaf, Part]):
    """MoCo's state beside the network: arrays, or stand-ins for them as in `pretrain.TrainState`.

    Attributes:
      key_params: parameters of the key encoder, the momentum average of the query encoder's.
      key_batch_stats: running averages of the key encoder itself, without the momentum update.
      queue: `(K, dim)` keys, L2-normalized; the oldest at row `queue_ptr`.
      queue_ptr: int32 scalar.
    """

    key_params: Part
    key_batch_stats: Part
    queue: Leaf
    queue_ptr: Leaf


_Carried = MoCoMemory[jax.Array, Tree]
_AtRest = MoCoMemory[np.ndarray, Tree]


@dataclasses.dataclass(frozen=True, eq=False)
class MoCo:
    """Momentum contrast.

    Attributes:
      encoder: architecture of query and key encoder.
      objective: computes the loss from the comparison.
      queue_size: K, a multiple of the batch size.
      momentum: m of the key encoder's moving average.
      shuffle: compute keys in a random order of the batch, so that a key's BatchNorm group differs from its query's:
        True, a uniform one; "balanced", see `shuffle.BalancedOrder`. With one group nothing is shuffled by the latter.
      queue_sharded: each device holds a part of the queue and compares all queries with it.
      mesh: mesh of the devices; None: arrays stay where they are.
    """

    encoder: Encoder
    objective: Objective
    queue_size: int = 65536
    momentum: float = 0.999
    shuffle: ShuffleBN = True
    queue_sharded: bool = False
    mesh: jax.sharding.Mesh | None = None

    memory = MoCoMemory
    trained_views = 1

    def start(self, rng: jax.Array, params: Tree, batch_stats: Tree) -> _Carried:
        """Returns the initial memory of a run: a copy of the query encoder and a queue of random unit vectors."""
        keys = queue.create(rng, self.queue_size, self.encoder.dim, jnp.dtype(self.encoder.param_dtype))
        # Copies, not the same arrays: the step donates its state's memory.
        key_params, key_batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
        return MoCoMemory(key_params, key_batch_stats, keys, jnp.zeros((), jnp.int32))

    def placements(self, mesh: jax.sharding.Mesh) -> MoCoMemory[NamedSharding, NamedSharding]:
        """Returns the placement of the memory: everything on every device, except for a split queue."""
        whole = sharding.replicated(mesh)
        return MoCoMemory(whole, whole, sharding.split(mesh) if self.queue_sharded else whole, whole)

    def loss(
        self, params: Tree, batch_stats: Tree, memory: _Carried, views: Views, rng: jax.Array
    ) -> tuple[jax.Array, Outcome[_Carried]]:
        """Returns the loss of a batch and its other results; see `Method`. The order is the original's."""
        # 1. The key encoder follows the query encoder as it was before this step; parameters only, not statistics.
        m, now = self.momentum, jax.lax.stop_gradient(params)
        key_params = jax.tree.map(lambda k, q: m * k + (1 - m) * q, memory.key_params, now)

        # 2. Keys of the shuffled views, back in sample order, no gradient.
        order = self._order(views, rng)
        keys, key_batch_stats = self.encoder(key_params, memory.key_batch_stats, views(1, order), train=True)
        keys = jax.lax.stop_gradient(keys)
        # Every device writes its own queue, so that all keys are on each.
        all_keys = sharding.on_every_device(keys, self.mesh) if order is None else order.undo(keys, self.mesh)
        keys = sharding.split_rows(all_keys, self.mesh)

        # 3. Loss against the queue as it was before this step's keys.
        queries, batch_stats = self.encoder(params, batch_stats, views(0), train=True)
        positives = keys
        if self.queue_sharded:
            # All queries against each device's part of the queue; the compiler combines the parts' sums and ranks.
            queries, positives = sharding.on_every_device(queries, self.mesh), all_keys
        objective = self.objective
        found = losses.contrast(queries, positives, memory.queue, objective.temperature, objective.beta)
        loss, metrics = objective(found)

        # 4. The newest keys replace the oldest.
        ring = queue.enqueue(memory.queue, memory.queue_ptr, all_keys, by_row=self.queue_sharded)
        return loss, Outcome(batch_stats, MoCoMemory(key_params, key_batch_stats, *ring), metrics)

    def _order(self, views: Views, rng: jax.Array) -> Order | None:
        """Returns the order in which keys are computed: the given one, or a random one; None: that of the queries."""
        groups = self.encoder.bn_groups
        if not self.shuffle:
            return None
        if views.permutation is not None:
            return Order(views.permutation.astype(jnp.int32))
        if self.shuffle == "balanced":
            return balanced_order(rng, views.count, groups, self.mesh) if groups > 1 else None
        return uniform_order(rng, views.count, self.mesh)

    def negatives(self, batch_size: int) -> int:
        """Returns K."""
        return self.queue_size

    def full_step(self, batch_size: int) -> int:
        """Returns the step after which no random vector is left in the queue."""
        return -(-self.queue_size // batch_size)

    @staticmethod
    def missing(memory: Any) -> list[str]:
        """Returns the missing parts of a memory, in words; see `Method`."""
        if not isinstance(memory, MoCoMemory):
            return ["key encoder", "queue"]
        parts = {"key encoder": memory.key_params, "queue": memory.queue}
        return [name for name, part in parts.items() if part is None]

    @staticmethod
    def inherit(
        given: Any, fresh: _AtRest, params: Tree, batch_stats: Tree, same_head: bool
    ) -> tuple[_AtRest, list[str]]:
        """Returns the memory of a run that starts with the weights of another, and its description; see `Method`."""
        lacks = MoCo.missing(given) if same_head else ["key encoder", "queue"]

        def cast(tree: Any, like: Any) -> Any:
            return jax.tree.map(lambda x, y: np.asarray(x, y.dtype), tree, like)

        if "key encoder" in lacks:
            memory = fresh._replace(key_params=params, key_batch_stats=batch_stats)
            notes = ["key encoder (a copy of the query encoder)"]
        else:
            memory = fresh._replace(
                key_params=cast(given.key_params, fresh.key_params),
                key_batch_stats=cast(given.key_batch_stats, fresh.key_batch_stats),
            )
            notes = ["key encoder"]
        if "queue" in lacks or np.shape(given.queue) != np.shape(fresh.queue):
            return memory, [*notes, "a new queue"]
        ring = {name: cast(getattr(given, name), getattr(fresh, name)) for name in ("queue", "queue_ptr")}
        return memory._replace(**ring), [*notes, "queue"]
