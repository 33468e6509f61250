"""What every method has in common: the objective that is made of its margins."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ifm_jax.methods import losses

Kind = Literal["infonce", "ifm", "ifm_only"]
OBJECTIVES: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Objective:
    """InfoNCE, IFM's loss, or their mean, with or without hard negatives: the same for every method.

    A method compares its queries with their keys and negatives at `objective.temperature` and `objective.beta`, by
    `losses.contrast` or `losses.contrast_in_batch`, and gives the objective what it has found:

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
        """Returns the loss, a scalar, and what is told of it.

        Args:
          found: of all queries, any shape; compared at this temperature and beta.

        Returns:
          The loss to be minimised, and scalars: `loss`, the same; `loss_clean`, without IFM's shift; `loss_ifm`, with
          it, whatever the kind; `acc1` and `acc5`, the contrast accuracy in percent.
        """
        clean, ifm = (
            jnp.mean(jax.nn.softplus(margin))
            for margin in losses.margins(found, self.temperature, self.epsilon, self.tau_plus)
        )
        loss = {"infonce": clean, "ifm": (clean + self.alpha * ifm) / (1 + self.alpha), "ifm_only": ifm}[self.kind]
        accuracies = {f"acc{top}": losses.contrast_accuracy(found.rank, top) for top in (1, 5)}
        return loss, {"loss": loss, "loss_clean": clean, "loss_ifm": ifm} | accuracies
