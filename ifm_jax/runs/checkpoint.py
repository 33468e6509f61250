"""Saves and restores the whole state and the config, asynchronously, with Orbax.

A checkpoint holds nested dicts of arrays under plain names, so it can be read without this package, on any number of
devices. It becomes visible only once it is complete: Orbax writes under another name and renames. Later damage (by a
disk, a copy, a person) is detected on reading: checksums of every array and of the config are stored beside them, since
the storage format itself checks its index but not its data.

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
    """The contents of a checkpoint, read and checked.

    Attributes:
      state: state in the requested form.
      config: config of the run when it was saved, JSON.
    """

    state: Any
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in one directory: the newest `keep`, and the best by a metric if one is named.

    Incomplete checkpoints of an earlier process that died are removed.

    Args:
      directory: directory of the checkpoints; created if it does not exist.
      keep: number of the newest checkpoints to keep.
      best: name of a metric; the checkpoint with its highest value is kept too; empty: none.

    Raises:
      RunError: if the directory cannot be created.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, best: str = ""):
        self.directory = pathlib.Path(directory).absolute()
        self._best = best
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        value = None  # then Orbax writes no metrics
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
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: Any, config: dict[str, Any], found: Mapping[str, float] | None = None) -> None:
        """Starts to save: returns once the state is copied, then writes it in the background.

        Args:
          state: a NamedTuple with a `step`, which names the checkpoint. An existing checkpoint of that name is kept.
            The fields of a `memory` are written beside the others, under their names from before methods had memories.
          config: config of the run, JSON.
          found: results of an evaluation of this state, by name; None: there was none.

        Raises:
          RunError: if this checkpoint or the one before it cannot be written.
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
        if not self.directory.is_dir():  # Orbax would recreate it and continue as if the others still existed
            raise RunError(
                f"the checkpoints in {self.directory} were removed during the run: stopped at step {step} without "
                "saving it; the same command resumes from what is left"
            )
        with self._failures(step):
            self._manager.save(step, args=items, metrics=measured)

    def check(self) -> None:
        """Raises a `RunError` if a checkpoint could not be written in the background; does not wait."""
        with self._failures():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _failures(self, step: int | None = None) -> Iterator[None]:
        """Turns Orbax's errors while writing into one line."""
        try:
            yield
        except Exception as error:  # from the file system, TensorStore or Orbax
            self._failed = True
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}, or the one before it,"
            raise RunError(
                f"{what} cannot be written to {self.directory} ({type(error).__name__}: {first_line(error)}); earlier "
                "checkpoints are intact, and the same command resumes from the last one once the directory is writable "
                "and has room"
            ) from error

    def wait(self) -> None:
        """Waits until all checkpoints in progress are written.

        Raises:
          RunError: if one cannot be written.
        """
        with self._failures():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes writing.

        Raises:
          RunError: if one cannot be written.
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
            # On several hosts Orbax waits for all of them; do not wait if one has ended or failed alone.
            if jax.process_count() == 1 or isinstance(error, RunError):
                with contextlib.suppress(RunError):  # the error that ends the run has been reported
                    self.close()
        finally:
            if self._failed:
                self._settle()
                del self._manager  # it keeps the errors of its threads alive
                _release(error)
            self._silence.__exit__(None, None, None)


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending; empty if it does not exist."""
    if not directory.is_dir():
        return []
    # Orbax renames a checkpoint to its plain number once it is complete; it never writes names like 006.
    names = [child.name for child in directory.iterdir() if child.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def read(step_dir: pathlib.Path) -> Stored:
    """Returns the contents of a checkpoint, the state as nested dicts of NumPy arrays, wherever it was saved.

    Involves no other host.

    Raises:
      Exception: any error that a damaged checkpoint causes in Orbax; ValueError if a checksum does not match.
    """
    handler = ocp.PyTreeCheckpointHandler()
    state: Any = step_dir / "state"  # typed as another package's Path, but Orbax accepts any
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(state).tree)
    tree = handler.restore(state, args=ocp.args.PyTreeRestore(restore_args=wanted))
    config = read_config(step_dir)
    known = _read_checksums(step_dir)
    if known is None:
        return Stored(tree, config)
    found = {name: _describe(value) for name, value in _arrays(tree)}
    if known.keys() != found.keys() | {_CONFIG}:
        raise ValueError(f"it has other arrays than were saved ({', '.join(sorted(known.keys() ^ found.keys())[:3])})")
    for name, value in _arrays(tree):
        expected = known[name]
        for start, stop, crc in expected["crc"] if isinstance(expected["crc"], list) else [(0, None, expected["crc"])]:
            if expected["array"] != found[name] or _crc(value[start:stop] if value.ndim else value) != crc:
                raise ValueError(f"the checksum of {name} does not match: its data have changed since they were saved")
    return Stored(tree, config)


def read_config(step_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the config in a checkpoint.

    Raises:
      OSError: if there is no config.
      ValueError: if the config is damaged.
    """
    config = json.loads((step_dir / "config" / "metadata").read_text())
    known = _read_checksums(step_dir)
    if not isinstance(config, dict) or (known is not None and known.get(_CONFIG) != _crc_of_json(config)):
        raise ValueError("the checksum of its config does not match: it has changed since it was saved")
    return config


def find_whole(directory: pathlib.Path, like: Any = None) -> tuple[Stored | None, dict[int, str]]:
    """Returns the newest readable checkpoint, and the errors of the newer ones.

    Args:
      directory: directory of the checkpoints.
      like: required structure, shapes and dtypes of the state, in which it is returned; None: nested dicts as stored.

    Returns:
      The checkpoint, with a state of NumPy arrays, or None if none can be read; and a dict from the step of each
      damaged checkpoint to its error.
    """
    damaged: dict[int, str] = {}
    with _abandoned_work_is_silent(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
        for step in reversed(steps(directory)):
            try:
                stored = read(directory / str(step))
                if int(stored.state["step"]) != step:
                    raise ValueError(f"it contains step {int(stored.state['step'])}")
                return (stored if like is None else stored._replace(state=fitted(stored.state, like))), damaged
            except Exception as error:  # a damaged checkpoint can make Orbax raise anything
                damaged[step] = f"{type(error).__name__}: {first_line(error)}"
            gc.collect()  # leftover tasks print their warnings now
    return None, damaged


def newest_whole(directory: pathlib.Path, like: Any = None) -> tuple[Stored | None, dict[int, str]]:
    """Returns what `find_whole` does; raises if there are checkpoints and none can be read.

    Raises:
      UsageError: if there are checkpoints and none can be read.
    """
    stored, damaged = find_whole(directory, like)
    if stored is None and damaged:
        newest = max(damaged)
        raise UsageError(
            f"{directory}: none of its checkpoints ({', '.join(map(str, sorted(damaged)))}) can be read "
            f"({newest}: {damaged[newest]}): restore one, or delete the directory to start from scratch"
        )
    return stored, damaged


def fitted(tree: Tree, like: Any) -> Any:
    """Converts nested dicts of arrays to the structure of a state.

    Args:
      tree: nested dicts from `read`.
      like: a state of arrays or of their shapes and dtypes.

    Raises:
      ValueError: if the structure, or the shape or dtype of an array, differs.
    """
    if hasattr(like, "memory"):
        tree = nested(tree, list(flax.serialization.to_state_dict(like.memory)))
    state = flax.serialization.from_state_dict(like, tree)
    jax.tree.map(_check_array, like, state)
    return state


_CONFIG = "config"  # its key among the checksums; no array's name begins like this


def _checksums(tree: Tree, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the checksums of a state on the devices and of its config; a collective on several hosts.

    An array that is split over hosts has one checksum per part, so that no host needs the whole array.
    """
    known: dict[str, Any] = {_CONFIG: _crc_of_json(config)}
    split = {}
    for name, value in _arrays(tree):
        if not isinstance(value, jax.Array):
            crc = _crc(np.asarray(value))
        elif value.is_fully_replicated:
            # Not np.asarray(value): the array would cache the copy, and the next step could not reuse its memory.
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
    """Returns the checksums in a checkpoint; None for an old checkpoint without them."""
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
    # CRC-32 detects every flipped bit and every burst of up to 32 bits; it runs at 3 to 4 GB a second.
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _crc_of_json(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _release(error: BaseException | None) -> None:
    """Clears the frames of an error's traceback, which keep Orbax's tasks from being garbage-collected."""
    chain = [error] if error is not None else []
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]


_NEVER_AWAITED = "coroutine .* was never awaited"


@contextlib.contextmanager
def _abandoned_work_is_silent() -> Iterator[Callable[[], None]]:
    """Within its block, hides the messages of reads and writes that a failed one has left behind.

    Orbax gives up at the first failure. The others end as coroutines never awaited and tasks with errors never
    retrieved, which asyncio reports once they are collected; TensorStore's threads find the event loop closed, which
    Python reports through its hook.

    Yields:
      A function that waits, after a failure, until they are done: for a second without a message, at most five.
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
            gc.collect()  # leftover tasks print their warnings now
    finally:
        logger.removeFilter(is_of_others)
        sys.unraisablehook = hook


def nested(tree: Tree, memory: Sequence[str]) -> Tree:
    """Returns the arrays of a checkpoint with the memory's arrays, where they exist, grouped under `memory`."""
    rest = {name: value for name, value in tree.items() if name not in memory}
    return rest | {"memory": {name: tree.get(name) for name in memory}}


def _check_array(expected: Any, found: Any) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ValueError(f"expected {expected.dtype}{list(expected.shape)}, found {found.dtype}{list(found.shape)}")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:200]
