"""The surroundings of every loop in a working directory: checkpoints, metrics, progress, signals."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ifm_jax import config as configs
from ifm_jax import sharding
from ifm_jax.config import Config
from ifm_jax.data import BadImages
from ifm_jax.runs import loop, metrics_log
from ifm_jax.runs.checkpoint import Checkpoints
from ifm_jax.runs.curves import PRETRAINING, Panels
from ifm_jax.runs.health import Health
from ifm_jax.runs.loggers import Loggers
from ifm_jax.runs.loop import Call, Length, Outcome, Recorder, State, StopSignals
from ifm_jax.runs.metrics_log import MetricsLog
from ifm_jax.runs.progress import Progress, Silence
from ifm_jax.runs.tensorboard import TensorBoardLog
from ifm_jax.runs.workdir import Workdir


class Session:
    """One process's work on a loop, in a working directory that it holds.

    Entering it opens checkpoints, logs and progress; leaving it closes them and finishes a checkpoint in progress. Of
    several hosts only process 0 logs, there and to the services of `log_to`.

    Args:
      workdir: existing working directory whose lock is held.
      config: config of the run.
      length: start and length of the loop.
      keep: number of checkpoints to keep; 0: all.
      best: name of a measurement; the checkpoint with its highest value is kept too; empty: none.
      full_step: step at which MoCo's queue is full of real keys, for the progress line.
      quiet: show no progress on the terminal.
      group: group of the metrics in TensorBoard; see `metrics_log.grouped`.

    Attributes:
      progress: shows lines and the progress of the loop.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: Config,
        length: Length,
        *,
        keep: int,
        best: str = "",
        full_step: int = 0,
        quiet: bool = False,
        group: str = "train",
    ):
        self._group = group
        self._workdir, self._config, self._length = workdir, config, length
        self._keep, self._best, self._full_step, self._quiet = keep, best, full_step, quiet
        self._stack = contextlib.ExitStack()
        self._log: MetricsLog | None = None
        self._tensorboard: TensorBoardLog | None = None
        self._loggers: Loggers | None = None
        self.progress: Progress | Silence = Silence()

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(Checkpoints(self._workdir.checkpoints, self._keep, self._best))
            if jax.process_index() == 0:
                self._log = stack.enter_context(MetricsLog(self._workdir.metrics, self._length.first))
                self._tensorboard = stack.enter_context(TensorBoardLog(self._workdir.tensorboard, self._length.first))
                metrics = ("probe/val_acc1",) if self._group == "probe" else ("train/loss", "eval/linear")
                self._tensorboard.write_config(self._length.first, self._config, metrics)
                if not self._quiet:
                    self.progress = Progress(
                        self._length.last_step,
                        epochs=self._length.epochs,
                        start_step=self._length.first,
                        steps_per_epoch=self._length.epoch_steps,
                        full_step=self._full_step,
                        verbose=self._config.verbose,
                    )
            stack.enter_context(self.progress)
            if jax.process_index() == 0 and self._config.log_to:
                records = metrics_log.read(self._workdir.metrics)
                notes = self._workdir.loggers
                self._loggers = stack.enter_context(Loggers(self._config, notes, records, self._group, self.say))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    def say(self, *lines: str) -> None:
        """Shows lines to the user, one after another."""
        for line in lines:
            self.progress.message(line)

    def show(self, name: str, path: pathlib.Path) -> None:
        """Shows a picture of the run's start, a PNG file, in TensorBoard and the services of `log_to`; on process 0.

        Args:
          name: name of the picture, without a group.
          path: path of the file.
        """
        if self._tensorboard is not None:
            self._tensorboard.write_picture(self._length.first, f"{self._group}/{name}", path)
        if self._loggers is not None:
            self._loggers.picture(name, path)

    def bad_images(self, count: int) -> BadImages:
        """Returns the record of unreadable images.

        Args:
          count: number of images in the data set.
        """
        return BadImages(count, self._config.data.max_bad, self._workdir.bad_images, self.progress.message)

    def run(
        self,
        step_fn: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
        state: State,
        calls: Iterator[Call],
        mesh: jax.sharding.Mesh,
        *,
        evaluate: Callable[[State], Mapping[str, Any]] | None = None,
        evaluate_every: int = 0,
        measured: Callable[[State], Mapping[str, Any] | None] = lambda state: None,
        checkpoint_minutes: float = 0.0,
        health: Health | None = None,
        panels: Panels = PRETRAINING,
        remedy: str = "A lower optim.lr, or a higher temperature, may help",
    ) -> tuple[Outcome, State]:
        """Runs the loop to its end, or until a signal stops it; then finishes writing all checkpoints.

        Args:
          step_fn: `(state, batch) -> (state, metrics)`, compiled; see `loop.run`.
          state: state before the first step.
          calls: arguments of each call of `step_fn`; see `loop.run`.
          mesh: mesh of the devices.
          evaluate: evaluates a state; its results are added to the metrics of the step.
          evaluate_every: steps between two evaluations; 0: none.
          measured: returns the results of evaluating a state, for the best checkpoint.
          checkpoint_minutes: most minutes between two checkpoints; 0: steps alone decide.
          health: watches the metrics; None: no warnings.
          panels: panels of curves.png.
          remedy: advice for the user when a loss is not finite.

        Returns:
          The outcome of the loop, and the last state.

        Raises:
          RunError: if a loss is not finite, or a checkpoint cannot be written.
        """
        config, length = self._config, self._length
        recorder = Recorder(
            self._log,
            self._tensorboard,
            self.progress,
            length.batch_size,
            length.epoch_steps,
            config.log_every,
            self._workdir.curves,
            panels,
            remedy,
            health,
            group=self._group,
            loggers=self._loggers,
        )
        with StopSignals(self.progress) as stop:
            done, state = loop.run(
                step_fn,
                state,
                calls,
                first=length.first,
                last_step=length.last_step,
                recorder=recorder,
                stop=stop,
                save=lambda state: self._checkpoints.save(state, configs.to_dict(config), measured(state)),
                checkpoint_every=config.checkpoint_every,
                checkpoint_seconds=60.0 * checkpoint_minutes,
                evaluate=evaluate,
                evaluate_every=evaluate_every,
                save_evaluated=bool(self._best),
                check=self._checkpoints.check,
                vote=sharding.maximum_over_hosts(mesh),
            )
            self._checkpoints.wait()
        return Outcome(done, length.last_step, stop.signal if done < length.last_step else None), state
