"""A stored training state: the arrays on the host, the config, and the known history.

Saved runs and converted PyTorch checkpoints share this form. A converted checkpoint is written as the working directory
of a run, so that all code that reads a run reads it too:

    DIR/config.json           the config; architecture, head, dim and K as the tensors have them
    DIR/checkpoints/<step>/   Orbax
    DIR/converted.json        the `Origin`: facts of the file that a training state does not hold
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.methods import METHODS
from ifm_jax.methods.method import Tree
from ifm_jax.pretrain import TrainState
from ifm_jax.runs import checkpoint, metrics_log
from ifm_jax.runs.checkpoint import Checkpoints
from ifm_jax.runs.workdir import Workdir

# NumPy arrays. The optimizer's part is nested dicts and may be missing; so may parts of the memory.
StateAtRest = TrainState[np.ndarray | np.generic, Tree, Tree | None, Any]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of a converted checkpoint.

    Attributes:
      file: name of the file, without its directory.
      kind: "moco" (query encoder and more) or "torchvision" (one network, `fc` its classifier).
      epoch: epochs done, according to the file.
      step: updates done at conversion.
      lr: the optimizer's last learning rate; None: the file holds no optimizer.
      num_batches_tracked: PyTorch's counters at conversion, under their names; they advance with `step`.
    """

    file: str
    kind: str
    epoch: int | None
    step: int
    lr: float | None
    num_batches_tracked: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A training state on the host; `None` for each missing part.

    Attributes:
      config: config of the run; for a PyTorch file, the defaults with what its tensors show.
      state: NumPy arrays; `opt_state` as nested dicts.
      origin: origin of a converted checkpoint.
      steps_per_epoch: updates in an epoch, if known.
      notes: remarks for the user who reads the file, one sentence each.
    """

    config: Config
    state: StateAtRest
    origin: Origin | None = None
    steps_per_epoch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def epoch(self) -> int | None:
        """Whole epochs done, or None if unknown."""
        step = int(self.state.step)
        if self.origin and self.origin.step == step and self.origin.epoch is not None:
            return self.origin.epoch
        if self.steps_per_epoch:
            return step // self.steps_per_epoch
        return 0 if step == 0 else None

    @property
    def missing(self) -> list[str]:
        """The missing parts of a training state, in words."""
        head = [] if "fc" in self.state.params else ["projection head"]
        optimizer = ["optimizer state"] if self.state.opt_state is None else []
        return head + METHODS[self.config.method].missing(self.state.memory) + optimizer


_BACKBONE = ("model.arch", "model.stem", "model.width")
_HEADS = {"moco": ("moco.dim", "moco.mlp"), "simclr": ("simclr.dim", "simclr.head")}


def structure(config: Config, backbone: bool = False) -> dict[str, Any]:
    """Returns the config fields that the shapes of the tensors determine, by name.

    Args:
      config: config of a run.
      backbone: return only the fields of the backbone.
    """
    flat = configs.flatten(configs.to_dict(config))
    names = _BACKBONE
    if not backbone:
        names += ("method", *_HEADS[config.method], *(["moco.queue_size"] if config.method == "moco" else []))
    return {name: flat[name] for name in names}


def check_config(config: Config, snapshot: Snapshot, path: str | os.PathLike[str], backbone: bool = False) -> None:
    """Checks that a config describes the tensors of a snapshot.

    Args:
      config: config to check.
      snapshot: snapshot whose tensors it must describe.
      path: path of the snapshot, for the error.
      backbone: check only the backbone.

    Raises:
      UsageError: if it does not; the message names every field that differs.
    """
    given, found = structure(config, backbone), structure(snapshot.config, backbone)
    unknown = {"moco.queue_size"} if "queue" in snapshot.missing else set()
    if "projection head" in snapshot.missing:
        # A backbone alone does not reveal its method.
        unknown |= {"method", *(name for names in _HEADS.values() for name in names), "moco.queue_size"}
    wrong = [
        f"{name}={given[name]!r}, but the tensors have {found.get(name)!r}"
        for name in given
        if given[name] != found.get(name)
    ]
    given_channels, found_channels = (configs.channels(of.data) for of in (config, snapshot.config))
    if given_channels != found_channels:
        wrong.append(
            f"data.source={config.data.source!r} has {given_channels} channels, but the network takes {found_channels}"
        )
    wrong = [text for text in wrong if text.split("=")[0] not in unknown]
    if wrong:
        raise UsageError(
            f"the config does not fit {path} ({'; '.join(wrong)}): correct these fields, or leave out those that "
            "follow from the tensors"
        )


def read_run(path: str | os.PathLike[str]) -> Snapshot:
    """Returns the newest readable state in a run's working directory, or the state in one of its checkpoints.

    Args:
      path: the working directory, its `checkpoints`, or `checkpoints/<step>`.

    Returns:
      The snapshot; its `notes` name damaged checkpoints that were skipped.

    Raises:
      UsageError: if there is no state, or none can be read.
    """
    path = pathlib.Path(path).absolute()
    notes: list[str] = []
    if _is_checkpoint(path):
        workdir = path.parent.parent
        try:
            stored = checkpoint.read(path)
        except Exception as error:  # a damaged checkpoint can make Orbax raise anything
            raise UsageError(
                f"{path}: the checkpoint cannot be read ({type(error).__name__}: {checkpoint.first_line(error)}): "
                "name another one, or the workdir to use its newest whole one"
            ) from None
    else:
        directory = _checkpoints(path)
        workdir = directory.parent
        stored, damaged = checkpoint.newest_whole(directory)
        if stored is None:
            raise UsageError(f"{directory} has no complete checkpoint yet: let the run save its first")
        notes = [
            f"the checkpoint of step {step} is damaged ({reason}): step {int(stored.state['step'])} is used instead"
            for step, reason in damaged.items()
        ]
    config = configs.from_dict(stored.config)
    memory = METHODS[config.method].memory
    try:
        state: StateAtRest = TrainState(**checkpoint.nested(stored.state, getattr(memory, "_fields", ())))
        state = state._replace(memory=memory(**state.memory))
    except TypeError:
        raise UsageError(
            f"{path} contains {', '.join(list(stored.state)[:5])}: expected the state of a pre-training run"
        ) from None
    origin = _read_origin(Workdir(workdir).converted)
    return Snapshot(config, state, origin, _steps_per_epoch(workdir, origin), tuple(notes))


def _is_checkpoint(path: pathlib.Path) -> bool:
    return (path / "state").is_dir() and (path / "config").is_dir()


def _checkpoints(path: pathlib.Path) -> pathlib.Path:
    """Returns the checkpoint directory to which `path` refers."""
    if not path.exists():
        raise UsageError(f"{path} does not exist: expected the workdir of a run, one of its checkpoints, or a .pth.tar")
    inside = Workdir(path).checkpoints
    directory = inside if inside.is_dir() else path
    if directory.name == inside.name:
        return directory
    raise UsageError(f"{path} has no checkpoints: expected the workdir of a run, or one of its checkpoints")


def _read_origin(path: pathlib.Path) -> Origin | None:
    values = files.read_json(path, "convert the checkpoint again")
    if values is None:
        return None
    try:
        return Origin(**values)
    except TypeError as error:
        raise UsageError(f"{path} cannot be read ({error}): convert the checkpoint again") from None


def _steps_per_epoch(workdir: pathlib.Path, origin: Origin | None) -> int | None:
    """Returns the updates in an epoch according to a run's metrics, or else to the converted file."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, IndexError, ZeroDivisionError, TypeError):
        last = metrics_log.read(Workdir(workdir).metrics)[-1]
        return round(last["step"] / last["epoch"])
    return steps_in_epoch(origin.epoch, origin.step) if origin else None


def steps_in_epoch(epoch: int | None, step: int) -> int | None:
    """Returns the updates in an epoch, if `step` updates make `epoch` whole epochs."""
    return step // epoch if epoch and step and step % epoch == 0 else None


def write(snapshot: Snapshot, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Writes a snapshot as the working directory of a run, first under a temporary name.

    Args:
      snapshot: snapshot to write; parts that are `None` are left out.
      directory: directory to create; it may exist if it is empty.
      overwrite: replace an existing run.

    Raises:
      UsageError: if anything else exists there, or the directory cannot be written.
    """
    directory = pathlib.Path(directory).absolute()
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not overwrite:
        raise UsageError(f"{directory} already exists: name another directory, or pass --overwrite")
    if occupied and not Workdir(directory).checkpoints.is_dir():
        raise UsageError(f"{directory} is not the workdir of a run and is not overwritten: name another directory")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        config = configs.to_dict(snapshot.config)
        with Checkpoints(Workdir(temporary).checkpoints) as checkpoints:
            checkpoints.save(snapshot.state, config)
        files.write_json(Workdir(temporary).config, config)
        if snapshot.origin:
            files.write_json(Workdir(temporary).converted, dataclasses.asdict(snapshot.origin))
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old)
        else:
            temporary.rename(directory)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written ({error.strerror or error}): name a writable directory"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
