"""The working directory of a run: what its files are called, and the lock that one process at a time holds on it."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from ifm_jax.errors import UsageError

CONFIG = "config.json"  # the resolved config
DATA = "data.json"  # which images the run is on
CHECKPOINTS = "checkpoints"  # Orbax, a folder a step
DAMAGED = "damaged"  # checkpoints that could not be read
CONVERTED = "converted.json"  # of a converted checkpoint: where it comes from
METRICS = "metrics.jsonl"  # a line a logged step
TENSORBOARD = "tensorboard"  # event files
CURVES = "curves.png"
RESULTS = "results.json"  # what evaluations have measured
LOCK = ".lock"


def bad_images(process: int = 0) -> str:
    """Returns the name of the list of images that a process could not read; every process meets others."""
    return f"bad_images.{process}.txt" if process else "bad_images.txt"


@contextlib.contextmanager
def locked(directory: str | os.PathLike, flag: str = "--workdir") -> Iterator[None]:
    """Holds the lock of a directory, which exists, while the block runs.

    The operating system lets go of it when the process ends, however it ends; so a dead process blocks nobody. The
    file stays, since removing it would let two processes lock two files of one name.

    Args:
      directory: of a run, or of an evaluation.
      flag: that names another directory, for the error.

    Raises:
      UsageError: if another process holds it; names that process.
      OSError: if the file cannot be made.
    """
    path = pathlib.Path(directory) / LOCK
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UsageError(
            f"{directory} is in use by {_holder(path)}: wait for it, stop it, or pass another {flag}"
        ) from None
    try:
        with contextlib.suppress(OSError):  # a full disk takes the name of the holder, not the lock
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        yield
    finally:
        lock.release()


def _holder(path: pathlib.Path) -> str:
    """Says which process holds a lock, as far as the file tells."""
    try:
        holder = json.loads(path.read_text())
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
