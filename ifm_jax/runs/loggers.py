"""W&B, MLflow and Trackio as views of `metrics.jsonl`, chosen with `log_to`.

Each service is called by a thread of its own, so that a slow one does not hold up the run. One that fails is left alone
with one line of warning. The packages are imported only when they are chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.config import Config
from ifm_jax.runs import metrics_log

_PROJECT = "ifm_jax"
_PATIENCE = 60.0  # seconds that the end of a run waits for a service


@dataclasses.dataclass(frozen=True)
class Source:
    """What a logger shows.

    Attributes:
      directory: working directory of the run, absolute; its last part is the name of the run.
      config: config of the run, by name ("moco.dim").
    """

    directory: pathlib.Path
    config: Mapping[str, Any]


class Logger(Protocol):
    """A run of a service. Any method may raise any error.

    Attributes:
      run: identifier with which a later process continues this run.
    """

    run: str

    def __init__(self, source: Source, run: str | None):
        """Starts a run, or continues the one with the identifier `run`."""
        ...

    def last_step(self) -> int | None:
        """Returns the last step that the service has received before; None if it cannot tell."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step, which is larger than all before."""
        ...

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Logs a PNG file; `step` is the one logged last."""
        ...

    def close(self, failed: bool) -> None:
        """Ends this process's part of the run.

        Args:
          failed: whether an error ended it.
        """
        ...


class WandbLogger:
    """Weights & Biases. `WANDB_MODE=offline` writes below the working directory, for `wandb sync`.

    A later process continues the run by its id. W&B itself drops a step that is not beyond those that it has.
    """

    def __init__(self, source: Source, run: str | None):
        self._wandb = _package("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=source.directory.name,
            dir=os.environ.get("WANDB_DIR", str(source.directory)),
            id=run,
            resume="allow" if run else None,
            config=dict(source.config),
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self.run: str = self._run.id
        self._first: int = self._run.step

    def last_step(self) -> int | None:
        """See `Logger.last_step`."""
        return self._first - 1 if self._first else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """See `Logger.picture`."""
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        """See `Logger.close`."""
        self._run.finish(exit_code=int(failed))


class MlflowLogger:
    """MLflow. `MLFLOW_TRACKING_URI` says where to; `file:DIR` with `MLFLOW_ALLOW_FILE_STORE=true` is a folder.

    `MLFLOW_EXPERIMENT_NAME` names the experiment. Uses the client alone: MLflow's global state belongs to the caller.
    """

    def __init__(self, source: Source, run: str | None):
        _package("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = importlib.import_module("mlflow.tracking").MlflowClient()
        self._values: dict[str, Any] = {}
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run = str(self._client.create_run(number, run_name=source.directory.name).info.run_id)
            params = [self._entities.Param(key, json.dumps(value)) for key, value in source.config.items()]
            for first in range(0, len(params), 100):  # the most that a request may have
                self._client.log_batch(run, params=params[first : first + 100])
        else:
            self._client.update_run(run, status="RUNNING")
        self.run: str = run

    def last_step(self) -> int | None:
        """See `Logger.last_step`."""
        known = self._client.get_run(self.run).data.metrics
        if not known:
            return None
        name = "train/loss" if "train/loss" in known else min(known)  # in every line
        return max(metric.step for metric in self._client.get_metric_history(self.run, name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        now = int(1000 * time.time())
        # Other characters are refused.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items()}
        metrics = [self._entities.Metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self.run, metrics=metrics)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """See `Logger.picture`."""
        self._client.log_artifact(self.run, str(path))

    def close(self, failed: bool) -> None:
        """See `Logger.close`."""
        self._client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


class TrackioLogger:
    """Trackio, which keeps runs in `TRACKIO_DIR` on this machine; its runs are identified by their names."""

    def __init__(self, source: Source, run: str | None):
        self._trackio = _package("trackio")
        self._project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        # Working directories of the same name are other runs.
        self.run: str = run or f"{source.directory.name}-{int(time.time())}"
        self._run = self._trackio.init(
            project=self._project, name=self.run, config=dict(source.config), resume="allow", embed=False
        )

    def last_step(self) -> int | None:
        """See `Logger.last_step`."""
        return None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """See `Logger.picture`."""
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        """See `Logger.close`."""
        self._run.finish()


LOGGERS: Mapping[str, Callable[[Source, str | None], Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}
"""Name in `log_to` -> logger."""


class Loggers:
    """The loggers of a run, each in its own thread. Nothing that they do raises an error or holds up the run.

    Each step reaches a service once. `loggers.json` notes the service's run and the last step given to it; a later
    process continues that run. Steps up to the checkpoint that the service lacks, as after a kill or for a service
    chosen only now, come from `metrics.jsonl`. Steps beyond the checkpoint that it has already are not given again,
    since no service can take a step back.

    Args:
      config: config of the run, whose `log_to` names the loggers.
      path: path of loggers.json, in the working directory.
      records: the lines of `metrics.jsonl`.
      group: group of the names; see `metrics_log.grouped`.
      say: shows a line to the user; called by the thread that calls the methods.
    """

    def __init__(
        self,
        config: Config,
        path: pathlib.Path,
        records: Iterable[Mapping[str, Any]],
        group: str = "train",
        say: Callable[[str], None] = print,
    ):
        self._group, self._say = group, say
        source = Source(path.parent, configs.flatten(configs.to_dict(config)))
        before = [(record["step"], metrics_log.grouped(record, group)) for record in records]
        notes = _Notes(path)
        self._threads = [_Thread(name, source, notes, before) for name in configs.loggers(config)]

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Logs a line of metrics.jsonl.

        Args:
          step: step of the line.
          record: its fields; the numbers among them are logged.
        """
        values = metrics_log.grouped(record, self._group)
        for thread in self._threads:
            thread.jobs.put(lambda thread=thread: thread.log(step, values))
        self._warn()

    def picture(self, name: str, path: pathlib.Path, again: bool = False) -> None:
        """Logs a PNG file.

        Args:
          name: name of the picture, without a group.
          path: path of the file, which must not change until this process ends or replaces it.
          again: also log it where a picture of that name was logged before.
        """
        for thread in self._threads:
            thread.jobs.put(lambda thread=thread: thread.picture(f"{self._group}/{name}", path, again))
        self._warn()

    def _warn(self) -> None:
        for thread in self._threads:
            if thread.failure and not thread.said:
                thread.said = True
                self._say(f"log_to={thread.name} has failed, and the run goes on without it: {thread.failure}")

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for thread in self._threads:
            thread.end(kind is not None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
            if thread.is_alive() and not thread.failure:
                thread.failure = f"no answer for {_PATIENCE:.0f} s; metrics.jsonl is complete"
        self._warn()


class _Thread(threading.Thread):
    """The thread of one logger: does what is in `jobs`, in order, until one of them fails."""

    def __init__(self, name: str, source: Source, notes: _Notes, before: Iterable[tuple[int, Mapping[str, float]]]):
        super().__init__(name=name, daemon=True)  # a service that never answers does not keep the process alive
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.failure, self.said = "", False
        self._source, self._notes, self._before = source, notes, before
        self._failed = False
        self._last, self._shown = -1, set[str]()
        self.start()

    def run(self) -> None:
        """Starts the logger, does the jobs and ends it."""
        try:
            # Not the error of an interrupt: only the main thread receives those.
            known = self._notes.of(self.name)
            self._logger = LOGGERS[self.name](self._source, known.get("run"))
            self._shown = set(known.get("pictures", ()))
            last = self._logger.last_step() if known else None
            self._last = max(known.get("step", -1), -1 if last is None else last)
            self._note()
            for step, values in self._before:
                self.log(step, values)
            while (job := self.jobs.get()) is not None:
                job()
            self._logger.close(self._failed)
        except BaseException as error:  # some packages raise SystemExit
            text = " ".join(str(error).split())
            self.failure = (text if isinstance(error, _MissingPackage) else f"{type(error).__name__}: {text}")[:300]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a step that the service does not have yet."""
        if step > self._last:
            self._logger.log(step, values)
            self._last = step
            self._note()

    def picture(self, name: str, path: pathlib.Path, again: bool) -> None:
        """Logs a picture with the last step."""
        if again or name not in self._shown:
            self._logger.picture(max(self._last, 0), name, path)
            self._shown.add(name)
            self._note()

    def end(self, failed: bool) -> None:
        """Asks the thread to end after the jobs so far."""
        self._failed = failed
        self.jobs.put(None)

    def _note(self) -> None:
        noted = {"run": self._logger.run, "step": self._last, "pictures": sorted(self._shown)}
        self._notes.set(self.name, noted)


class _Notes:
    """loggers.json: for each logger its run, the last step and the pictures given to it."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self._all: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):  # unreadable: new runs of the services
            found = json.loads(path.read_text())
            self._all = {name: noted for name, noted in dict(found).items() if _sound(noted)}

    def of(self, name: str) -> dict[str, Any]:
        return dict(self._all.get(name, {}))

    def set(self, name: str, noted: Mapping[str, Any]) -> None:
        with self._lock:
            self._all[name] = dict(noted)
            files.write_json(self._path, self._all)


def _sound(noted: Any) -> bool:
    return isinstance(noted, dict) and type(noted.get("run")) is str and type(noted.get("step")) is int


class _MissingPackage(Exception):  # noqa: N818
    """A package is not installed; the message says what to do."""


def _package(name: str) -> Any:
    """Returns the module of a package.

    Raises:
      _MissingPackage: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise _MissingPackage(f"it is not installed: pip install 'ifm_jax[{name}]'") from None
