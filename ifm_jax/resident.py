"""Steps on a data set that lies on the devices: batches are taken and cropped there, many in one compiled call.

Python then has nothing to do between two steps. The step itself is `PretrainStep`, unchanged.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ifm_jax import memory, sharding
from ifm_jax.augment import resized_crops
from ifm_jax.errors import UsageError
from ifm_jax.pretrain import PretrainStep, TrainState, placements

_SHARE = 0.8  # of a device's memory that images may take


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentStep:
    """`(state, images, call, rng, learning_rates) -> (state, metrics)`: several steps of pre-training.

    Attributes:
      step: one of them.
      image_size: side of a view in pixels, where crops are cut.
      most: steps of a call at most.
    """

    step: PretrainStep
    image_size: int
    most: int = 1

    def __call__(
        self,
        state: TrainState,
        images: jax.Array,
        call: dict[str, jax.Array],
        rng: jax.Array,
        learning_rates: jax.Array | None = None,
    ):
        """Trains on some batches.

        Args:
          state: before the first step.
          images: uint8 `(images, S, S, 3)`, all there are.
          call: as from `data.resident.resident_batches`.
          rng: as for `PretrainStep`.
          learning_rates: as for `PretrainStep`.

        Returns:
          The state after the last step; the metrics of all steps, each `(most,)`: of a call that has fewer steps, what
          is beyond them is 0.
        """
        rows = {name: call[name] for name in ("index", "boxes") if name in call}

        def one(state, number):
            batch = self.batch(images, {name: row[number] for name, row in rows.items()})
            return self.step(state, batch, rng, learning_rates)

        if self.most == 1:
            state, metrics = one(state, 0)
            return state, {name: value[None] for name, value in metrics.items()}

        def body(number, carried):
            state, metrics = carried
            state, of_step = one(state, number)
            return state, {name: metrics[name].at[number].set(value) for name, value in of_step.items()}

        shapes = jax.eval_shape(one, state, 0)[1]
        metrics = {name: jnp.zeros(self.most, value.dtype) for name, value in shapes.items()}
        # Not as many as there is room for, but as many as are wanted: a call also ends where a checkpoint is due.
        return jax.lax.fori_loop(0, call["steps"], body, (state, metrics))

    def batch(self, images: jax.Array, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the batch of one step; part of the compiled program.

        Args:
          images: uint8 `(images, S, S, 3)`, all there are.
          row: `index` int32 `(N,)`; where crops are cut `boxes`, float32 `(N, 2, 4)`.
        """
        split = functools.partial(sharding.split_rows, mesh=self.step.method.mesh)
        chosen = split(images.at[split(row["index"])].get(mode="promise_in_bounds"))
        if "boxes" not in row:
            return {"query": chosen}
        boxes = split(row["boxes"])
        query, key = (resized_crops(chosen, boxes[:, view], self.image_size) for view in range(2))
        return {"query": query, "key": key}

    def jit(self) -> Callable:
        """Returns the compiled form; the state's memory is reused for the new state."""
        if self.step.method.mesh is None:
            return jax.jit(self.__call__, donate_argnums=0)
        method = self.step.method
        whole, state = sharding.replicated(method.mesh), placements(method.mesh, method)
        return jax.jit(
            self.__call__,
            donate_argnums=0,
            in_shardings=(state, whole, whole, whole, whole),
            out_shardings=(state, whole),
        )


def check_memory(images: int, side: int, mesh: jax.sharding.Mesh) -> None:
    """Checks that images fit on each of the devices.

    Args:
      images: how many.
      side: of each in pixels.
      mesh: the devices.

    Raises:
      UsageError: if they take more than 80 % of its memory.
    """
    has = memory.of_device(mesh)
    needed = images * side * side * 3
    if has is not None and needed > _SHARE * has:
        raise UsageError(
            f"data.cache='device' takes {needed / 1e9:.1f} GB on each device, {images:,} images of {side} px, of the "
            f"{has / 1e9:.1f} GB it has: expected at most {_SHARE:.0%}; a smaller data.cache_size, or data.cache=''"
        )
