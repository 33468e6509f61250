"""Saving and restoring: the whole state and the config, asynchronously, with Orbax.

A checkpoint holds nested dicts of arrays under plain names, so that it can be read without this package, on any number
of devices. One is visible only once it is whole: Orbax writes under another name and renames.
"""

import pathlib
from typing import Any

import flax.serialization
import jax
import orbax.checkpoint as ocp

from ifm_jax.errors import UsageError
from ifm_jax.state import TrainState


class Checkpoints:
    """The checkpoints of a run, in one directory, the newest `keep` of them.

    Args:
      directory: made if it is not there.
      keep: how many to keep.
      read_only: nothing is made or removed.

    Raises:
      UsageError: if `read_only` and the directory does not exist.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, read_only: bool = False):
        self.directory = pathlib.Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise UsageError(f"{self.directory}: no checkpoints there; expected the workdir of a training run")
        # A reader has nothing to keep or to make; Orbax warns of each such option.
        options = (
            ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=keep)
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Starts saving; returns once the state is copied, and writes it in the background.

        Args:
          state: the whole of it; its `step` names the checkpoint. One that is there already is kept.
          config: the run's, as JSON.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flax.serialization.to_state_dict(state)),
            config=ocp.args.JsonSave(config),
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state saved at `step`.

        Args:
          step: of an existing checkpoint.
          like: a state of the same structure; `jax.ShapeDtypeStruct`s that carry a sharding will do. The arrays come
            back in its shapes, dtypes and placements, whatever devices they were saved from.
        """
        abstract = flax.serialization.to_state_dict(like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return flax.serialization.from_state_dict(like, self._manager.restore(step, args=items)["state"])

    def config(self, step: int) -> dict[str, Any]:
        """Returns the config saved at `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def wait(self) -> None:
        """Returns when all that was started is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def abstract_state(create, placement: jax.sharding.Sharding) -> TrainState:
    """Returns the shapes and dtypes of the state that `create()` would return, placed, without making it."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), jax.eval_shape(create))
