"""Saving and restoring: the whole state and the config, asynchronously, with Orbax.

A checkpoint holds nested dicts of arrays under plain names, so that it can be read without this package, on any number
of devices. One is visible only once it is whole: Orbax writes under another name and renames. What can damage it after
that (a disk, a copy, a hand) is found when it is read.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ifm_jax.errors import RunError, UsageError
from ifm_jax.state import TrainState

DAMAGED = "damaged"  # beside a run's checkpoints: those that could not be read


class Checkpoints:
    """The checkpoints of a run, in one directory: the newest `keep`, and the best by a metric if one is named.

    What an earlier process was still writing when it died is removed.

    Args:
      directory: made if it is not there.
      keep: how many of the newest to keep.
      best: name of the metric whose highest value's checkpoint is kept too; empty: none.
      read_only: nothing is made or removed.

    Raises:
      UsageError: if `read_only` and the directory does not exist.
      RunError: if it cannot be made.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, best: str = "", read_only: bool = False):
        self.directory = pathlib.Path(directory).absolute()
        self._best = best
        if read_only and not self.directory.is_dir():
            raise UsageError(f"{self.directory}: no checkpoints there; expected the workdir of a training run")
        policies: list = [checkpoint_managers.LatestN(keep)]
        if best:
            value = lambda metrics: metrics.get(best, -np.inf)  # noqa: E731
            policies.append(checkpoint_managers.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False))
        # A reader has nothing to keep or to make; Orbax warns of each such option.
        options = (
            ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
            if read_only
            else ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=value if best else None,  # without it Orbax writes no metrics
                cleanup_tmp_directories=True,
            )
        )
        with self._failures():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, config: dict[str, Any], found: Mapping[str, float] | None = None) -> None:
        """Starts saving; returns once the state is copied, and writes it in the background.

        Args:
          state: the whole of it; its `step` names the checkpoint. One that is there already is kept.
          config: the run's, as JSON.
          found: what an evaluation of this state has found, by name; None: there was none.

        Raises:
          RunError: if this one or the one before it cannot be written.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flax.serialization.to_state_dict(state)),
            config=ocp.args.JsonSave(config),
        )
        measured = {self._best: found[self._best]} if self._best and found else None
        if not self.directory.is_dir():  # Orbax would make it anew, and go on as if the others were still there
            raise RunError(
                f"the checkpoints of {self.directory} were removed while the run was on: stopped at step {step}, "
                "nothing is saved any more; the same command goes on from what is there"
            )
        with self._failures(step):
            self._manager.save(step, args=items, metrics=measured)

    def check(self) -> None:
        """Raises the `RunError` of a checkpoint that could not be written in the background; does not wait."""
        with self._failures():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _failures(self, step: int | None = None) -> Iterator[None]:
        """Says in one line what keeps Orbax from writing."""
        try:
            yield
        except Exception as error:  # the file system's, TensorStore's, Orbax's own
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}, or the one before it,"
            raise RunError(
                f"{what} cannot be written to {self.directory} ({type(error).__name__}: {first_line(error)}); "
                "those written before are intact, and the same command goes on from the last once there is room and "
                "leave to write"
            ) from error

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
        """Returns when all that was started is written.

        Raises:
          RunError: if it cannot be.
        """
        with self._failures():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes writing.

        Raises:
          RunError: if it cannot be.
        """
        with self._failures():
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None:
            return self.close()
        # On several hosts Orbax waits for all of them: not where one has ended, or has failed alone.
        if jax.process_count() == 1 or isinstance(error, RunError):
            with contextlib.suppress(RunError):  # what ends the run is said already
                self.close()


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending; none where it does not exist."""
    if not directory.is_dir():
        return []
    # Orbax renames a checkpoint to its plain number once it is whole.
    return sorted(int(child.name) for child in directory.iterdir() if child.name.isdecimal())


def read_arrays(step_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the state in a checkpoint as nested dicts of NumPy arrays, whatever devices it was saved from.

    No other host takes part in it.

    Raises:
      Exception: whatever a damaged checkpoint makes Orbax raise.
    """
    handler = ocp.PyTreeCheckpointHandler()
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(step_dir / "state").tree)
    return handler.restore(step_dir / "state", args=ocp.args.PyTreeRestore(restore_args=wanted))


def newest_whole(directory: pathlib.Path, like: TrainState) -> tuple[TrainState | None, dict[int, str]]:
    """Returns the newest state that can be read, and why the newer ones cannot.

    Args:
      directory: of the checkpoints.
      like: the structure, shapes and dtypes it must have.

    Returns:
      The state as NumPy arrays, None where there are no checkpoints; and of each damaged one, by its step, what is
      wrong with it.

    Raises:
      UsageError: if there are checkpoints and none can be read.
    """
    damaged: dict[int, str] = {}
    for step in reversed(steps(directory)):
        try:
            state = flax.serialization.from_state_dict(like, read_arrays(directory / str(step)))
            jax.tree.map(_check_array, like, state)
            if int(state.step) != step:
                raise ValueError(f"it holds step {int(state.step)}")
            return state, damaged
        except Exception as error:  # whatever a damaged checkpoint makes Orbax raise
            if not damaged:
                _ignore_abandoned_reads()
            damaged[step] = f"{type(error).__name__}: {first_line(error)}"
    if damaged:
        newest = max(damaged)
        raise UsageError(
            f"{directory}: none of its checkpoints ({', '.join(map(str, sorted(damaged)))}) can be read "
            f"({newest}: {damaged[newest]}): put one that can there, or remove the directory to start afresh"
        )
    return None, damaged


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint out of the way, to `damaged/` beside the others' directory; returns where to."""
    target = directory.parent / DAMAGED / str(step)
    target.parent.mkdir(exist_ok=True)
    number = 0
    while target.exists():
        number += 1
        target = target.with_name(f"{step}.{number}")
    return (directory / str(step)).rename(target)


def _ignore_abandoned_reads() -> None:
    """Keeps Python from printing, long after a read has failed, what the reads begun beside it would have had to say.

    Orbax closes its event loop at the first that fails; TensorStore's threads then find none to report to.
    """
    previous = sys.unraisablehook

    def hook(unraisable) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            previous(unraisable)

    sys.unraisablehook = hook


def _check_array(expected, found) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ValueError(f"expected {expected.dtype}{list(expected.shape)}, there {found.dtype}{list(found.shape)}")


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def abstract_state(create, placement: jax.sharding.Sharding) -> TrainState:
    """Returns the shapes and dtypes of the state that `create()` would return, placed, without making it."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), jax.eval_shape(create))
