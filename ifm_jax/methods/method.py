"""Defines a method of contrastive learning: the part of a step between its views and its gradient.

Everything else (views, gradient, optimizer, metrics, saving, placing, resuming) is the same for all methods and lives
in `ifm_jax.pretrain`. A method is a frozen dataclass with the functions of `Method`. Its state beside the network goes
from step to step in a *memory*, a NamedTuple of arrays (`()` for none). `docs/methods.md` shows how to write a method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from ifm_jax import sharding
from ifm_jax.augment import example_rngs
from ifm_jax.choices import OBJECTIVES, Kind
from ifm_jax.methods import losses
from ifm_jax.methods.shuffle import Order
from ifm_jax.models import Encoder

Tree = dict[str, Any]
Memory = TypeVar("Memory")
Leaf = TypeVar("Leaf")  # an array, or a sharding in its place; None, where it may be missing
Part = TypeVar("Part")  # nested dicts of arrays, or their stand-in

# (a random key for each example (N,), images (N, H, W, 3)) -> views (N, h, w, 3), float, normalized.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class Outcome(NamedTuple, Generic[Memory]):
    """The results of a method's loss besides its gradient.

    Attributes:
      batch_stats: running averages of the network after this batch.
      memory: memory for the next step.
      metrics: scalars by name.
    """

    batch_stats: Tree
    memory: Memory
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """The two views of every image of a batch, made on request of a method.

    Attributes:
      images: images from which the two views are made, each `(N, H, W, 3)`; the same array twice, or two crops.
      rngs: a random key for each view.
      augment: makes a view of each image; an image's randomness follows its own position, in any order.
      permutation: order in which MoCo shuffles, int32 `(N,)`; None: drawn at random.
      mesh: mesh of the devices; None: arrays stay where they are.
    """

    images: tuple[jax.Array, jax.Array]
    rngs: tuple[jax.Array, jax.Array]
    augment: Augment
    permutation: jax.Array | None = None
    mesh: jax.sharding.Mesh | None = None

    @property
    def count(self) -> int:
        """N, the number of images in the global batch."""
        return self.images[0].shape[0]

    def __call__(self, number: int, order: Order | None = None) -> jax.Array:
        """Returns a view of every image, `(N, h, w, 3)`, split over the devices.

        Args:
          number: number of the view, 0 or 1.
          order: row i of the result is the view of image `order.index[i]`. None: the given order.
        """
        images = self.images[number]
        if order is None:
            place = jnp.arange(self.count, dtype=jnp.int32)
        else:
            place = order.index
            # Shuffle images while they are smallest; unless they are split, every device would make all views.
            images = order.take(images, self.mesh)
        return sharding.split_rows(self.augment(example_rngs(self.rngs[number], place), images), self.mesh)


class Method(Protocol[Memory]):
    """The interface of a method for a step.

    Attributes:
      encoder: the network that is trained, evaluated and exported.
      mesh: mesh of the devices; None: arrays stay where they are.
      memory: type of the memory, a NamedTuple, or `tuple` for none.
      trained_views: number of an image's two views through which the gradient flows; for the memory estimate of a step.
    """

    memory: type
    trained_views: int

    @property
    def encoder(self) -> Encoder: ...  # noqa: D102 (an attribute)

    @property
    def mesh(self) -> jax.sharding.Mesh | None: ...  # noqa: D102

    def start(self, rng: jax.Array, params: Tree, batch_stats: Tree) -> Memory:
        """Returns the initial memory of a run.

        Args:
          rng: a JAX random key.
          params: parameters of the fresh network.
          batch_stats: statistics of the fresh network.
        """

    def placements(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns the placement of the memory on the devices: its structure with a sharding for each field."""

    def loss(
        self, params: Tree, batch_stats: Tree, memory: Memory, views: Views, rng: jax.Array
    ) -> tuple[jax.Array, Outcome[Memory]]:
        """Returns the loss of a batch, to be differentiated with respect to `params`, and its other results.

        Args:
          params: parameters of the network, before the step.
          batch_stats: statistics of the network.
          memory: memory after the previous step.
          views: views of the batch.
          rng: a JAX random key of this step, for the method's own draws.
        """

    def negatives(self, batch_size: int) -> int:
        """Returns the number of negatives per query for a global batch of `batch_size` images."""

    def full_step(self, batch_size: int) -> int:
        """Returns the step after which all negatives come from real images; 0: from the start."""

    @staticmethod
    def missing(memory: Any) -> list[str]:
        """Returns the missing parts of a memory (`None`, as from an incomplete checkpoint), in words."""

    @staticmethod
    def inherit(given: Any, fresh: Any, params: Tree, batch_stats: Tree, same_head: bool) -> tuple[Any, list[str]]:
        """Returns the memory of a new run that starts with the weights of another, and a description of its parts.

        Args:
          given: memory of the other run, perhaps of another method or with missing parts; NumPy arrays.
          fresh: memory of a new run, NumPy arrays, like the result.
          params: parameters of the network that the new run starts with.
          batch_stats: statistics of that network.
          same_head: whether the new run uses the other run's projection head.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """InfoNCE, IFM's loss, or their mean, with or without hard negatives, for every method.

    A method compares its queries with their keys and negatives at `objective.temperature` and `objective.beta`, with
    `losses.contrast` or `losses.contrast_in_batch`, and passes the result to the objective:

        found = losses.contrast(queries, keys, queue, objective.temperature, objective.beta)
        loss, metrics = objective(found)

    Attributes:
      kind: "infonce", "ifm" (both losses, weighted) or "ifm_only" (the shifted one alone).
      temperature: tau > 0.
      epsilon: IFM's budget >= 0, or the pair (positive, negative).
      alpha: weight of IFM's loss under "ifm", >= 0.
      beta: concentration on hard negatives, >= 0.
      tau_plus: the share of the negatives that are positives in truth, in [0, 1).

    Raises:
      ValueError: if the kind is unknown.
    """

    kind: Kind = "ifm"
    temperature: float = 0.2
    epsilon: losses.Epsilon = 0.1
    alpha: float = 1.0
    beta: float = 0.0
    tau_plus: float = 0.0

    def __post_init__(self):
        if self.kind not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.kind!r}: expected one of {', '.join(OBJECTIVES)}")

    def __call__(self, found: losses.Contrast) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a scalar, and its metrics.

        Args:
          found: comparison of all queries, any shape, at this temperature and beta.

        Returns:
          The loss to be minimized, and scalars: `loss`, the same; `loss_clean`, without IFM's shift; `loss_ifm`, with
          the shift, for every kind; `acc1` and `acc5`, the contrast accuracy in percent.
        """
        clean, ifm = (
            jnp.mean(jax.nn.softplus(margin))
            for margin in losses.margins(found, self.temperature, self.epsilon, self.tau_plus)
        )
        loss = {"infonce": clean, "ifm": (clean + self.alpha * ifm) / (1 + self.alpha), "ifm_only": ifm}[self.kind]
        accuracies = {f"acc{top}": losses.contrast_accuracy(found.rank, top) for top in (1, 5)}
        return loss, {"loss": loss, "loss_clean": clean, "loss_ifm": ifm} | accuracies
