"""Pre-training: from a config and a working directory to a trained encoder."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from ifm_jax import assembly, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data import BadImages, on_device, steps_per_epoch, training_batches
from ifm_jax.data.on_device import Copies, copies_side, on_device_batches, read_all
from ifm_jax.errors import RunError, UsageError, name_too_long
from ifm_jax.pretrain import TrainState, placements
from ifm_jax.runs import loop, memory, start
from ifm_jax.runs.checkpoint import Checkpoints
from ifm_jax.runs.health import Health
from ifm_jax.runs.metrics_log import MetricsLog
from ifm_jax.runs.progress import Progress, Silence
from ifm_jax.runs.tensorboard import TensorBoardLog
from ifm_jax.runs.workdir import CHECKPOINTS, CURVES, METRICS, TENSORBOARD, bad_images

if TYPE_CHECKING:
    from ifm_jax.evaluation.online import OnlineEvaluation


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done.
      total_steps: updates it is to do.
      stopped_by: the signal that stopped it early, saved; None: it is done.
    """

    step: int
    total_steps: int
    stopped_by: signal.Signals | None = None


def train(
    config: Config, workdir: str | os.PathLike, *, devices: list[jax.Device] | None = None, quiet: bool = False
) -> Result:
    """Pre-trains, or goes on pre-training what the working directory holds.

    Writes config.json, data.json, metrics.jsonl, checkpoints/, tensorboard/ and curves.png there.

    Args:
      config: of the run.
      workdir: of the run; made if it is not there.
      devices: to run on; None: all there are.
      quiet: no progress on the terminal.

    Raises:
      UsageError: for a config that cannot be run, or a workdir that cannot be used for it.
      RunError: if the loss is no longer finite; the last checkpoint is from before that.
    """
    workdir = pathlib.Path(workdir).absolute()
    with _failures_of_the_disk(workdir):
        return _train(config, workdir, sharding.make_mesh(devices), quiet)


def _train(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh, quiet: bool) -> Result:
    config, source = start.open_run(config, workdir, mesh)
    size = min(config.data.limit, len(source)) if config.data.limit else len(source)
    epoch_steps = steps_per_epoch(size, config.batch_size)
    evaluation = None
    if config.eval.every:
        from ifm_jax.evaluation.online import OnlineEvaluation  # with scikit-learn, for those who ask for it

        evaluation = _Evaluation(OnlineEvaluation(config, mesh), config.checkpoint_best)
    side = 0
    if config.data.cache:
        side = start.together(
            lambda: _side(config, source, size, mesh), lambda found: {"side of the images held on the devices": found}
        )
    primary = jax.process_index() == 0
    total_steps = config.epochs * epoch_steps
    last_step = min(config.steps, total_steps) if config.steps else total_steps

    with contextlib.ExitStack() as stack:
        stack.enter_context(start.held(workdir))
        begin = start.open_workdir(config, workdir, source)
        first = int(begin.state.step) if begin.state is not None else 0
        if first >= last_step:
            if not quiet and primary:
                print(*begin.said, f"Nothing to do: {workdir} holds step {first} of {last_step}.", sep="\n")
            return Result(first, last_step)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / CHECKPOINTS, config.checkpoint_keep, config.checkpoint_best)
        )
        # Everything a step reads lies on the devices as the step wants it, from the start.
        step = assembly.make_step(config, mesh)
        placement = placements(mesh, step.method)
        create = jax.jit(assembly.state_creator(config, mesh), out_shardings=placement)
        start_rng = sharding.place_key(mesh, assembly.initial_rngs(config)[0])
        if begin.weights is not None:
            begin.state, notes = start.started_with(begin.weights, jax.device_get(create(start_rng)), config.method)
            begin.said.append(f"Starting with {config.init_from}: {'; '.join([*notes, *begin.weights.notes])}.")
        if begin.state is None:
            train_state = create(start_rng)
        else:
            train_state = jax.tree.map(lambda where, part: sharding.place(part, where), placement, begin.state)
        begin.state = begin.weights = None  # their memory

        log = tensorboard = None
        if primary:
            log = stack.enter_context(MetricsLog(workdir / METRICS, first))
            tensorboard = stack.enter_context(TensorBoardLog(workdir / TENSORBOARD, first))
        negatives, full_step = (of(config.batch_size) for of in (step.method.negatives, step.method.full_step))
        window = epoch_steps // config.log_every
        health = Health(negatives, size, queue=full_step > 0, full_step=full_step, window=window)
        progress = Silence()
        if primary and not quiet:
            progress = Progress(
                last_step,
                epochs=config.epochs,
                start_step=first,
                steps_per_epoch=epoch_steps,
                full_step=full_step,
            )
        stack.enter_context(progress)
        for line in begin.said + health.introduction():
            progress.message(line)
        unreadable = BadImages(size, config.data.max_bad, workdir / bad_images(jax.process_index()), progress.message)
        images = ()
        if config.data.cache:
            pixels, copies = _read_all(config, source, size, side, unreadable, progress)
            images = (sharding.place_everywhere(mesh, pixels),)
            del pixels
            calls = _calls_on_devices(config, mesh, copies, first, last_step)
        else:
            calls = _calls_from_host(config, mesh, source, size, first, unreadable)
        stack.callback(calls.close)
        call = next(calls)

        devices_text = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"
        progress.message(
            f"Compiling the training step ({config.model.arch}, batch {config.batch_size}, {devices_text})"
        )
        begun = time.perf_counter()
        rng_and_rates = assembly.step_arguments(config, epoch_steps, mesh)
        if config.data.cache:
            step = on_device.OnDeviceStep(step, config.data.image_size, config.steps_per_call)
        program = step.jit().lower(train_state, *images, call.batch, *rng_and_rates).compile()
        progress.message(f"Compiled in {time.perf_counter() - begun:.1f} s.")
        sharding.wait_for_all("compiled")
        if first:
            progress.message(f"Going on after step {first} of {last_step}.")

        stop = stack.enter_context(loop.StopSignals(progress))
        recorder = loop.Recorder(
            log,
            tensorboard,
            progress,
            config.batch_size,
            epoch_steps,
            config.log_every,
            workdir / CURVES,
            health=health,
        )
        done, _ = loop.run(
            lambda state, batch: program(state, *images, batch, *rng_and_rates),
            train_state,
            itertools.chain([call], calls),
            first=first,
            last_step=last_step,
            recorder=recorder,
            stop=stop,
            save=lambda state: checkpoints.save(
                state, configs.to_dict(config), evaluation.found_at(int(state.step)) if evaluation else None
            ),
            checkpoint_every=config.checkpoint_every,
            checkpoint_seconds=60.0 * config.checkpoint_minutes,
            evaluate=evaluation,
            evaluate_every=config.eval.every * epoch_steps,
            save_evaluated=bool(config.checkpoint_best),
            check=checkpoints.check,
            vote=sharding.maximum_over_hosts(mesh),
        )
        checkpoints.wait()
    return Result(done, last_step, stop.signal if done < last_step else None)


def _calls_from_host(config, mesh, source, size: int, first: int, bad_images: BadImages) -> Iterator[loop.Call]:
    """Yields batches as this host reads them, one at a time."""
    batches = training_batches(
        source,
        config.batch_size,
        seed=config.seed,
        start=first,
        size=size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=config.data.workers,
        processes=config.data.processes,
        bad_images=bad_images,
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield loop.Call(sharding.put_batch(mesh, batch))


def _calls_on_devices(config: Config, mesh, copies: Copies, first: int, last_step: int) -> Iterator[loop.Call]:
    """Yields which images the next batches are; the images lie on the devices."""
    most = config.steps_per_call
    epoch_steps = steps_per_epoch(copies.count, config.batch_size)
    counts = loop.counts(first, last_step, most, config.checkpoint_every, config.eval.every * epoch_steps)
    batches = on_device_batches(copies, config.batch_size, counts, most, seed=config.seed, start=first)
    for batch, count in batches:
        yield loop.Call(sharding.place_everywhere(mesh, batch), count)


def _side(config: Config, source, size: int, mesh) -> int:
    """Returns the side of the copies that the devices hold; they fit there."""
    side = copies_side(source, config.data.image_size, config.data.cache_size)
    on_device.check_memory(size, side, memory.of_device(mesh))
    return side


def _read_all(config: Config, source, size: int, side: int, bad_images: BadImages, progress):
    """Reads the whole data set; see `read_all`."""
    progress.message(f"Reading {size:,} images of {side} px, to be held on the devices")
    begun = time.perf_counter()
    pixels, copies = read_all(source, size, side, threads=config.data.workers, bad_images=bad_images)
    progress.message(f"Read {pixels.nbytes / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s.")
    return pixels, copies


class _Evaluation:
    """An evaluation that remembers what it measured last.

    Args:
      evaluate: `(state) -> record`; `measures` names the fields of a record.
      best: the name that must be in the record; empty: none.

    Raises:
      UsageError: if it is not.
    """

    def __init__(self, evaluate: "OnlineEvaluation", best: str):
        if best and best not in evaluate.measures:
            raise UsageError(f"checkpoint_best={best!r}: expected one of {', '.join(evaluate.measures)}")
        self._evaluate = evaluate
        self._step, self._found = None, None

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        self._step, self._found = int(state.step), self._evaluate(state)
        return self._found

    def found_at(self, step: int) -> Mapping[str, float] | None:
        """Returns what was measured at that step; None: nothing."""
        return self._found if step == self._step else None


@contextlib.contextmanager
def _failures_of_the_disk(workdir: pathlib.Path) -> Iterator[None]:
    """Says in one line that something cannot be written while the run is on."""
    try:
        yield
    except OSError as error:
        if (mistake := name_too_long(error)) is not None:
            raise mistake from None
        where = f" {error.filename}" if error.filename else ""
        raise RunError(
            f"the workdir {workdir} cannot be written to, or the images cannot be read ({error.strerror or error}"
            f"{where}); what was saved is intact, and the same command goes on from the last checkpoint"
        ) from error
