"""Reads PyTorch checkpoints.

It reads the original's training checkpoints (MoCo v1 and v2, IFM; complete, or stripped to the query encoder like the
released MoCo files), torchvision's ResNet state dicts, and both of these inside another library's checkpoint, under a
prefix of the names. The names and shapes of the tensors alone tell what a file holds; `torch_file` reads it without
executing anything.
"""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import optax

from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.methods import MoCoMemory
from ifm_jax.models import ARCHITECTURES, Stem
from ifm_jax.pretrain import TrainState
from ifm_jax.runs import snapshot
from ifm_jax.runs.snapshot import Origin, Snapshot
from ifm_jax.torch_interop import torch_file
from ifm_jax.torch_interop.description import MemoryAtRest
from ifm_jax.torch_interop.names import (
    COUNTER,
    KERNEL_OF_STEM,
    MOST_STEPS,
    Entry,
    Tree,
    backbone_table,
    counters,
    encoder_table,
    set_,
    to_jax_layout,
)
from ifm_jax.torch_interop.torch_file import Unusable

# Keys under which checkpoints keep a state dict, and prefixes of the trained network in other libraries' modules.
_HOLDERS = ("state_dict", "model", "model_state_dict", "backbone")
_PREFIXES = ("backbone.", "encoder.", "model.", "model.backbone.", "model.encoder.")
# The children of torchvision's ResNet that hold tensors, by number, their only names in an `nn.Sequential`.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def read(path: str | os.PathLike[str], step: int | None = None, prefix: str = "") -> Snapshot:
    """Reads a PyTorch checkpoint into a snapshot.

    The arrays of a file in PyTorch's current (zip) format stay on disk until they are used.

    The state dict is the file itself, or its entry `state_dict`, `model`, `model_state_dict` or `backbone`; `module.`
    before a name is ignored. The network's names may have a prefix (`backbone.conv1.weight`), or be an
    `nn.Sequential`'s (`backbone.0.weight`, ..., `backbone.7.1.bn2.weight`: torchvision's children by number). If a file
    holds only one network, or only one of several under a usual prefix (`backbone.`, `encoder.`, `model.`), that one is
    read, with a note.

    Args:
      path: path of a `.pth`, `.pth.tar` or `.safetensors` file.
      step: updates done when the file was saved; None: the value of its batch counters, which the original increases by
        one per step, or 0 without counters.
      prefix: what the names of the network begin with, or those of the whole MoCo (`model.` for
        `model.encoder_q.conv1.weight`); "": detected as above. Other tensors are ignored, with a note.

    Raises:
      UsageError: if the file cannot be read without executing code or holds no ResNet, or if tensors are missing,
        unexpected or mis-shaped (all of them in one message).
    """
    path = pathlib.Path(path)
    if step is not None and not 0 <= step <= MOST_STEPS:
        raise UsageError(f"step={step}: expected a number from 0 to {MOST_STEPS}")
    return _Reader(path, torch_file.read(path), prefix).snapshot(step)


def _alike(names: Iterable[str]) -> list[str]:
    """Returns the architectures whose blocks have tensors of these names."""
    blocks = {tuple(name.split(".")[:2]) for name in names if name.startswith("layer")}
    depths = tuple(sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5))
    bottleneck = any(name.endswith(".conv3.weight") for name in names)
    return [
        name
        for name, architecture in ARCHITECTURES.items()
        if architecture.bottleneck == bottleneck and architecture.depths == depths[: len(architecture.depths)]
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | Unusable)


def _networks(names: Iterable[str]) -> dict[str, bool]:
    """Returns the prefixes under which a state dict holds a ResNet, and for each whether it is an `nn.Sequential`."""
    names = set(names)
    found: dict[str, bool] = {}
    layouts = (("layer1.0.conv1.weight", "conv1.weight", False), ("4.0.conv1.weight", "0.weight", True))
    for block, stem, numbered in layouts:
        for name in names:
            prefix = name.removesuffix(block)
            if name.endswith(block) and (not prefix or prefix.endswith(".")) and prefix + stem in names:
                found.setdefault(prefix, numbered)
    return dict(sorted(found.items()))


def _named_by_child(tensors: dict[str, Any]) -> dict[str, Any]:
    """Renames the tensors of an `nn.Sequential` of torchvision's children to torchvision's names."""
    split = {name: name.partition(".") for name in tensors}
    return {f"{_CHILDREN.get(number, number)}.{rest}": tensors[name] for name, (number, _, rest) in split.items()}


def _whole(value: Any) -> int | None:
    """Returns the value of a tensor that holds a single integer, or None for other tensors."""
    if not isinstance(value, np.ndarray) or value.size != 1 or value.dtype.kind not in "iuf":
        return None
    number = value.item()
    return int(number) if math.isfinite(number) and number == int(number) else None


def _number(value: Any) -> float | None:
    """Returns an optimizer setting as a number, or None if it is not a number."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else None


class _Reader:
    """Sorts the tensors of a checkpoint, and collects all problems with them before it reports any."""

    def __init__(self, path: pathlib.Path, content: Any, prefix: str):
        self.path = path
        self.notes: list[str] = []
        self._problems: dict[str, list[str]] = collections.defaultdict(list)
        self._content = content if isinstance(content, dict) else {}
        self._arch = arch if isinstance(arch := self._content.get("arch"), str) else None
        tensors = self._within(prefix, self._state_dict(content))
        self._tensors = tensors
        self._counters: dict[str, int] = {}
        self.kind = "moco" if any(name.startswith(("encoder_q.", "encoder_k.")) for name in tensors) else "torchvision"

    def _state_dict(self, content: Any) -> dict[str, Any]:
        """Returns the tensors by name, without `module.`."""
        found = [name for name in _HOLDERS if isinstance(self._content.get(name), dict)]
        found = [name for name in found if any(map(_is_tensor, self._content[name].values()))]
        tensors = self._content[found[0]] if found else self._content
        if not any(map(_is_tensor, tensors.values())):
            keys = _abbreviate(list(map(_printable, self._content)), 5) or type(content).__name__
            raise UsageError(
                f"{self.path} has no state dict (found: {keys}): expected one, alone or under "
                f"{', '.join(map(repr, _HOLDERS))}"
            )
        if len(found) > 1:
            self.notes.append(f"only its entry {found[0]!r} was read; ignored: {', '.join(found[1:])}")
        if others := [_printable(name) for name, value in tensors.items() if not _is_tensor(value)]:
            raise UsageError(
                f"{self.path}: {_abbreviate(others, 4)} in its state dict is not a tensor: expected only tensors"
            )
        if unnamed := [_printable(name) for name in tensors if not isinstance(name, str) or not name.isprintable()]:
            raise UsageError(
                f"{self.path}: {_abbreviate(unnamed, 4)} in its state dict cannot name a tensor: expected printable "
                "text"
            )
        named = {name.removeprefix("module."): value for name, value in tensors.items()}
        if twice := [name for name in tensors if name.startswith("module.") and name[len("module.") :] in tensors]:
            raise UsageError(
                f"{self.path} has {len(twice)} tensors twice, with and without 'module.' ({_abbreviate(twice, 4)}): "
                "expected each once: save the state_dict of one network"
            )
        return named

    def _within(self, prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """Returns the tensors of the network under its own names; adds a note about ignored tensors."""
        given, networks = prefix, _networks(tensors)
        seen = ", ".join(repr(name) for name in networks if name)
        if prefix:
            prefix = f"{prefix.removesuffix('.')}.".removeprefix("module.")
            if not any(name.startswith(prefix) for name in tensors):
                expected = f"one of {seen}" if seen else "the beginning of their names"
                raise UsageError(
                    f"--prefix={given}: no tensor in {self.path} begins with it "
                    f"({_abbreviate(list(tensors), 4)}): expected {expected}"
                )
        elif "conv1.weight" in tensors or any(name.startswith(("encoder_q.", "encoder_k.")) for name in tensors):
            return tensors
        elif len(usual := [name for name in networks if name in _PREFIXES] if len(networks) > 1 else [*networks]) == 1:
            (prefix,) = usual
        elif networks:
            raise UsageError(
                f"{self.path} has {len(networks)} networks, whose tensors begin with {seen}: choose one with --prefix= "
                "of convert_checkpoints.py or eval_linear.py, or prefix= in Python"
            )
        inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        aside = sorted({name.partition(".")[0] for name in tensors if not name.startswith(prefix)})
        if prefix and (aside or not given):
            left = f"; ignored: {_abbreviate(aside, 6)}" if aside else ""
            others = [name for name in networks if not name.startswith(prefix)]
            more = f" (--prefix={others[0]} reads that network instead)" if others else ""
            self.notes.append(f"the network whose tensors begin with {prefix!r} was read{left}{more}")
        if networks.get(prefix):
            inside = _named_by_child(inside)
        first = inside.get("conv1.weight")
        if prefix and isinstance(first, np.ndarray) and first.shape[-1:] == (KERNEL_OF_STEM["small"],):
            self.notes.append(
                "the first convolution, 3x3, is assumed to have padding 1; solo-learn's for CIFAR has 2: pad the "
                "images of such a network with one more pixel of zeros on every side"
            )
        return inside

    def snapshot(self, step: int | None) -> Snapshot:
        query = self._tensors
        key: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        if self.kind == "moco":
            query, key, rest = self._part("encoder_q."), self._part("encoder_k."), self._others()
        if not query:
            raise UsageError(f"{self.path} has no query encoder: expected tensors encoder_q.*")
        config = Config()
        self._read_structure(config, query)
        table = encoder_table(config, head=any(name.startswith("fc.") for name in query))

        prefix = "encoder_q." if self.kind == "moco" else ""
        params, batch_stats = self._encoder(query, table, prefix)
        key_params, key_batch_stats = self._encoder(key, table, "encoder_k.") if key else (None, None)
        queue, queue_ptr = self._queue(config, rest)
        momentum = self._momentum(config, table)
        self._raise_problems(config)

        complete = key_params is not None and queue is not None
        epoch = self._content.get("epoch")
        epoch = epoch if isinstance(epoch, int) and 0 <= epoch <= MOST_STEPS else None
        if step is None:
            step = self._step(epoch) if complete else 0
        trace = momentum
        if momentum is None and complete:  # a buffer that was never set acts as zeros
            trace = _map(np.zeros_like, params)
        opt_state = trace and flax.serialization.to_state_dict((optax.EmptyState(), optax.TraceState(trace)))
        if params["conv1"]["kernel"].dtype == np.float64:
            config.model.compute_dtype = "float64"
        memory: MemoryAtRest = MoCoMemory(key_params, key_batch_stats, queue, queue_ptr)
        state: snapshot.StateAtRest = TrainState(np.int32(step), params, batch_stats, opt_state, memory)
        origin = Origin(self.path.name, self.kind, epoch, step, _number(self._group().get("lr")), self._counters)
        steps_per_epoch = snapshot.steps_in_epoch(epoch, step)
        return Snapshot(config, state, origin, steps_per_epoch, tuple(self.notes))

    def _part(self, prefix: str) -> dict[str, Any]:
        return {name[len(prefix) :]: value for name, value in self._tensors.items() if name.startswith(prefix)}

    def _others(self) -> dict[str, Any]:
        rest = {n: v for n, v in self._tensors.items() if not n.startswith(("encoder_q.", "encoder_k."))}
        self._problems["unexpected"] += [name for name in rest if name not in ("queue", "queue_ptr")]
        return rest

    def _read_structure(self, config: Config, query: dict[str, Any]) -> None:
        """Sets architecture, stem, width, head and dim from the shapes of the query encoder."""
        first = query.get("conv1.weight")
        if not isinstance(first, np.ndarray) or first.ndim != 4:
            raise UsageError(
                f"{self.path} has no ResNet (tensors: {_abbreviate(list(query), 4)}): "
                "expected torchvision's names, conv1.weight, bn1.weight, layer1.0.conv1.weight and so on"
            )
        width = int(first.shape[0])
        stems = [stem for stem, size in KERNEL_OF_STEM.items() if size == first.shape[-1]]
        stem: Stem = stems[0] if stems else "imagenet"
        shapes = {name: getattr(value, "shape", None) for name, value in query.items() if not name.startswith("fc.")}

        def distance(name: str) -> tuple[int, bool]:
            table = backbone_table(ARCHITECTURES[name]._replace(width=width), stem)
            wrong = {(entry.torch, entry.shape) for entry in table} ^ {
                item for item in shapes.items() if not item[0].endswith(COUNTER)
            }
            return len(wrong), name != self._arch

        # The nearest architecture; missing or extra tensors are reported later.
        # A ResNeXt this narrow has no channels in its groups.
        exist = [name for name, one in ARCHITECTURES.items() if width * one.width_per_group >= 64]
        alike = _alike(shapes)
        arch = min([name for name in exist if name in alike] or exist or ARCHITECTURES, key=distance)
        config.model.arch, config.model.stem = arch, stem
        config.model.width = 0 if width == ARCHITECTURES[arch].width else width
        if self._arch in ARCHITECTURES and self._arch != arch:
            self.notes.append(
                f"the file says {self._arch}, but its tensors are those of {arch}: they are read as {arch}"
            )

        for name, mlp in (("fc.2.weight", True), ("fc.weight", False)):
            if len(getattr(query.get(name), "shape", ())) == 2 and query[name].shape[0]:
                config.moco.dim, config.moco.mlp = int(query[name].shape[0]), mlp
                break

    def _encoder(self, tensors: dict[str, Any], table: list[Entry], prefix: str) -> tuple[Tree, Tree]:
        """Returns `(params, batch_stats)` of an encoder, views of the file where possible."""
        trees: dict[str, Tree] = {"params": {}, "batch_stats": {}}
        for entry in table:
            if entry.torch not in tensors:
                self._problems["missing"].append(prefix + entry.torch)
                continue
            values = self._array(prefix + entry.torch, tensors[entry.torch], entry.shape)
            if values is not None:
                set_(trees[entry.collection], entry.path, to_jax_layout(values, entry.kind))
        of_counters = [name for name in counters(table) if name in tensors]
        for name in of_counters:
            number = _whole(tensors[name])
            if number is None or not 0 <= number <= MOST_STEPS:
                self._problems["wrong"].append(f"{prefix}{name} (expected one number from 0 to {MOST_STEPS})")
            else:
                self._counters[prefix + name] = number
        known = {entry.torch for entry in table} | set(of_counters)
        self._problems["unexpected"] += [prefix + name for name in tensors if name not in known]
        return trees["params"], trees["batch_stats"]

    def _array(self, name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """Returns a tensor as a float32 or float64 array; notes a problem and returns None if it is wrong."""
        if not isinstance(values, np.ndarray) or not jnp.issubdtype(values.dtype, np.floating):
            what = values.dtype if isinstance(values, np.ndarray) else getattr(values, "what", type(values).__name__)
            self._problems["of a wrong type"].append(f"{name} ({what}, expected floating point)")
            return None
        if values.shape != shape:
            self._problems["mis-shaped"].append(f"{name} {values.shape}, expected {shape}")
            return None
        if values.dtype not in (np.float32, np.float64):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            what = "NaN" if np.isnan(values).any() else "infinity"
            self.notes.append(f"{name} contains {what}: results computed with it will not be finite")
        return values

    def _queue(self, config: Config, rest: dict[str, Any]) -> tuple[np.ndarray | None, np.int32 | None]:
        if "queue" not in rest:
            self._problems["missing"] += ["queue"] if "queue_ptr" in rest else []
            return None, None
        shape = getattr(rest["queue"], "shape", ())
        K = int(shape[1]) if len(shape) == 2 else config.moco.queue_size
        config.moco.queue_size = K
        queue = self._array("queue", rest["queue"], (config.moco.dim, K))
        pointer = rest.get("queue_ptr")
        number = _whole(pointer)
        if number is None or not 0 <= number < min(K, MOST_STEPS):
            found = "missing" if pointer is None else "not a whole number" if number is None else number
            self._problems["wrong"].append(f"queue_ptr ({found}, expected one number from 0 to {K - 1})")
            return None, None
        return None if queue is None else queue.T, np.int32(number)

    def _group(self) -> dict[str, Any]:
        """The first parameter group of the optimizer, or an empty dict."""
        optimizer = self._content.get("optimizer")
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}

    def _momentum(self, config: Config, table: list[Entry]) -> Tree | None:
        """Returns SGD's momentum buffers of the query parameters; None if they are missing or were never set."""
        group = self._group()
        if not group or self.kind == "torchvision":
            return None
        parameters = [entry for entry in table if entry.collection == "params"]
        groups, states = self._content["optimizer"]["param_groups"], self._content["optimizer"].get("state", {})
        numbers: list[int] = []
        given = group.get("params")
        if isinstance(given, list) and all(isinstance(number, int) for number in given):
            numbers = given
        if len(groups) > 1 or len(numbers) not in (len(parameters), 2 * len(parameters)):
            self._problems["wrong"].append(
                f"optimizer ({len(groups)} groups, {len(numbers)} parameters in the first; expected one group of "
                f"{len(parameters)} or {2 * len(parameters)} parameters, the query encoder's first)"
            )
            return None
        if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
            self._problems["wrong"].append("the optimizer's state (expected a dict of dicts)")
            return None
        if any("momentum_buffer" not in state for state in states.values()):
            found = ", ".join(sorted({_printable(name) for state in states.values() for name in state}))
            self.notes.append(
                f"the optimizer is not SGD (its state: {found}): its state is ignored, and momentum starts at 0"
            )
            return None
        if group.get("nesterov") or group.get("dampening"):
            self.notes.append(
                "the optimizer used Nesterov momentum or dampening; the training step of ifm_jax has neither"
            )
        for name in ("momentum", "weight_decay"):
            if (number := _number(group.get(name, getattr(config.optim, name)))) is None:
                self._problems["wrong"].append(f"the optimizer's {name} (expected a number)")
            else:
                setattr(config.optim, name, number)
        buffers = {number: state["momentum_buffer"] for number, state in states.items()}
        if all(buffer is None for buffer in buffers.values()):
            return None
        trace: Tree = {}
        for number, entry in zip(numbers, parameters, strict=False):
            name = f"momentum_buffer of encoder_q.{entry.torch}"
            if buffers.get(number) is None:
                self._problems["missing"].append(name)
            elif (values := self._array(name, buffers[number], entry.shape)) is not None:
                set_(trace, entry.path, to_jax_layout(values, entry.kind))
        return trace

    def _step(self, epoch: int | None) -> int:
        """Returns the updates done, on which all counters of both encoders agree."""
        found = set(self._counters.values())
        if len(found) == 1:
            return found.pop()
        if epoch:
            self.notes.append(
                f"the file says epoch {epoch}, but its batch counters do not tell the number of steps: assumed step 0, "
                "where the learning rate starts; --step=N changes this"
            )
        return 0

    def _raise_problems(self, config: Config) -> None:
        problems = {kind: names for kind, names in self._problems.items() if names}
        if problems:
            listed = "; ".join(f"{len(names)} {kind}: {_abbreviate(names, 8)}" for kind, names in problems.items())
            raise UsageError(f"{self.path} is not a {config.model.arch}, the nearest architecture: {listed}")


def _map(function: Callable[[Any], Any], tree: Tree) -> Tree:
    return {name: _map(function, value) if isinstance(value, dict) else function(value) for name, value in tree.items()}


def _printable(name: Any) -> str:
    """Returns a file's key in printable form."""
    text = name if isinstance(name, str) else f"{type(name).__name__} {name!r}"
    return (text if text.isprintable() else repr(text))[:100]


def _abbreviate(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def to_jax(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    config: Config | None = None,
    step: int | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> Snapshot:
    """Converts a PyTorch checkpoint into the working directory of a run.

    A complete checkpoint (both encoders, queue) becomes a run's checkpoint at the step of its batch counters, and
    training can continue from it. From others only the existing parts are written.

    Args:
      source: path of the file.
      directory: directory to create.
      config: recipe of the run; None: the original's defaults, with what the file reveals.
      step: see `read`.
      prefix: see `read`.
      overwrite: replace an existing run.

    Returns:
      The snapshot that was written.

    Raises:
      UsageError: if the file cannot be read, contradicts the config, or the directory cannot be written.
    """
    if pathlib.Path(source).is_dir():
        raise UsageError(f"{source} is a directory: to-jax expected a .pth.tar")
    found = read(source, step, prefix)
    if config is not None:
        snapshot.check_config(config, found, source)
        found = dataclasses.replace(found, config=config)
    snapshot.write(found, directory, overwrite)
    return found
