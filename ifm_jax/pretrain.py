"""One step of pre-training, for every method, and the training state."""

import dataclasses
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from ifm_jax import sharding
from ifm_jax.methods.method import Augment, Leaf, Memory, Method, Outcome, Part, Tree, Views

OptState = TypeVar("OptState")


class TrainState(NamedTuple, Generic[Leaf, Part, OptState, Memory]):
    """The whole state of a run; with the config and the data it determines all later steps.

    Attributes:
      step: int32 scalar, updates done.
      params: parameters of the network that is trained, evaluated and exported; nested dicts under torchvision's names.
      batch_stats: running averages of that network.
      opt_state: state of the optimizer (for SGD: the momentum buffers).
      memory: the method's state beside the network: MoCo's key encoder and queue; `()` for SimCLR. A checkpoint stores
        its fields beside the others.
    """

    step: Leaf
    params: Part
    batch_stats: Part
    opt_state: OptState
    memory: Memory


# A state in each of its forms: on the devices; on the host, restored; and its placement, with one sharding for all
# arrays of a field. `runs.snapshot` has the stored form, of which parts may be missing.
DeviceState = TrainState[jax.Array, Tree, optax.OptState, Memory]
HostState = TrainState[np.ndarray, Tree, optax.OptState, Any]
Placements = TrainState[NamedSharding, NamedSharding, NamedSharding, Any]


def create(rng: jax.Array, method: Method[Memory], optimizer: optax.GradientTransformation) -> DeviceState[Memory]:
    """Returns a fresh state.

    Args:
      rng: a JAX random key.
      method: method with the network and the memory.
      optimizer: optimizer whose state is created.
    """
    encoder_rng, memory_rng = jax.random.split(rng)
    params, batch_stats = method.encoder.init(encoder_rng)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        memory=method.start(memory_rng, params, batch_stats),
    )


def placements(mesh: jax.sharding.Mesh, method: Method[Any]) -> Placements:
    """Returns the placement of a state on the devices: one sharding per field, for all arrays in it."""
    whole = sharding.replicated(mesh)
    return TrainState(whole, whole, whole, whole, method.placements(mesh))


def step_rngs(rng: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the random keys of a step, `(3,)`: of its first view, its second view, and the method.

    Args:
      rng: random key of the run's steps.
      step: int32 scalar, updates done before.
    """
    return jax.random.split(jax.random.fold_in(rng, step), 3)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainStep:
    """`(state, batch, rng) -> (state, metrics)`, written as for one device and the global batch.

    Attributes:
      method: method of contrastive learning, for example `methods.MoCo`.
      optimizer: any optax transformation, including its schedule. One that takes `learning_rate` (those of `optim`)
        gets the rate of this step.
      augment: makes a view of every image; the two views use different randomness.
    """

    method: Method[Any]
    optimizer: optax.GradientTransformation
    augment: Augment

    def __call__(
        self,
        state: DeviceState[Any],
        batch: dict[str, jax.Array],
        rng: jax.Array,
        learning_rates: jax.Array | None = None,
    ) -> tuple[DeviceState[Any], dict[str, jax.Array]]:
        """Trains on one batch.

        Args:
          state: state before the step.
          batch: `views`, images `(N, V, H, W, 3)`: two crops of each image, or with V = 1 the image that both views are
            cut from on the device; optionally `permutation`, int32 `(N,)`, the order of MoCo's shuffle, which is
            otherwise drawn.
          rng: a JAX random key; the draws of a step depend only on it, the step's number and the example's position.
          learning_rates: float `(steps,)`, the rate of every step of the run, for an optimizer that takes one; an
            argument, so that runs with other rates share the program.

        Returns:
          The state after the step, and scalars: the method's metrics, `lr` if there are rates, and `grad_norm`.
        """
        first_rng, second_rng, own_rng = step_rngs(rng, state.step)
        images = batch["views"][:, 0], batch["views"][:, -1]
        views = Views(images, (first_rng, second_rng), self.augment, batch.get("permutation"), self.method.mesh)

        def loss_fn(params: Tree) -> tuple[jax.Array, Outcome[Any]]:
            return self.method.loss(params, state.batch_stats, state.memory, views, own_rng)

        (_, outcome), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        metrics: dict[str, jax.Array] = dict(outcome.metrics)
        extra: dict[str, jax.Array] = {}
        if learning_rates is not None:
            extra["learning_rate"] = metrics["lr"] = learning_rates[state.step]
        metrics["grad_norm"] = optax.tree.norm(gradient)
        optimizer = optax.with_extra_args_support(self.optimizer)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, **extra)
        params = cast(Tree, optax.apply_updates(state.params, updates))  # same structure as before
        return TrainState(state.step + 1, params, outcome.batch_stats, opt_state, outcome.memory), metrics

    def jit(self, rates: bool = True) -> jax.stages.Wrapped:
        """Returns the compiled step, placed on the method's mesh; the new state reuses the old state's memory.

        Args:
          rates: on a mesh, whether the step is called with learning rates.
        """
        mesh = self.method.mesh
        if mesh is None:
            return jax.jit(self.__call__, donate_argnums=0)
        state, whole = placements(mesh, self.method), sharding.replicated(mesh)
        return jax.jit(
            self.__call__,
            donate_argnums=0,
            in_shardings=(state, sharding.split(mesh), whole, *([whole] if rates else [])),
            out_shardings=(state, whole),
        )
