"""The pre-training loop: from a config and a working directory to a trained encoder.

How a run starts, in the order in which it is decided:

1. The working directory holds a checkpoint: go on from the newest that can be read, with the next step. The config must
   be the run's own.
2. It holds none, and `init_from` names weights: start with them, at step 0.
3. Neither: start afresh.

Of several hosts each decides the same, or all end before the first step: what they must agree on is compared.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np

import ifm_jax
from ifm_jax import assembly, checkpoint, loop, metrics, sharding, snapshot
from ifm_jax import config as configs
from ifm_jax.checkpoint import Checkpoints
from ifm_jax.config import Config
from ifm_jax.data import BadImages, Source, open_source, steps_per_epoch, training_batches
from ifm_jax.errors import RunError, UsageError
from ifm_jax.snapshot import CHECKPOINTS, CONFIG, CONVERTED, Snapshot
from ifm_jax.state import TrainState, placements

Answer = TypeVar("Answer")

# Seconds until a file that process 0 has written is visible to the others: NFS remembers for a while that it was not.
_SHARED_WITHIN = 70.0
# What each host may have of its own: where its images lie, and with what it reads them.
_HOSTS_OWN = ("data.source", "data.classes", "data.workers", "data.processes")

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
    workdir = pathlib.Path(workdir).absolute()
    with _failures_of_the_disk(workdir):
        return _train(config, workdir, sharding.make_mesh(devices), quiet)


def _train(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh, quiet: bool) -> Result:
    config, source = _together(lambda: _open(config, workdir, mesh), lambda opened: _identity(*opened))
    size = min(config.data.limit, len(source)) if config.data.limit else len(source)
    epoch_steps = steps_per_epoch(size, config.batch_size)
    evaluation = None
    if config.eval.every:
        from ifm_jax.evaluation.online import OnlineEvaluation  # with scikit-learn, for those who ask for it

        evaluation = _Evaluation(OnlineEvaluation(config, mesh), config.checkpoint_best)
    # Process 0 makes it, then all look.
    _together(lambda: _open_workdir(workdir, config, source))
    create = assembly.state_creator(config)
    (stored, damaged), given = _together(lambda: _find_start(workdir, config, create), lambda found: _start_of(*found))
    primary = jax.process_index() == 0
    said = _together(lambda: _set_aside(workdir, damaged) if primary else [])
    total_steps = config.epochs * epoch_steps
    last_step = min(config.steps, total_steps) if config.steps else total_steps

    with contextlib.ExitStack() as stack:
        first = int(stored.step) if stored is not None else 0
        if first >= last_step:
            if not quiet and primary:
                print(*said, f"Nothing to do: {workdir} holds step {first} of {last_step}.", sep="\n")
            return Result(first, last_step)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / CHECKPOINTS, config.checkpoint_keep, config.checkpoint_best)
        )
        # Everything a step reads lies on the devices as the step wants it, from the start.
        placement = placements(mesh, config.moco.queue_sharded)
        if stored is None and given is None:
            train_state = jax.jit(create, out_shardings=placement)()
        else:
            if stored is None:
                stored, notes = _started_with(given, jax.device_get(jax.jit(create)()))
                said += [f"Starting with {config.init_from}: {'; '.join(notes)}."]
            train_state = TrainState(*map(sharding.place, stored, placement))
        stored = given = None  # their memory

        log = tensorboard = None
        if primary:
            log = stack.enter_context(metrics.MetricsLog(workdir / "metrics.jsonl", first))
            tensorboard = stack.enter_context(metrics.TensorBoardLog(workdir / "tensorboard", first))
        progress = stack.enter_context(
            metrics.Progress(last_step, epochs=config.epochs, start_step=first, steps_per_epoch=epoch_steps)
            if primary and not quiet
            else metrics.Silence()
        )
        for line in said:
            progress.message(line)
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
            bad_images=BadImages(size, config.data.max_bad, workdir / _bad_images_file(), progress.message),
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
            save=lambda state: checkpoints.save(
                state, configs.to_dict(config), evaluation.found_at(int(state.step)) if evaluation else None
            ),
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            checkpoint_seconds=60.0 * config.checkpoint_minutes,
            evaluate=evaluation,
            evaluate_every=config.eval.every * epoch_steps,
            save_evaluated=bool(config.checkpoint_best),
            check=checkpoints.check,
            vote=sharding.maximum_over_hosts(mesh),
        )
        checkpoints.wait()
    return Result(step, last_step, stop.signal if step < last_step else None)


def _bad_images_file() -> str:
    """Returns the name of the list of images that this host could not read; every host meets others."""
    number = jax.process_index()
    return f"bad_images.{number}.txt" if number else "bad_images.txt"


def _open(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[Config, Source]:
    """Returns the resolved config and the images; JAX is configured.

    Raises:
      UsageError: for a config that cannot be run.
    """
    configs.validate(config, devices=mesh.size)
    config = assembly.resolve(config, assembly.read_config(workdir) if (workdir / CONFIG).exists() else None)
    assembly.configure_jax(config.model.compute_dtype)
    assembly.make_augmentation(config)
    # The images before the workdir: one made for a mistaken folder would refuse the right one.
    source = open_source(config.data, "train")
    if (workdir / CONVERTED).exists() and (missing := snapshot.read(workdir).missing):
        raise UsageError(
            f"workdir {workdir} holds a converted checkpoint without {', '.join(missing)}: nothing to go on from; "
            "expected a complete one (query and key encoder, queue)"
        )
    return config, source


def _identity(config: Config, source: Source) -> dict[str, Any]:
    """Returns what all hosts must have in common: code, config, images."""
    values = configs.flatten(configs.to_dict(config))
    return {
        "ifm_jax": ifm_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        **{name: value for name, value in values.items() if name not in _HOSTS_OWN},
        "images of data.source": len(source),
        "fingerprint of data.source": source.fingerprint,
    }


def _together(action: Callable[[], Answer], facts: Callable[[Answer], Mapping[str, Any]] = lambda _: {}) -> Answer:
    """Does a part of the start on every host, and ends all of them if one cannot, or if they find different facts.

    Args:
      action: of this host.
      facts: what its answer must have in common with the others', by name, as JSON.

    Returns:
      This host's answer.

    Raises:
      UsageError: this host's, or another's, or one that names the facts that differ.
    """
    if jax.process_count() == 1:
        return action()
    try:
        answer = action()
        mine = {"facts": dict(facts(answer))}
    except (UsageError, OSError) as error:
        mine = {"error": str(error)}
    every = [json.loads(text) for text in sharding.gather_text(json.dumps(mine))]
    if "error" in mine:
        raise UsageError(mine["error"])
    differing = []
    for number, other in enumerate(every):
        if "error" in other:
            raise UsageError(f"process {number} cannot start: {other['error']}")
        theirs, ours = other["facts"], every[0]["facts"]
        differing += [
            f"{name}: {ours.get(name)!r} on process 0, {theirs.get(name)!r} on process {number}"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]
    if differing:
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UsageError(
            f"the processes differ in {'; '.join(differing[:5])}{more}: start all of them with the same command, code "
            "and images"
        )
    return answer


def _find_start(
    workdir: pathlib.Path, config: Config, create: Callable[[], TrainState]
) -> tuple[tuple[TrainState | None, dict[int, str]], Snapshot | None]:
    """Returns what the workdir holds, as `checkpoint.newest_whole`, and where that is nothing, what `init_from` does.

    Raises:
      UsageError: if what is there cannot be read, or `init_from` is another network's.
    """
    deadline = time.monotonic() + _SHARED_WITHIN
    while not (workdir / CONFIG).exists():
        if time.monotonic() > deadline:
            raise UsageError(
                f"workdir {workdir} is not the one that process 0 has made: expected a directory on storage that all "
                "processes share"
            )
        time.sleep(1.0)
    stored, damaged = checkpoint.newest_whole(workdir / CHECKPOINTS, jax.eval_shape(create))
    if stored is not None or not config.init_from:
        return (stored, damaged), None
    from ifm_jax import torch_checkpoint

    given = torch_checkpoint.read(config.init_from)
    # The head and the queue may be another's; they are made anew then.
    fitted = configs.from_dict(configs.to_dict(config))
    for name in ("dim", "mlp", "queue_size"):
        setattr(fitted.moco, name, getattr(given.config.moco, name))
    snapshot.check_config(fitted, given, config.init_from)
    return (None, damaged), given


def _start_of(stored: tuple[TrainState | None, dict[int, str]], given: Snapshot | None) -> dict[str, Any]:
    """Returns what all hosts must have found in the workdir."""
    state, damaged = stored
    return {
        "step of the checkpoint in the workdir": None if state is None else int(state.step),
        "damaged checkpoints": sorted(damaged),
        "step of init_from": given and int(given.state.step),
    }


def _set_aside(workdir: pathlib.Path, damaged: Mapping[int, str]) -> list[str]:
    """Moves damaged checkpoints out of the way; returns what the user is told."""
    said = []
    for step, reason in damaged.items():
        moved = checkpoint.set_aside(workdir / CHECKPOINTS, step)
        said.append(f"The checkpoint of step {step} is damaged ({reason}): moved to {moved}.")
    return said


def _started_with(given: Snapshot, fresh: TrainState) -> tuple[TrainState, list[str]]:
    """Returns the state that a new run starts with the weights of another in, and in words what of them it has taken.

    Args:
      given: at least the backbone of a query encoder of the same architecture.
      fresh: a new run's state, NumPy arrays; whatever `given` lacks, or has in other shapes, is from here.
    """

    def cast(tree, like):
        return jax.tree.map(lambda x, y: np.asarray(x, y.dtype), tree, like)

    def shapes(tree):
        return jax.tree.map(np.shape, tree)

    state, taken = given.state, ["query encoder"]
    head = shapes(state.params.get("fc")) == shapes(fresh.params["fc"])
    if not head:
        taken = ["query encoder without its head (a new one)"]
    fc = {"fc": (state if head else fresh).params["fc"]}
    params = cast({**state.params, **fc}, fresh.params)
    batch_stats = cast(state.batch_stats, fresh.batch_stats)
    if head and state.key_params is not None:
        key_params = cast(state.key_params, fresh.key_params)
        key_batch_stats = cast(state.key_batch_stats, fresh.key_batch_stats)
        taken.append("key encoder")
    else:
        key_params, key_batch_stats = params, batch_stats
        taken.append("key encoder (a copy of the query encoder)")
    queue, queue_ptr = fresh.queue, fresh.queue_ptr
    if head and state.queue is not None and np.shape(state.queue) == np.shape(fresh.queue):
        queue, queue_ptr = cast(state.queue, fresh.queue), cast(state.queue_ptr, fresh.queue_ptr)
        taken.append("queue")
    else:
        taken.append("a new queue")
    return (
        fresh._replace(
            params=params,
            batch_stats=batch_stats,
            key_params=key_params,
            key_batch_stats=key_batch_stats,
            queue=queue,
            queue_ptr=queue_ptr,
        ),
        taken,
    )


class _Evaluation:
    """An evaluation that remembers what it found last.

    Args:
      evaluate: `(state) -> record`.
      best: the name that must be in the record; empty: none.
    """

    def __init__(self, evaluate: Callable[[TrainState], Mapping[str, float]], best: str):
        self._evaluate, self._best = evaluate, best
        self._step, self._found = None, None

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        found = self._evaluate(state)
        if self._best and self._best not in found:
            raise UsageError(f"checkpoint_best={self._best!r}: expected one of {', '.join(found)}")
        self._step, self._found = int(state.step), found
        return found

    def found_at(self, step: int) -> Mapping[str, float] | None:
        """Returns what was found at that step; None: nothing."""
        return self._found if step == self._step else None


@contextlib.contextmanager
def _failures_of_the_disk(workdir: pathlib.Path) -> Iterator[None]:
    """Says in one line that something cannot be written while the run is on."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise RunError(
            f"the workdir {workdir} cannot be written to, or the images cannot be read ({error.strerror or error}"
            f"{where}); what was saved is intact, and the same command goes on from the last checkpoint"
        ) from error


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
        for leftover in workdir.glob("*.*.tmp"):  # of a process that died as it wrote one of these files
            leftover.unlink(missing_ok=True)
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
