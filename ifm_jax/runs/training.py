"""Pre-training: turns a config and a working directory into a trained encoder."""

import contextlib
import itertools
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ifm_jax import assembly, sharding
from ifm_jax.config import Config
from ifm_jax.data import Source, steps_per_epoch
from ifm_jax.errors import RunError, UsageError, name_too_long
from ifm_jax.pretrain import DeviceState
from ifm_jax.runs import samples, start
from ifm_jax.runs.feed import make_feed
from ifm_jax.runs.health import Health
from ifm_jax.runs.loop import Length, Outcome
from ifm_jax.runs.session import Session
from ifm_jax.runs.workdir import Workdir

if TYPE_CHECKING:
    from ifm_jax.evaluation.online import OnlineEvaluation


def train(
    config: Config, workdir: str | os.PathLike[str], *, devices: list[jax.Device] | None = None, quiet: bool = False
) -> Outcome:
    """Pre-trains a new run, or continues the run in the working directory.

    Writes config.json, data.json, metrics.jsonl, checkpoints/, tensorboard/, curves.png and samples.png there.

    Args:
      config: config of the run.
      workdir: working directory of the run; created if it does not exist.
      devices: devices to run on; None: all.
      quiet: show no progress on the terminal.

    Returns:
      The outcome of the loop.

    Raises:
      UsageError: if the config cannot be run, or the workdir cannot be used for it.
      RunError: if the loss is no longer finite; the last checkpoint is from before then.
    """
    directory = Workdir(workdir)
    with _failures_of_the_disk(directory.path):
        return _train(config, directory, sharding.make_mesh(devices), quiet)


def _train(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh, quiet: bool) -> Outcome:
    config, source = start.open_run(config, workdir, mesh)
    size = min(config.data.limit, len(source)) if config.data.limit else len(source)
    epoch_steps = steps_per_epoch(size, config.batch_size)
    evaluation = _make_evaluation(config, mesh)
    feed = make_feed(config, source, size, mesh)

    with workdir.held():
        begin = start.open_workdir(config, workdir, source)
        last_step = min(config.steps or config.epochs * epoch_steps, config.epochs * epoch_steps)
        length = Length(begin.step, last_step, config.epochs, epoch_steps, config.batch_size)
        if length.done:
            if not quiet and jax.process_index() == 0:
                print(*begin.said, f"Nothing to do: {workdir} is at step {length.first} of {last_step}.", sep="\n")
            return Outcome(length.first, last_step)
        # All inputs of a step are on the devices from the start, placed as the step needs them.
        step = assembly.make_step(config, mesh)
        state = start.place(begin, config, mesh, step.method)
        health = Health.of(step.method, config.batch_size, size, window=epoch_steps // config.log_every)
        session = Session(
            workdir,
            config,
            length,
            keep=config.checkpoint_keep,
            best=config.checkpoint_best,
            full_step=health.full_step,
            quiet=quiet,
        )
        with session:
            session.say(*begin.said, *health.introduction())
            _draw_samples(config, source, size, workdir, session)
            with contextlib.closing(feed.calls(length, session)) as calls:
                call = next(calls)
                session.say(
                    f"Compiling the training step ({config.model.arch}, batch {config.batch_size}, {_name(mesh)})"
                )
                arguments = assembly.step_arguments(config, epoch_steps, mesh)
                program = _compile(feed.step(step).jit().lower(state, *feed.images, call.batch, *arguments), session)
                if length.first:
                    session.say(f"Resuming after step {length.first} of {last_step}.")
                outcome, _ = session.run(
                    lambda state, batch: program(state, *feed.images, batch, *arguments),
                    state,
                    itertools.chain([call], calls),
                    mesh,
                    evaluate=evaluation,
                    evaluate_every=config.eval.every * epoch_steps,
                    measured=evaluation.found_at if evaluation else lambda state: None,
                    checkpoint_minutes=config.checkpoint_minutes,
                    health=health,
                )
    return outcome


def _draw_samples(config: Config, source: Source, size: int, workdir: Workdir, session: Session) -> None:
    """Draws samples.png where it is missing; whatever goes wrong, the run goes on."""
    if jax.process_index() or workdir.samples.exists():
        return
    try:
        samples.draw(config, source, size, workdir.samples)
    except Exception as error:
        session.say(f"{workdir.samples.name} is not drawn: {type(error).__name__}: {error}")


def _make_evaluation(config: Config, mesh: jax.sharding.Mesh) -> "_Evaluation | None":
    """Returns the evaluation during the run, or None if there is none."""
    if not config.eval.every:
        return None
    from ifm_jax.evaluation.online import OnlineEvaluation  # imports scikit-learn, so only on request

    return _Evaluation(OnlineEvaluation(config, mesh), config.checkpoint_best)


def _compile(lowered: jax.stages.Lowered, session: Session) -> jax.stages.Compiled:
    """Returns the compiled step and prints how long compilation took. All hosts return together."""
    begun = time.perf_counter()
    program = lowered.compile()
    session.say(f"Compiled in {time.perf_counter() - begun:.1f} s.")
    sharding.wait_for_all("compiled")
    return program


def _name(mesh: jax.sharding.Mesh) -> str:
    return f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"


class _Evaluation:
    """An evaluation that keeps its latest results.

    Args:
      evaluate: `(state) -> record`; `measures` names the fields of a record.
      best: the name that must be in the record; empty: none.

    Raises:
      UsageError: if `best` is not in the record.
    """

    def __init__(self, evaluate: "OnlineEvaluation", best: str):
        if best and best not in evaluate.measures:
            raise UsageError(f"checkpoint_best={best!r}: expected one of {', '.join(evaluate.measures)}")
        self._evaluate = evaluate
        self._step: int | None = None
        self._found: Mapping[str, float] | None = None

    def __call__(self, state: DeviceState[Any]) -> Mapping[str, float]:
        self._step, found = int(state.step), self._evaluate(state)
        self._found = found
        return found

    def found_at(self, state: DeviceState[Any]) -> Mapping[str, float] | None:
        """Returns the results for that state, or None if there are none."""
        return self._found if int(state.step) == self._step else None


@contextlib.contextmanager
def _failures_of_the_disk(workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failed write during the run into a one-line error."""
    try:
        yield
    except OSError as error:
        if (mistake := name_too_long(error)) is not None:
            raise mistake from None
        where = f" {error.filename}" if error.filename else ""
        raise RunError(
            f"the workdir {workdir} cannot be written, or the images cannot be read ({error.strerror or error}"
            f"{where}); everything saved before is intact, and the same command resumes from the last checkpoint"
        ) from error
