"""The pre-training loop: from a config and a working directory to a trained encoder.

How a run starts, in the order in which it is decided:

1. The working directory holds a checkpoint: go on from it, with the next step. The config must be the run's own.
2. It holds none: start afresh.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from typing import Any

import jax

from ifm_jax import assembly, loop, metrics, sharding, snapshot
from ifm_jax import config as configs
from ifm_jax.checkpoint import Checkpoints, abstract_state
from ifm_jax.config import Config
from ifm_jax.data import BadImages, Source, open_source, steps_per_epoch, training_batches
from ifm_jax.errors import UsageError
from ifm_jax.snapshot import CHECKPOINTS, CONFIG, CONVERTED

BAD_IMAGES = "bad_images.txt"  # in a workdir: the images that could not be read
DATA = "data.json"  # in a workdir: which images the run is on


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
    mesh = sharding.make_mesh(devices)
    configs.validate(config, devices=mesh.size)
    workdir = pathlib.Path(workdir).absolute()
    config = assembly.resolve(config, assembly.read_config(workdir) if (workdir / CONFIG).exists() else None)
    assembly.configure_jax(config.model.compute_dtype)
    assembly.make_augmentation(config)
    # The images before the workdir: one made for a mistaken folder would refuse the right one.
    source = open_source(config.data, "train")
    size = min(config.data.limit, len(source)) if config.data.limit else len(source)
    epoch_steps = steps_per_epoch(size, config.batch_size)
    if (workdir / CONVERTED).exists() and (missing := snapshot.read(workdir).missing):
        raise UsageError(
            f"workdir {workdir} holds a converted checkpoint without {', '.join(missing)}: nothing to go on from; "
            "expected a complete one (query and key encoder, queue)"
        )
    evaluation = None
    if config.eval.every:
        from ifm_jax.evaluation.online import OnlineEvaluation  # with scikit-learn, for those who ask for it

        evaluation = OnlineEvaluation(config, mesh)
    _open_workdir(workdir, config, source)
    primary = jax.process_index() == 0
    total_steps = config.epochs * epoch_steps
    last_step = min(config.steps, total_steps) if config.steps else total_steps

    with contextlib.ExitStack() as stack:
        create = assembly.state_creator(config)
        checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS))
        latest = checkpoints.latest_step()
        first = latest or 0
        if first >= last_step:
            if not quiet:
                print(f"Nothing to do: {workdir} holds step {first} of {last_step}.")
            return Result(first, last_step)
        # Everything a step reads lies on the devices as the step wants it, from the start.
        placement = sharding.replicated(mesh)
        train_state = (
            checkpoints.restore(latest, abstract_state(create, placement))
            if latest is not None  # a converted checkpoint may be at step 0
            else jax.jit(create, out_shardings=placement)()
        )

        log = tensorboard = None
        if primary:
            log = stack.enter_context(metrics.MetricsLog(workdir / "metrics.jsonl", first))
            tensorboard = stack.enter_context(metrics.TensorBoardLog(workdir / "tensorboard", first))
        progress = stack.enter_context(
            metrics.Progress(last_step, epochs=config.epochs, start_step=first, steps_per_epoch=epoch_steps)
            if primary and not quiet
            else metrics.Silence()
        )
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
            bad_images=BadImages(size, config.data.max_bad, workdir / BAD_IMAGES, progress.message),
        )
        stack.callback(batches.close)
        batch = sharding.put_batch(mesh, next(batches))

        devices_text = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"
        progress.message(
            f"Compiling the training step ({config.model.arch}, batch {config.batch_size}, {devices_text})"
        )
        begun = time.perf_counter()
        step_fn = assembly.make_step(config, mesh, epoch_steps).jit().lower(train_state, batch).compile()
        progress.message(f"Compiled in {time.perf_counter() - begun:.1f} s.")
        if first:
            progress.message(f"Going on after step {first} of {last_step}.")

        stop = stack.enter_context(loop.StopSignals(progress))
        recorder = loop.Recorder(log, tensorboard, progress, config.batch_size, epoch_steps, workdir / "curves.png")
        step, _ = loop.run(
            step_fn,
            train_state,
            batch,
            lambda: sharding.put_batch(mesh, next(batches)),
            first=first,
            last_step=last_step,
            recorder=recorder,
            stop=stop,
            save=lambda state: checkpoints.save(state, configs.to_dict(config)),
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            evaluate=evaluation,
            evaluate_every=config.eval.every * epoch_steps,
        )
        checkpoints.wait()
    return Result(step, last_step, stop.signal if step < last_step else None)


def _open_workdir(workdir: pathlib.Path, config: Config, source: Source) -> None:
    """Makes the working directory with its config.json and data.json, or checks that it is this run's.

    Raises:
      UsageError: if it cannot be written to, or belongs to a run with another config or on other images.
    """
    if (workdir / CONFIG).exists() and (differing := configs.differences(config, assembly.read_config(workdir))):
        raise UsageError(
            f"workdir {workdir} belongs to a run with another config ({'; '.join(differing)}): "
            "pass another --workdir, or the config it was started with"
        )
    images = {"images": len(source), "fingerprint": source.fingerprint}
    if (known := _read_data(workdir)) and known != images:
        counts = f"{known['images']} then, {images['images']} now"
        raise UsageError(
            f"workdir {workdir} belongs to a run on other images than data.source={config.data.source!r} holds "
            f"({counts if known['images'] != images['images'] else 'as many, others'}): pass another --workdir, or "
            "the images it was started with"
        )
    if jax.process_index() > 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, values in ((CONFIG, configs.to_dict(config)), (DATA, images)):
            temporary = (workdir / name).with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(values, indent=2) + "\n")
            os.replace(temporary, workdir / name)
    except OSError as error:
        raise UsageError(
            f"workdir {workdir} cannot be written to ({error.strerror}): pass the --workdir of a directory that can"
        ) from None


def _read_data(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a run noted of its images when it began; None: nothing yet."""
    path = workdir / DATA
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove it, and its images are not checked") from None
