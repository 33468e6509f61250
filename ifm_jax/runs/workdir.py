"""The working directory of a run: its file names, its lock, its config."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping

import filelock
import jax

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.runs import checkpoint
from ifm_jax.runs.hosts import together


class Workdir:
    """The directory of a run or an evaluation. It knows the names of the files; other modules write and read them.

    Args:
      path: path of the directory, which need not exist yet.
      flag: flag with which the user chooses another directory, for errors.

    Attributes:
      path: absolute path.
      config: config.json, the resolved config.
      data: data.json, identifies the run's images.
      before_training: before_training.json, readouts of the network with which a run with `eval.every` started.
      evaluation: evaluation.json, identifies the evaluation, in the directory of an evaluation.
      checkpoints: checkpoints/, Orbax, one folder per step.
      damaged: damaged/, checkpoints that could not be read.
      converted: converted.json, origin of a converted checkpoint.
      metrics: metrics.jsonl, one line per logged step.
      tensorboard: tensorboard/, event files.
      loggers: loggers.json, the runs of the services in `log_to`, and what they have.
      curves: curves.png.
      samples: samples.png, a few images and their views.
      results: results.json, results of evaluations.
    """

    def __init__(self, path: str | os.PathLike[str], flag: str = "--workdir"):
        self.path, self.flag = pathlib.Path(path).absolute(), flag
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.before_training = self.path / "before_training.json"
        self.evaluation = self.path / "evaluation.json"
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged"
        self.converted = self.path / "converted.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.loggers = self.path / "loggers.json"
        self.curves = self.path / "curves.png"
        self.samples = self.path / "samples.png"
        self.results = self.path / "results.json"
        self._lock = self.path / ".lock"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def bad_images(self) -> pathlib.Path:
        """The list of the images that this process could not read; each process has its own."""
        process = jax.process_index()
        return self.path / (f"bad_images.{process}.txt" if process else "bad_images.txt")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Creates the directory and locks it while the block runs; process 0 does so for all.

        Raises:
          UsageError: if another process holds the lock, or the directory cannot be created.
        """

        def hold() -> None:
            if jax.process_index() == 0:
                with self.writing():
                    self.path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(self.locked())

        with contextlib.ExitStack() as stack:
            together(hold)
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock of the existing directory while the block runs.

        The operating system releases it when the process ends for any reason, so a dead process blocks nobody. The file
        stays, since removing it would let two processes lock two files of the same name.

        Raises:
          UsageError: if another process holds it; the message names that process.
          OSError: if the lock file cannot be created.
        """
        lock = filelock.FileLock(self._lock)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UsageError(
                f"{self.path} is in use by {self._holder()}: wait for it, stop it, or pass another {self.flag}"
            ) from None
        try:
            with contextlib.suppress(OSError):  # with a full disk the holder's name is missing, but the lock works
                self._lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            yield
        finally:
            lock.release()

    def _holder(self) -> str:
        """Describes the process that holds the lock, as far as the file tells."""
        try:
            holder = json.loads(self._lock.read_text())
            return f"process {int(holder['pid'])} on {holder['host']}"
        except (OSError, ValueError, TypeError, KeyError):
            return "another process"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors in its block about writing to the directory into a `UsageError`."""
        try:
            yield
        except OSError as error:
            name = self.flag.lstrip("-")
            raise UsageError(
                f"{name} {self.path} is not writable ({error.strerror}): pass a writable {self.flag}"
            ) from None

    def remove_leftovers(self) -> None:
        """Removes temporary files of a process that died while it wrote one of the files here."""
        for leftover in self.path.glob("*.*.tmp"):
            leftover.unlink(missing_ok=True)

    def set_aside(self, damaged: Mapping[int, str]) -> list[str]:
        """Moves damaged checkpoints to `damaged/`; process 0 does so for all.

        Args:
          damaged: step -> error of its checkpoint.

        Returns:
          Messages for the user.
        """
        return together(
            lambda: [
                f"The checkpoint of step {step} is damaged ({reason}): moved to {self._set_aside(step)}."
                for step, reason in damaged.items()
                if jax.process_index() == 0
            ]
        )

    def _set_aside(self, step: int) -> pathlib.Path:
        target = self.damaged / str(step)
        self.damaged.mkdir(exist_ok=True)
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{step}.{number}")
        return (self.checkpoints / str(step)).rename(target)

    def find_config(self) -> Config | None:
        """Returns the config of the run here, or None if there is no run.

        It comes from the newest checkpoint, which nobody can change by hand; fields that may change on resuming come
        from config.json. Without a checkpoint config.json alone decides.

        Raises:
          UsageError: if config.json is needed and cannot be read.
        """
        stored = self._stored_config()
        try:
            written = configs.from_json(self.config.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            written = None
        except (OSError, ValueError) as error:  # UsageError is a ValueError
            if stored is None:
                raise UsageError(
                    f"{self.config} cannot be read ({error}): expected the config of a training run"
                ) from None
            written = None
        return stored if stored is not None and (written is None or configs.differences(stored, written)) else written

    def _stored_config(self) -> Config | None:
        """Returns the config in the newest checkpoint whose config can be read, or None."""
        for step in reversed(checkpoint.steps(self.checkpoints)):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                stored = checkpoint.read_config(self.checkpoints / str(step))
                break
        else:
            return None
        return configs.from_dict(stored)

    def read_config(self) -> Config:
        """Returns the config of the run here; see `find_config`.

        Raises:
          UsageError: if there is no config, or it cannot be read.
        """
        config = self.find_config()
        if config is None:
            raise UsageError(f"{self.config} does not exist: expected the workdir of a training run")
        return config
