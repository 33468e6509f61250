"""SimCLR: negatives from the batch (Chen et al. 2020); no second network, no queue."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ifm_jax import sharding
from ifm_jax.methods import losses
from ifm_jax.methods.method import Objective, Outcome, Tree, Views
from ifm_jax.models import Encoder


@dataclasses.dataclass(frozen=True, eq=False)
class SimCLR:
    """A simple framework for contrastive learning.

    Each of the 2N views of the global batch, on all devices and hosts, is a query; its positive is the other view of
    its image, its negatives are the 2N - 2 views of the other images.

    Attributes:
      encoder: the network; a single BatchNorm group holds the whole batch of 2N views, several split it by image.
      objective: computes the loss from the comparison.
      mesh: mesh of the devices; None: arrays stay where they are.
    """

    encoder: Encoder
    objective: Objective
    mesh: jax.sharding.Mesh | None = None

    memory = tuple
    trained_views = 2

    def start(self, rng: jax.Array, params: Tree, batch_stats: Tree) -> tuple[()]:
        """Returns the initial memory of a run: none."""
        return ()

    def placements(self, mesh: jax.sharding.Mesh) -> tuple[()]:
        """Returns the placement of the memory: none."""
        return ()

    def loss(
        self, params: Tree, batch_stats: Tree, memory: tuple[()], views: Views, rng: jax.Array
    ) -> tuple[jax.Array, Outcome[tuple[()]]]:
        """Returns the loss of a batch and its other results; see `Method`."""
        # Both views of an image side by side: they share a device and a BatchNorm group, and nothing is exchanged.
        both = jnp.stack([views(0), views(1)], axis=1)
        both = sharding.split_rows(both.reshape(-1, *both.shape[2:]), self.mesh)
        embeddings, batch_stats = self.encoder(params, batch_stats, both, train=True)
        embeddings = sharding.split_rows(embeddings.reshape(views.count, 2, -1), self.mesh)
        found = losses.contrast_in_batch(
            embeddings,
            self.objective.temperature,
            self.objective.beta,
            gather=functools.partial(sharding.on_every_device, mesh=self.mesh),
        )
        loss, metrics = self.objective(found)
        return loss, Outcome(batch_stats, (), metrics)

    def negatives(self, batch_size: int) -> int:
        """Returns 2N - 2."""
        return 2 * batch_size - 2

    def full_step(self, batch_size: int) -> int:
        """Returns 0: all negatives are views of this batch."""
        return 0

    @staticmethod
    def missing(memory: Any) -> list[str]:
        """Returns the missing parts of a memory: none; see `Method`."""
        return []

    @staticmethod
    def inherit(
        given: Any, fresh: tuple[()], params: Tree, batch_stats: Tree, same_head: bool
    ) -> tuple[tuple[()], list[str]]:
        """Returns the memory of a run that starts with the weights of another: none; see `Method`."""
        return (), []
