"""Pre-training: turns a config and a working directory into a trained encoder."""

import contextlib
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ifm_jax import assembly, files, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data import Source, steps_per_epoch
from ifm_jax.errors import RunError, UsageError, name_too_long
from ifm_jax.pretrain import DeviceState
from ifm_jax.runs import metrics_log, samples, start, summary
from ifm_jax.runs.feed import make_feed
from ifm_jax.runs.health import Health
from ifm_jax.runs.hosts import together
from ifm_jax.runs.loop import Length, Outcome
from ifm_jax.runs.session import Session
from ifm_jax.runs.workdir import Workdir

if TYPE_CHECKING:
    from ifm_jax.evaluation.online import OnlineEvaluation


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    devices: list[jax.Device] | None = None,
    quiet: bool = False,
    recipe: str = "",
) -> Outcome:
    """Pre-trains a new run, or continues the run in the working directory.

    Writes config.json, data.json, metrics.jsonl, checkpoints/, tensorboard/, curves.png and samples.png there, and with
    `eval.every` before_training.json.

    Args:
      config: config of the run.
      workdir: working directory of the run; created if it does not exist.
      devices: devices to run on; None: all.
      quiet: show no progress on the terminal.
      recipe: name of the recipe, for the first line of the output; empty: it is not named.

    Returns:
      The outcome of the loop.

    Raises:
      UsageError: if the config cannot be run, or the workdir cannot be used for it.
      RunError: if the loss is no longer finite; the last checkpoint is from before then.
    """
    directory = Workdir(workdir)
    with _failures_of_the_disk(directory.path):
        return _train(config, directory, sharding.make_mesh(devices), quiet, recipe)


def _train(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh, quiet: bool, recipe: str) -> Outcome:
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
        window = epoch_steps // config.log_every
        health = Health.of(step.method, config.batch_size, size, window, _remedy_for_features(config))
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
            session.say(summary.introduction(config, size, workdir.path, recipe))
            session.say(*begin.said, *health.introduction())
            _draw_samples(config, source, size, workdir, session)
            if evaluation is not None:
                session.say("Reading out the features of the network before training.")
                untrained = functools.partial(start.untrained, config, mesh, step.method)
                session.say(*evaluation.note_before(state, workdir, untrained))
            if length.first and jax.process_index() == 0:
                health.recall(metrics_log.read(workdir.metrics))
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
        if outcome.stopped_by is None:
            session.say(*summary.conclusion(outcome, workdir.path, labels=bool(source.label_names)))
    return outcome


def _draw_samples(config: Config, source: Source, size: int, workdir: Workdir, session: Session) -> None:
    """Draws samples.png where it is missing, and shows it; whatever goes wrong, the run goes on."""
    if jax.process_index() or workdir.samples.exists():
        return
    try:
        samples.draw(config, source, size, workdir.samples)
    except Exception as error:
        session.say(f"{workdir.samples.name} is not drawn: {type(error).__name__}: {error}")
        return
    if workdir.samples.exists():
        session.show("samples", workdir.samples)


def _make_evaluation(config: Config, mesh: jax.sharding.Mesh) -> "_Evaluation | None":
    """Returns the evaluation during the run, or None if there is none."""
    if not config.eval.every:
        return None
    from ifm_jax.evaluation.online import OnlineEvaluation  # imports scikit-learn, so only on request

    return _Evaluation(OnlineEvaluation(config, mesh), config.checkpoint_best, config.init_from)


def _remedy_for_features(config: Config) -> str:
    """Returns the advice for a run that erases a feature."""
    lower = f"a lower {config.method}.temperature (now {configs.temperature(config):g})"
    ways = f"{lower}, more epochs or IFM" if config.ifm.objective == "infonce" else f"{lower} or more epochs"
    return f"{ways[0].upper()}{ways[1:]} may bring it back; see docs/evaluation.md."


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
    """An evaluation that knows the readouts before training, and keeps its latest results.

    Args:
      evaluate: `(state) -> record`; `measures` names the fields of a record.
      best: the name that must be in the record; empty: none.
      init_from: origin of the weights with which the run started; empty: random ones.

    Raises:
      UsageError: if `best` is not in the record.
    """

    def __init__(self, evaluate: "OnlineEvaluation", best: str, init_from: str):
        if best and best not in evaluate.measures:
            raise UsageError(f"checkpoint_best={best!r}: expected one of {', '.join(evaluate.measures)}")
        self._evaluate, self._init_from = evaluate, init_from
        self._step: int | None = None
        self._found: Mapping[str, Any] | None = None

    def __call__(self, state: DeviceState[Any]) -> Mapping[str, Any]:
        self._step, found = int(state.step), self._evaluate(state)
        self._found = found
        return found

    def found_at(self, state: DeviceState[Any]) -> Mapping[str, Any] | None:
        """Returns the results for that state, or None if there are none."""
        return self._found if int(state.step) == self._step else None

    def note_before(
        self, state: DeviceState[Any], workdir: Workdir, untrained: Callable[[], DeviceState[Any]]
    ) -> list[str]:
        """Finds the readouts before training, from which gains count; writes or reads before_training.json.

        A resumed run reads them: they are those of another number of devices to the last digit, and `init_from` may
        have changed. Without the file, as in a run of an earlier version, they come from the untrained network, unless
        the run started with other weights.

        Args:
          state: first state of this process.
          workdir: working directory of the run.
          untrained: returns the state of a new run with random weights.

        Returns:
          Messages for the user.

        Raises:
          UsageError: if the file cannot be read or written.
        """
        names = [f"{kind}/{label}" for label in self._evaluate.labels for kind in ("knn", "linear")]
        resumed = int(state.step) > 0
        before = together(lambda: _read_before(workdir, names), lambda found: found or {}) if resumed else None
        if before is None:
            if resumed and self._init_from:
                return [
                    f"{workdir.before_training} is missing or lacks a label, and init_from is not read again: this run "
                    "does not compare its readouts with those before training."
                ]
            before = self._evaluate.readouts(untrained() if resumed else state)
            together(lambda: _write_before(workdir, before))
        self._evaluate.before = before
        found = ", ".join(f"{label} {before[f'linear/{label}']:.1f} %" for label in self._evaluate.labels)
        return [f"Before training, a linear readout of the frozen features finds {found}; gains count from there."]


def _read_before(workdir: Workdir, names: list[str]) -> dict[str, float] | None:
    """Returns the readouts in before_training.json; None if one of those names is not there."""
    remedy = "delete it, and the untrained network is read out again"
    found = files.read_json(workdir.before_training, remedy)
    if found is None or not set(names) <= found.keys():
        return None
    for name in names:
        if type(found[name]) not in (int, float):
            raise UsageError(f"{workdir.before_training}: {name} is {found[name]!r}, expected percent: {remedy}")
    return found


def _write_before(workdir: Workdir, before: Mapping[str, float]) -> None:
    if jax.process_index() == 0:
        with workdir.writing():
            files.write_json(workdir.before_training, before)


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
