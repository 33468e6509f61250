"""The loop around a compiled step, with metrics, checkpoints and Ctrl-C; for pre-training and the linear probe."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ifm_jax.errors import RunError
from ifm_jax.runs import metrics_log
from ifm_jax.runs.curves import PRETRAINING, Panels, draw_curves
from ifm_jax.runs.health import Health
from ifm_jax.runs.loggers import Loggers
from ifm_jax.runs.metrics_log import MetricsLog
from ifm_jax.runs.progress import Progress, Silence
from ifm_jax.runs.tensorboard import TensorBoardLog

# How many calls the host may be ahead of the device: enough to hide its work, few enough to bound images in flight.
_CALLS_AHEAD = 2
_CURVES_EVERY = 60.0  # seconds
# Repeats of a signal within so many seconds count as one: `timeout`, and launchers that signal a group and each process
# in it, send it twice.
_SAME_SIGNAL = 0.5

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a loop.

    Attributes:
      step: updates done.
      total_steps: updates in the whole loop.
      stopped_by: the signal that stopped the loop early, after saving; None: the loop is complete.
    """

    step: int
    total_steps: int
    stopped_by: signal.Signals | None = None


@dataclasses.dataclass(frozen=True)
class Length:
    """The start and the length of a loop.

    Attributes:
      first: updates done before.
      last_step: number of the last update.
      epochs: epochs of the whole recipe, which may be longer than the loop.
      epoch_steps: updates in an epoch.
      batch_size: images in an update.
    """

    first: int
    last_step: int
    epochs: int
    epoch_steps: int
    batch_size: int

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.first >= self.last_step


class Call(NamedTuple):
    """The arguments of one call of the compiled program.

    Attributes:
      batch: batch on the devices.
      steps: number of steps in the call; with several, their metrics are stacked.
    """

    batch: Any
    steps: int = 1


def counts(first: int, last_step: int, most: int, *stops: int) -> Iterator[int]:
    """Yields the number of steps in each call: as many as allowed, ending wherever something is due.

    Args:
      first: steps done before.
      last_step: number of the last step.
      most: greatest number of steps in a call.
      *stops: a call ends at every multiple of each of these; 0: ignored.
    """
    step = first
    while step < last_step:
        count = min(most, last_step - step, *(stop - step % stop for stop in stops if stop))
        yield count
        step += count


def run(
    step_fn: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    state: State,
    calls: Iterator[Call],
    *,
    first: int,
    last_step: int,
    recorder: "Recorder",
    stop: "StopSignals",
    save: Callable[[State], None],
    checkpoint_every: int,
    checkpoint_seconds: float = 0.0,
    evaluate: Callable[[State], Mapping[str, Any]] | None = None,
    evaluate_every: int = 0,
    save_evaluated: bool = False,
    vote: Callable[[np.ndarray], jax.Array] | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[int, State]:
    """Runs steps until the last one, or until a signal stops the loop.

    Args:
      step_fn: `(state, batch) -> (state, metrics)`, compiled; it may use the state's memory for the new one. Metrics
        are scalars, or for a call of several steps `(N,)` with room for them.
      state: state before the first step.
      calls: arguments of each call of `step_fn`. A call of several steps ends wherever a checkpoint or evaluation is
        due.
      first: steps done before.
      last_step: number of the last step.
      recorder: receives the metrics.
      stop: tells when to stop; afterwards its `signal` is the one for which all hosts have stopped.
      save: saves a state; called every `checkpoint_every` steps, every `checkpoint_seconds`, and at the end.
      checkpoint_every: steps between two checkpoints.
      checkpoint_seconds: most seconds between two checkpoints; 0: only steps count.
      evaluate: evaluates a state; its results are added to the metrics of the step.
      evaluate_every: steps between two evaluations; 0: none.
      save_evaluated: save after each evaluation too.
      check: called after each step; raises errors from the background.
      vote: returns the elementwise maximum over all hosts, like `sharding.maximum_over_hosts`.

    Returns:
      The total number of steps done, and the state after them.

    Raises:
      RunError: if a loss is not finite; nothing is saved of that step or after it.
    """
    step = first
    found = None
    decisions = _Decisions(stop, checkpoint_seconds, vote)
    call = next(calls)
    while step < last_step and not decisions.stop:
        # Otherwise every step would transfer anything that is not on the devices yet.
        with jax.transfer_guard("disallow"):
            state, step_metrics = step_fn(state, call.batch)
        recorder.add(step, call.steps, step_metrics)
        step += call.steps
        if step < last_step:
            with recorder.waiting():
                call = next(calls)  # read while the device computes
        found = None
        if evaluate is not None and evaluate_every and step % evaluate_every == 0:
            recorder.flush()
            with recorder.pausing():
                found = evaluate(state)
        if found is not None or step == last_step:
            recorder.log(last=True, extra=found)
        else:
            recorder.log()
        check()
        decisions.take()
        due = step % checkpoint_every == 0 or decisions.save or (save_evaluated and found is not None)
        if due and step < last_step and not decisions.stop:
            recorder.flush()  # save a state only once its losses are known to be finite
            save(state)
            decisions.saved()
    recorder.flush()
    if step > first:
        save(state)
    recorder.show()
    return step, state


class _Decisions:
    """Decisions by the clock and by signals, which fall after the same step on all hosts.

    Each host sends its vote along with every call, and all of them learn the outcome with the results of that call, a
    few calls later: no host waits. A single host needs no votes.
    """

    def __init__(self, stop: "StopSignals", seconds: float, vote: Callable[[np.ndarray], jax.Array] | None):
        self.stop = self.save = False
        self._signals, self._seconds, self._vote = stop, seconds, vote
        self._votes: collections.deque[jax.Array] = collections.deque()
        self._stale = 0
        self._saved_at = time.monotonic()

    def take(self) -> None:
        """Decides after a call whether to stop and whether to save."""
        self._signals.check()
        late = bool(self._seconds) and time.monotonic() - self._saved_at >= self._seconds
        number = int(self._signals.signal or 0)
        if self._vote is not None:
            self._votes.append(self._vote(np.array([number, late], np.int32)))
            number, late = np.asarray(self._votes.popleft()) if len(self._votes) > _CALLS_AHEAD else (0, False)
            if number:
                self._signals.signal = signal.Signals(int(number))
            late = late and not self._stale
            self._stale = max(self._stale - 1, 0)
        self.stop, self.save = bool(number), bool(late)

    def saved(self) -> None:
        """Records that a checkpoint was saved; votes for one that are still under way are obsolete."""
        self._saved_at = time.monotonic()
        self._stale = len(self._votes)


class Recorder:
    """Fetches each step's metrics from the device a few steps later, checks all of them and logs some."""

    def __init__(
        self,
        log: MetricsLog | None,
        tensorboard: TensorBoardLog | None,
        progress: Progress | Silence,
        batch_size: int,
        epoch_steps: int,
        log_every: int,
        curves: pathlib.Path,
        panels: Panels = PRETRAINING,
        remedy: str = "A lower optim.lr, or a higher temperature, may help",
        health: Health | None = None,
        *,
        group: str = "train",
        loggers: Loggers | None = None,
    ):
        """Stores where the metrics go.

        Args:
          log: the metrics log; None on all hosts but the first.
          tensorboard: the TensorBoard log; likewise.
          progress: shows the metrics.
          batch_size: images in a step.
          epoch_steps: steps in an epoch.
          log_every: steps between two lines of metrics.
          curves: path of the picture to draw.
          panels: panels of the picture.
          remedy: advice for the user when a loss is not finite.
          health: watches the metrics; None: no warnings.
          group: group of the metrics in TensorBoard; see `metrics_log.grouped`.
          loggers: the services of `log_to`; None on all hosts but the first.
        """
        self._health, self._group, self._loggers = health, group, loggers
        self._log, self._tensorboard, self.progress = log, tensorboard, progress
        self._batch_size, self._epoch_steps, self._log_every = batch_size, epoch_steps, log_every
        self._curves, self._panels, self._remedy = curves, panels, remedy
        self._step = 0
        self._pending: list[tuple[int, int, dict[str, jax.Array]]] = []  # steps before the call, steps in it, metrics
        self._due: list[tuple[int, dict[str, Any]]] = []  # checked and waiting to be written
        self._is_due = False
        self._last: tuple[int, dict[str, Any]] | None = None
        self._timed_step: int | None = None
        self._timed_at = time.perf_counter()
        self._waited = self._paused = 0.0  # seconds since then spent waiting for images and outside training
        self._drawn_at = time.perf_counter()
        self._shown_at = -math.inf

    def add(self, before: int, steps: int, step_metrics: dict[str, jax.Array]) -> None:
        """Adds a call that may still be computing; waits for the one `_CALLS_AHEAD` before it.

        Args:
          before: steps done before the call.
          steps: number of steps in the call.
          step_metrics: scalars, or arrays `(N,)` with N >= `steps`.
        """
        self._pending.append((before, steps, step_metrics))
        self._step = before + steps
        self._is_due |= self._step // self._log_every > before // self._log_every
        if self._timed_step is None:
            self._timed_step = before
        if len(self._pending) > _CALLS_AHEAD:
            self._pending[-1 - _CALLS_AHEAD][2]["loss"].block_until_ready()

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time in its block as waiting for images."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def pausing(self):
        """Excludes the time in its block from the speed."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun

    def flush(self) -> None:
        """Waits for all added steps and checks them.

        Raises:
          RunError: at the first step whose loss or gradient is not finite.
        """
        for before, steps, values in self._pending:
            values = {name: np.atleast_1d(value) for name, value in jax.device_get(values).items()}
            for number in range(steps):
                self._check(before + number + 1, {name: value[number] for name, value in values.items()})
        self._pending.clear()

    def _check(self, step: int, values: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise RunError(
                    f"{name} is {values[name]} at step {step}: stopped; the last checkpoint is from before it. "
                    + self._remedy
                )
        self._last = step, values
        if step % self._log_every == 0:
            self._due.append(self._last)

    def log(self, last: bool = False, extra: Mapping[str, Any] | None = None) -> None:
        """Writes the lines of metrics that are due.

        Args:
          last: write a line for the last added step even if none is due.
          extra: additional fields of that line.
        """
        if not (last or self._is_due):
            self.progress.update(self._step)
            return
        self.flush()
        if last and self._last is not None and self._due[-1:] != [self._last]:
            self._due.append(self._last)
        now = time.perf_counter()
        seconds = max(now - self._timed_at - self._paused, 1e-9)
        assert self._timed_step is not None  # a line is due, so a step was added
        speed = {
            "images_per_sec": (self._step - self._timed_step) * self._batch_size / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        for step, values in self._due:
            self._write(step, values, speed | dict((extra or {}) if step == self._step else {}))
        self._due.clear()
        self._is_due = False
        if extra is not None and now - self._shown_at > _CURVES_EVERY:
            self.show()
        elif now - self._drawn_at > _CURVES_EVERY:
            self.draw()
        self._timed_step, self._timed_at = self._step, time.perf_counter()
        self._waited = self._paused = 0.0

    def _write(self, step: int, values: dict[str, Any], extra: Mapping[str, Any]) -> None:
        record = {"step": step, "epoch": step / self._epoch_steps}
        record |= {name: float(value) for name, value in values.items()} | dict(extra)
        if self._log is not None and self._tensorboard is not None:
            self._log.write(record)
            self._tensorboard.write(step, record, self._group)
        if self._loggers is not None:
            self._loggers.log(step, record)
        self.progress.update(step, record)
        for warning in self._health.watch(record) if self._health else ():
            self.progress.message(warning)

    def draw(self) -> None:
        """Draws the curves of everything logged so far."""
        self._drawn_at = time.perf_counter()
        if self._log is not None and (records := metrics_log.read(self._log.path)):
            chance = self._health.chance if self._health else None
            draw_curves(records, self._curves, self._panels, chance=chance)

    def show(self) -> None:
        """Draws the curves, and shows the picture in TensorBoard and in the services of `log_to`."""
        self.draw()
        self._shown_at = time.perf_counter()
        if self._tensorboard is not None and self._curves.exists():
            self._tensorboard.write_picture(self._step, f"{self._group}/curves", self._curves)
        if self._loggers is not None and self._curves.exists():
            self._loggers.picture("curves", self._curves, again=True)


class StopSignals:
    """Requests for a loop to stop between two steps: Ctrl-C, SIGTERM, SIGHUP, or a closed output.

    The first signal is recorded; a second one acts at once.

    Attributes:
      signal: the signal to stop for; SIGPIPE if the output is closed.
    """

    def __init__(self, progress: Progress | Silence):
        self.signal: signal.Signals | None = None
        self._progress = progress
        self._previous: dict[int, Any] = {}
        self._received_at: float | None = None
        self._said = False

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            with contextlib.suppress(ValueError):  # not the main thread: its owner decides
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        self._restore()

    def check(self) -> None:
        """Checks the output and reports a received signal; call this between two steps."""
        if self.signal is None and self._progress.closed:
            self.signal = signal.SIGPIPE
        if self._received_at is not None and self.signal is not None and not self._said:
            self._said = True
            self._progress.message(f"{self.signal.name}: saving after this step (a second signal stops at once).")

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        # Only record it: the handler may interrupt a print, and printing is not reentrant.
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            self.signal = self.signal or signal.Signals(number)
        elif now - self._received_at > _SAME_SIGNAL:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
