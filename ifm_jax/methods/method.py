"""What a method of contrastive learning is: the part of a step between its views and its gradient.

Everything else (views, gradient, optimizer, metrics, saving, placing, resuming) is the same for all of them and lives
in `ifm_jax.pretrain`. A method is a frozen dataclass with the functions of `Method`; what it carries from step to step
beside the network it keeps in a *memory*, a NamedTuple of arrays (`()` for none). `docs/methods.md` writes one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

import jax
import jax.numpy as jnp

from ifm_jax import sharding
from ifm_jax.augment import example_rngs
from ifm_jax.methods import losses
from ifm_jax.models import Encoder

Tree = dict[str, Any]
Memory = TypeVar("Memory")
Leaf = TypeVar("Leaf")  # an array, or what stands in its place: a sharding; None, where it may be missing
Part = TypeVar("Part")  # nested dicts of arrays, or what stands in their place

# (a random key for each example (N,), images (N, H, W, 3)) -> views (N, h, w, 3), float, normalized.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class Outcome(NamedTuple, Generic[Memory]):
    """What a method's loss leaves behind beside its gradient.

    Attributes:
      batch_stats: running averages of the network after this batch.
      memory: for the next step.
      metrics: scalars by name.
    """

    batch_stats: Tree
    memory: Memory
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """The two views of every image of a batch, made when a method asks for them.

    Attributes:
      images: images from which the two views are made, each `(N, H, W, 3)`; the same array twice, or two crops.
      rngs: a random key for either view.
      augment: makes a view of each image; an image keeps the randomness of its own place in whatever order.
      permutation: int32 `(N,)`, where the order in which MoCo shuffles is given and not drawn; None: it is drawn.
      mesh: the devices; None: wherever the arrays are.
    """

    images: tuple[jax.Array, jax.Array]
    rngs: tuple[jax.Array, jax.Array]
    augment: Augment
    permutation: jax.Array | None = None
    mesh: jax.sharding.Mesh | None = None

    @property
    def count(self) -> int:
        """N, the images of the global batch."""
        return self.images[0].shape[0]

    def __call__(self, number: int, order: jax.Array | None = None) -> jax.Array:
        """Returns a view of every image, `(N, h, w, 3)`, split over the devices.

        Args:
          number: 0 or 1, which view.
          order: int32 `(N,)`; place i of the result holds the view of image `order[i]`. None: as they are.
        """
        images = self.images[number]
        if order is None:
            place = jnp.arange(self.count, dtype=jnp.int32)
        else:
            place = order
            # Shuffled while they are smallest; without the constraint every device would make all views.
            images = sharding.split_rows(images[order], self.mesh)
        return sharding.split_rows(self.augment(example_rngs(self.rngs[number], place), images), self.mesh)


class Method(Protocol[Memory]):
    """What a step asks of a method.

    Attributes:
      encoder: the network that is trained, evaluated and exported.
      mesh: the devices; None: wherever the arrays are.
      memory: the type of what it carries, a NamedTuple, or `tuple` for nothing.
      trained_views: how many of the two views of an image the gradient flows through; for what a step needs of memory.
    """

    memory: type
    trained_views: int

    @property
    def encoder(self) -> Encoder: ...  # noqa: D102 (an attribute)

    @property
    def mesh(self) -> jax.sharding.Mesh | None: ...  # noqa: D102

    def start(self, rng: jax.Array, params: Tree, batch_stats: Tree) -> Memory:
        """Returns the memory that a run starts with.

        Args:
          rng: a JAX random key.
          params: parameters of the fresh network.
          batch_stats: statistics of the fresh network.
        """

    def placements(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns where the memory lies on the devices: its structure, a sharding in place of each field."""

    def loss(
        self, params: Tree, batch_stats: Tree, memory: Memory, views: Views, rng: jax.Array
    ) -> tuple[jax.Array, Outcome[Memory]]:
        """Returns the loss of a batch, of which the gradient with respect to `params` is taken, and what it leaves.

        Args:
          params: parameters of the network, before the step.
          batch_stats: statistics of the network.
          memory: memory of the step before.
          views: views of the batch.
          rng: a JAX random key of this step, for what the method draws.
        """

    def negatives(self, batch_size: int) -> int:
        """Returns how many negatives a query has, from a global batch of so many images."""

    def full_step(self, batch_size: int) -> int:
        """Returns the step after which all negatives are of real images; 0: from the start."""

    @staticmethod
    def missing(memory: Any) -> list[str]:
        """Returns the parts of a memory that are not there (`None`, as from an incomplete checkpoint), in words."""

    @staticmethod
    def inherit(given: Any, fresh: Any, params: Tree, batch_stats: Tree, same_head: bool) -> tuple[Any, list[str]]:
        """Returns the memory of a new run that starts with the weights of another, and what it is made of, in words.

        Args:
          given: the other run's memory, perhaps of another method, or with parts missing; NumPy arrays.
          fresh: that of a new run, NumPy arrays, as what is returned.
          params: parameters of the network that the new run starts with.
          batch_stats: likewise.
          same_head: the other run's projection head is the new one's too.
        """


Kind = Literal["infonce", "ifm", "ifm_only"]
OBJECTIVES: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Objective:
    """InfoNCE, IFM's loss, or their mean, with or without hard negatives: the same for every method.

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
      ValueError: for an unknown kind.
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
          it, whatever the kind; `acc1` and `acc5`, the contrast accuracy in percent.
        """
        clean, ifm = (
            jnp.mean(jax.nn.softplus(margin))
            for margin in losses.margins(found, self.temperature, self.epsilon, self.tau_plus)
        )
        loss = {"infonce": clean, "ifm": (clean + self.alpha * ifm) / (1 + self.alpha), "ifm_only": ifm}[self.kind]
        accuracies = {f"acc{top}": losses.contrast_accuracy(found.rank, top) for top in (1, 5)}
        return loss, {"loss": loss, "loss_clean": clean, "loss_ifm": ifm} | accuracies
