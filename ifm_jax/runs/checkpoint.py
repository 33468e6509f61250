"""Saving and restoring: the whole state and the config, asynchronously, with Orbax.

A checkpoint holds nested dicts of arrays under plain names, so that it can be read without this package, on any number
of devices. One is visible only once it is whole: Orbax writes under another name and renames. What can damage it after
that (a disk, a copy, a hand) is detected when it is read: a checksum of every array, and of the config, lies beside
them, since the storage format itself checks its index and not its data.

    <step>/state/       the arrays
    <step>/config/      the config, JSON
    <step>/checksums/   CRC-32 by name, JSON; checkpoints of version 0.1 have none and are read unchecked
"""

import contextlib
import gc
import json
import logging
import pathlib
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ifm_jax import sharding
from ifm_jax.errors import RunError, UsageError

Tree = dict[str, Any]


class Stored(NamedTuple):
    """What a checkpoint holds, read and checked.

    Attributes:
      state: as it was asked for.
      config: config of the run when it was saved, JSON.
    """

    state: Any
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in one directory: the newest `keep`, and the best by a metric if one is named.

    What an earlier process was still writing when it died is removed.

    Args:
      directory: made if it is not there.
      keep: how many of the newest to keep.
      best: name of the metric whose highest value's checkpoint is kept too; empty: none.

    Raises:
      RunError: if it cannot be made.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, best: str = ""):
        self.directory = pathlib.Path(directory).absolute()
        self._best = best
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        value = None  # without it Orbax writes no metrics
        if best:
            value = lambda metrics: metrics.get(best, -np.inf)  # noqa: E731
            policies.append(checkpoint_managers.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=value,
            cleanup_tmp_directories=True,
        )
        self._failed = False
        with self._failures():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: Any, config: dict[str, Any], found: Mapping[str, float] | None = None) -> None:
        """Starts saving; returns once the state is copied, and writes it in the background.

        Args:
          state: a NamedTuple with a `step`, which names the checkpoint. One that is there already is kept. The fields
            of a `memory` are written beside the others, under the names that they had before methods had memories.
          config: the run's, as JSON.
          found: what an evaluation of this state has found, by name; None: there was none.

        Raises:
          RunError: if this one or the one before it cannot be written.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        tree = flax.serialization.to_state_dict(state)
        tree |= tree.pop("memory", {})
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree),
            config=ocp.args.JsonSave(config),
            checksums=ocp.args.JsonSave(_checksums(tree, config)),
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
            self._failed = True
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}, or the one before it,"
            raise RunError(
                f"{what} cannot be written to {self.directory} ({type(error).__name__}: {first_line(error)}); "
                "those written before are intact, and the same command goes on from the last once there is room and "
                "leave to write"
            ) from error

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
        self._silence = _abandoned_work_is_silent()
        self._settle = self._silence.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                return self.close()
            # On several hosts Orbax waits for all of them: not where one has ended, or has failed alone.
            if jax.process_count() == 1 or isinstance(error, RunError):
                with contextlib.suppress(RunError):  # what ends the run is said already
                    self.close()
        finally:
            if self._failed:
                self._settle()
                del self._manager  # it holds the errors of its threads
                _release(error)
            self._silence.__exit__(None, None, None)


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending; none where it does not exist."""
    if not directory.is_dir():
        return []
    # Orbax renames a checkpoint to its plain number once it is whole; 006 is not a name of its.
    names = [child.name for child in directory.iterdir() if child.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def read(step_dir: pathlib.Path) -> Stored:
    """Returns what a checkpoint holds, the state as nested dicts of NumPy arrays, whatever devices it was saved from.

    No other host takes part in it.

    Raises:
      Exception: whatever a damaged checkpoint makes Orbax raise; ValueError where a checksum does not agree.
    """
    handler = ocp.PyTreeCheckpointHandler()
    state: Any = step_dir / "state"  # Orbax asks for the Path of another package, and takes any
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(state).tree)
    tree = handler.restore(state, args=ocp.args.PyTreeRestore(restore_args=wanted))
    config = read_config(step_dir)
    known = _read_checksums(step_dir)
    if known is None:
        return Stored(tree, config)
    found = {name: _describe(value) for name, value in _arrays(tree)}
    if known.keys() != found.keys() | {_CONFIG}:
        raise ValueError(
            f"it holds other arrays than were saved ({', '.join(sorted(known.keys() ^ found.keys())[:3])})"
        )
    for name, value in _arrays(tree):
        expected = known[name]
        for start, stop, crc in expected["crc"] if isinstance(expected["crc"], list) else [(0, None, expected["crc"])]:
            if expected["array"] != found[name] or _crc(value[start:stop] if value.ndim else value) != crc:
                raise ValueError(f"the checksum of {name} does not agree: its data have changed since they were saved")
    return Stored(tree, config)


def read_config(step_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the config in a checkpoint.

    Raises:
      OSError: if there is none.
      ValueError: if it is damaged.
    """
    config = json.loads((step_dir / "config" / "metadata").read_text())
    known = _read_checksums(step_dir)
    if not isinstance(config, dict) or (known is not None and known.get(_CONFIG) != _crc_of_json(config)):
        raise ValueError("the checksum of its config does not agree: it has changed since it was saved")
    return config


def find_whole(directory: pathlib.Path, like: Any = None) -> tuple[Stored | None, dict[int, str]]:
    """Returns the newest checkpoint that can be read, and why the newer ones cannot.

    Args:
      directory: directory of the checkpoints.
      like: the structure, shapes and dtypes its state must have, and comes in; None: nested dicts, as they are.

    Returns:
      The checkpoint, its state of NumPy arrays, None where none can be read; and of each damaged one, by its step, what
      is wrong with it.
    """
    damaged: dict[int, str] = {}
    with _abandoned_work_is_silent(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
        for step in reversed(steps(directory)):
            try:
                stored = read(directory / str(step))
                if int(stored.state["step"]) != step:
                    raise ValueError(f"it holds step {int(stored.state['step'])}")
                return (stored if like is None else stored._replace(state=fitted(stored.state, like))), damaged
            except Exception as error:  # whatever a damaged checkpoint makes Orbax raise
                damaged[step] = f"{type(error).__name__}: {first_line(error)}"
            gc.collect()  # what is left of it has its say now
    return None, damaged


def newest_whole(directory: pathlib.Path, like: Any = None) -> tuple[Stored | None, dict[int, str]]:
    """Does what `find_whole` does, where checkpoints none of which can be read are an error.

    Raises:
      UsageError: if there are checkpoints and none can be read.
    """
    stored, damaged = find_whole(directory, like)
    if stored is None and damaged:
        newest = max(damaged)
        raise UsageError(
            f"{directory}: none of its checkpoints ({', '.join(map(str, sorted(damaged)))}) can be read "
            f"({newest}: {damaged[newest]}): put one that can there, or remove the directory to start afresh"
        )
    return stored, damaged


def fitted(tree: Tree, like: Any) -> Any:
    """Returns the arrays of nested dicts in the structure of a state.

    Args:
      tree: as `read` returns it.
      like: a state of arrays or of their shapes and dtypes.

    Raises:
      ValueError: if it is another structure, or arrays have another shape or dtype.
    """
    if hasattr(like, "memory"):
        tree = nested(tree, list(flax.serialization.to_state_dict(like.memory)))
    state = flax.serialization.from_state_dict(like, tree)
    jax.tree.map(_check_array, like, state)
    return state


_CONFIG = "config"  # its place among the checksums; an array's name has no such first part


def _checksums(tree: Tree, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the checksums of a state on the devices, and of its config; on several hosts a collective.

    An array that is split over hosts has one of each part's rows, so that nobody needs the whole of it.
    """
    known: dict[str, Any] = {_CONFIG: _crc_of_json(config)}
    split = {}
    for name, value in _arrays(tree):
        if not isinstance(value, jax.Array):
            crc = _crc(np.asarray(value))
        elif value.is_fully_replicated:
            # Not np.asarray(value): it would remember its copy, whose memory the next step could not use again.
            crc = _crc(np.asarray(value.addressable_data(0)))
        elif value.is_fully_addressable:
            crc = _crc(np.asarray(value))
        else:
            crc = split[name] = sorted(
                (shard.index[0].start or 0, shard.index[0].stop or value.shape[0], _crc(np.asarray(shard.data)))
                for shard in value.addressable_shards
            )
        known[name] = {"array": _describe(value), "crc": crc}
    if split:
        parts = [json.loads(text) for text in sharding.gather_text(json.dumps(split))]
        for name in split:
            known[name]["crc"] = sorted(row for part in parts for row in part[name])
    return known


def _read_checksums(step_dir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the checksums in a checkpoint; None: it is from before there were any."""
    if not (step_dir / "checksums").is_dir():
        return None
    known = json.loads((step_dir / "checksums" / "metadata").read_text())
    if not isinstance(known, dict):
        raise ValueError("its checksums are damaged")
    return known


def _arrays(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the arrays of nested dicts, each with its path."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _arrays(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"state/{prefix}{name}", value


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(np.shape(value))}"


def _crc(value: np.ndarray) -> int:
    # Of every flipped bit, and of every burst of up to 32, CRC-32 is certain; it runs at 3 to 4 GB a second.
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _crc_of_json(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _release(error: BaseException | None) -> None:
    """Drops what the calls that have ended with an error still hold: Orbax's tasks, which could not be collected."""
    chain = [error] if error is not None else []
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]


_NEVER_AWAITED = "coroutine .* was never awaited"


@contextlib.contextmanager
def _abandoned_work_is_silent() -> Iterator[Callable[[], None]]:
    """Keeps what the reads and writes begun beside a failed one would have to say off the terminal, in its block.

    Orbax gives up at the first that fails. The others end with coroutines that nobody waited for and tasks whose
    errors nobody asked for, which asyncio reports once they are collected; TensorStore's threads find the event loop
    closed, which Python reports through its hook.

    Yields:
      What waits, after a failure, until they are done: a second in which none has said anything, five at most.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    heard = time.monotonic()

    def of_others(unraisable: "sys.UnraisableHookArgs") -> None:
        nonlocal heard
        if isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value):
            heard = time.monotonic()
        else:
            hook(unraisable)

    def settle() -> None:
        nonlocal heard
        heard = begun = time.monotonic()
        while time.monotonic() < min(heard + 1.0, begun + 5.0):
            time.sleep(0.05)

    def is_of_others(record: logging.LogRecord) -> bool:
        frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
        return "orbax" not in record.getMessage() and not any("orbax" in frame.filename for frame in frames)

    logger.addFilter(is_of_others)
    sys.unraisablehook = of_others
    try:
        yield settle
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
            gc.collect()  # what is left of it has its say now
    finally:
        logger.removeFilter(is_of_others)
        sys.unraisablehook = hook


def nested(tree: Tree, memory: Sequence[str]) -> Tree:
    """Returns the arrays of a checkpoint with those of these names, where they are there, together as `memory`."""
    rest = {name: value for name, value in tree.items() if name not in memory}
    return rest | {"memory": {name: tree.get(name) for name in memory}}


def _check_array(expected: Any, found: Any) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ValueError(f"expected {expected.dtype}{list(expected.shape)}, there {found.dtype}{list(found.shape)}")


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:200]
