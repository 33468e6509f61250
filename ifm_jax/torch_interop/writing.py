"""Writes PyTorch checkpoints for the original's scripts, or for torchvision and timm.

PyTorch is imported only when a file is written.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.choices import TARGETS, Target
from ifm_jax.errors import UsageError
from ifm_jax.models import without_head
from ifm_jax.runs import loading
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.torch_interop import torch_file
from ifm_jax.torch_interop.description import describe_architecture, has_momentum, moco_memory, momentum_of
from ifm_jax.torch_interop.names import COUNTER, Tree, architecture_of, encoder_table, get, to_torch_layout

SUFFIXES = (".pth", ".pth.tar", ".pt", ".safetensors")


def state_dict(found: Snapshot) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and values of each tensor in a snapshot, in PyTorch's layout, without `module.`.

    `queue` and `queue_ptr` come first, then the encoders, in the order of the original's module, with batch counters.
    """
    state = found.state
    memory = moco_memory(state)
    if memory.queue is not None:
        yield "queue", np.asarray(memory.queue).T
        yield "queue_ptr", np.asarray(memory.queue_ptr, np.int64).reshape(1)
    prefix = "encoder_q." if found.origin is None or found.origin.kind == "moco" else ""
    yield from _encoder_tensors(found, state.params, state.batch_stats, prefix)
    if memory.key_params is not None and memory.key_batch_stats is not None:
        yield from _encoder_tensors(found, memory.key_params, memory.key_batch_stats, "encoder_k.")


def _encoder_tensors(found: Snapshot, params: Tree, batch_stats: Tree, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    trees = {"params": params, "batch_stats": batch_stats}
    for entry in encoder_table(found.config, head="fc" in params):
        yield prefix + entry.torch, to_torch_layout(np.asarray(get(trees[entry.collection], entry.path)), entry.kind)
        if entry.path[-1] == "var":  # the counter follows the running variance
            name = prefix + entry.torch.replace("running_var", COUNTER)
            yield name, np.asarray(_counter(found, name), np.int64)


def _counter(found: Snapshot, name: str) -> int:
    """Returns a batch counter: the number of training steps, plus the initial value of a converted file."""
    step = int(found.state.step)
    if found.origin is None or name not in found.origin.num_batches_tracked:
        return step
    return found.origin.num_batches_tracked[name] + step - found.origin.step


def to_torch(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: Target = "moco",
    *,
    epoch: int | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> Snapshot:
    """Writes a run's state, or another PyTorch checkpoint's, as a PyTorch checkpoint.

    Args:
      source: workdir of a run or one of its checkpoints.
      path: `.pth`, `.pth.tar` or `.pt`; `.safetensors` holds the tensors alone.
      target: "moco": both encoders, queue and momentum buffers, as the original's code loads them with strict key
        matching, and as MoCo's scripts for linear evaluation and detection (detectron2) read it; "torchvision" and
        "timm": the backbone under torchvision's names, which are timm's too (`timm_folder` writes more for timm).
      epoch: epochs done, for "moco"; None: derived from the run's metrics or the converted file.
      prefix: see `reading.read`, if the source is a PyTorch checkpoint.
      overwrite: replace an existing file.

    Returns:
      The snapshot of the source; its `notes` hold remarks about the written file.

    Raises:
      UsageError: if the source cannot be read or the file cannot be written.
    """
    path = pathlib.Path(path)
    if target not in TARGETS:
        raise UsageError(f"--for={target}: expected one of {', '.join(TARGETS)}")
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"{path}: expected a name that ends in .pth, .pth.tar, .pt or .safetensors")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists: name another file, or pass --overwrite")
    found = loading.read(source, prefix=prefix)
    notes = list(found.notes)
    if target == "moco" and found.config.method != "moco":
        raise UsageError(
            f"--for=moco: {source} is a run with method={found.config.method}, whose state does not fit MoCo's format: "
            "expected --for=torchvision, which writes the backbone"
        )
    if (channels := configs.channels(found.config.data)) != 3:
        raise UsageError(
            f"{source} is a run on data.source={found.config.data.source!r}, whose network takes {channels} channels: "
            "expected a run on images of three, the only ones that PyTorch's formats describe"
        )
    architecture = architecture_of(found.config)
    if found.config.model.stem != "imagenet" or architecture.width != 64 or len(architecture.depths) != 4:
        notes.append(
            f"{describe_architecture(found.config)} is not one of torchvision's networks: the names are torchvision's, "
            "but its classes have other shapes"
        )
    tensors = _moco_tensors(found, notes) if target == "moco" else backbone_tensors(found)
    if path.suffix == ".safetensors":
        if target == "moco" and has_momentum(found):
            notes.append("safetensors stores only named tensors: the momentum buffers are left out")
        write_file(path, lambda file: save_safetensors(tensors, found.config.model.arch, file))
        return dataclasses.replace(found, notes=tuple(notes))
    torch = torch_file.import_torch()
    content: dict[str, Any] = {name: _tensor(values) for name, values in tensors.items()}
    if target == "moco":
        if epoch is None and (epoch := found.epoch) is None:
            epoch = 0
            notes.append("the number of epochs done is unknown: written as epoch 0; --epoch=N changes this")
        content = {
            "epoch": epoch,
            "arch": found.config.model.arch,
            "state_dict": content,
            "optimizer": _optimizer(found, notes),
        }
    write_file(path, lambda file: torch.save(content, file))
    return dataclasses.replace(found, notes=tuple(notes))


def _moco_tensors(found: Snapshot, notes: list[str]) -> dict[str, np.ndarray]:
    if missing := [part for part in found.missing if part != "optimizer state"]:
        notes.append(
            f"the run has no {', '.join(missing)}: the other parts are written; the original's linear evaluation loads "
            "the file, its training code does not"
        )
    named = state_dict(found)
    if found.origin and found.origin.kind == "torchvision":
        named = ((f"encoder_q.{name}", values) for name, values in named)
    return {f"module.{name}": values for name, values in named}


def backbone_tensors(found: Snapshot) -> dict[str, np.ndarray]:
    """Returns the query encoder under torchvision's names, in PyTorch's layout; only a classifier's `fc` is kept."""
    if found.origin and found.origin.kind == "torchvision":
        return dict(state_dict(found))
    params, batch_stats = without_head(found.state.params), without_head(found.state.batch_stats)
    named = _encoder_tensors(found, params, batch_stats, "encoder_q.")
    return {name.removeprefix("encoder_q."): values for name, values in named}


def _tensor(values: np.ndarray):
    # A copy in PyTorch's order, so that the file is ordinary and no view of the source.
    return torch_file.import_torch().from_numpy(np.array(values, order="C"))


def _optimizer(found: Snapshot, notes: list[str]) -> Tree:
    """Returns the state dict of `torch.optim.SGD`: all parameters have numbers, the query encoder's have buffers."""
    config, state = found.config, found.state
    parameters = [e for e in encoder_table(config, head="fc" in state.params) if e.collection == "params"]
    buffers: dict[int, dict[str, Any]] = {}
    if config.optim.name != "sgd":
        notes.append(f"the optimizer is {config.optim.name}, but the original's is SGD: its state is left out")
    elif state.opt_state is not None:
        trace = momentum_of(state)
        values = [np.asarray(get(trace, entry.path)) for entry in parameters]
        # Before the first step PyTorch has no buffers.
        if any(value.any() for value in values):
            buffers = {
                number: {"momentum_buffer": _tensor(to_torch_layout(value, entry.kind))}
                for number, (entry, value) in enumerate(zip(parameters, values, strict=True))
            }
    lr = config.optim.lr
    if found.origin and found.origin.lr is not None and found.origin.step == int(state.step):
        lr = found.origin.lr
    group = {
        "lr": lr,
        "momentum": config.optim.momentum,
        "dampening": 0,
        "weight_decay": config.optim.weight_decay,
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "params": list(range(len(parameters) * (1 if moco_memory(state).key_params is None else 2))),
    }
    return {"state": buffers, "param_groups": [group]}


def save_safetensors(tensors: dict[str, np.ndarray], arch: str, file: pathlib.Path) -> None:
    """Writes named tensors, with the architecture's name as metadata.

    Args:
      tensors: name -> values, in PyTorch's layout.
      arch: name of the architecture, one of `models.ARCHITECTURES`.
      file: path of the file.

    Raises:
      UsageError: if safetensors is not installed.
      OSError: if the file cannot be written.
    """
    try:
        import safetensors.numpy
    except ImportError:
        raise UsageError("writing .safetensors requires its library: pip install safetensors") from None
    tensors = {name: np.array(values, order="C") for name, values in tensors.items()}
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt", "arch": arch})
    except safetensors.SafetensorError as error:  # a full disk among others
        raise OSError(str(error)) from None


def write_file(path: pathlib.Path, save: Callable[[pathlib.Path], Any]) -> None:
    """Saves under a temporary name, then renames; the file has the permissions of any new file.

    Args:
      path: path of the file; missing folders are created.
      save: writes the file under the path that it gets.

    Raises:
      UsageError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777
            save(temporary)
            temporary.chmod(mode)  # safetensors creates a new file that only its owner can read
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be written ({reason}): name a writable file") from None
