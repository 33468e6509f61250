"""PyTorch checkpoints: one table of names, read in both directions.

Read are the original's training checkpoints (MoCo v1 and v2, IFM; complete, or stripped to the query encoder as the
released MoCo files are), torchvision's ResNet state dicts, and either inside another library's checkpoint, under a
prefix of its names. What a file holds is told from its tensors' names and shapes alone; `torch_file` reads it without
executing anything.

PyTorch is imported only when a file of its own is read or written.
"""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import flax.serialization
import jax.numpy as jnp
import numpy as np
import optax

from ifm_jax import config as configs
from ifm_jax import snapshot, torch_file
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.methods import MoCoMemory
from ifm_jax.models import ARCHITECTURES, HCLHead, without_head
from ifm_jax.models.resnet import Architecture
from ifm_jax.pretrain import TrainState
from ifm_jax.snapshot import Origin, Snapshot
from ifm_jax.torch_file import Unusable

Tree = dict[str, Any]
Target = Literal["moco", "torchvision"]
TARGETS = ("moco", "torchvision")

_COUNTER = "num_batches_tracked"
_KERNEL_OF_STEM = {"imagenet": 7, "small": 3, "small_stride2": 5}
_MOST_STEPS = np.iinfo(np.int32).max

# Where checkpoints keep a state dict, and under which names other libraries' modules the network that is trained.
_HOLDERS = ("state_dict", "model", "model_state_dict", "backbone")
_PREFIXES = ("backbone.", "encoder.", "model.", "model.backbone.", "model.encoder.")
# The children of torchvision's ResNet that hold tensors, by number: in an `nn.Sequential` they have no other names.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


# --- The table -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor of an encoder under both its names.

    Attributes:
      torch: its name in a state dict.
      collection: "params" or "batch_stats".
      path: the keys that lead to it in the nested dicts.
      shape: in PyTorch's layout.
      kind: "conv", "norm" or "linear"; says how the layouts differ.
    """

    torch: str
    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str


# A layer's tensors: PyTorch's name, collection, our name; parameters in the order of `Module.parameters()`.
_LEAVES = {
    "conv": (("weight", "params", "kernel"),),
    "linear": (("weight", "params", "kernel"), ("bias", "params", "bias")),
    "norm": (
        ("weight", "params", "scale"),
        ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
    ),
}

# The axes of a kernel: PyTorch (out, in, height, width) and (out, in), JAX (height, width, in, out) and (in, out).
_TO_JAX = {"conv": (2, 3, 1, 0), "linear": (1, 0)}
_TO_TORCH = {"conv": (3, 2, 0, 1), "linear": (1, 0)}


def _layer(torch: str, path: str, kind: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    for leaf, collection, name in _LEAVES[kind]:
        yield Entry(
            f"{torch}.{leaf}", collection, (*path.split("."), name), shape if leaf == "weight" else shape[:1], kind
        )


def backbone_table(architecture: Architecture, stem: str = "imagenet") -> list[Entry]:
    """Returns the entries of a ResNet without its head, in torchvision's order."""
    width, kernel = architecture.width, _KERNEL_OF_STEM[stem]
    table = [*_layer("conv1", "conv1", "conv", (width, 3, kernel, kernel)), *_layer("bn1", "bn1", "norm", (width,))]
    inputs = width
    for stage, depth in enumerate(architecture.depths):
        features = width * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            if architecture.bottleneck:
                inner = features * architecture.width_per_group // 64 * architecture.groups
                outputs = features * 4
                shapes = [
                    (inner, inputs, 1, 1),
                    (inner, inner // architecture.groups, 3, 3),
                    (outputs, inner, 1, 1),
                ]
            else:
                outputs = features
                shapes = [(features, inputs, 3, 3), (features, features, 3, 3)]
            for i, shape in enumerate(shapes, start=1):
                table += _layer(f"{name}.conv{i}", f"{name}.conv{i}", "conv", shape)
                table += _layer(f"{name}.bn{i}", f"{name}.bn{i}", "norm", shape[:1])
            if block == 0 and (stage > 0 or inputs != outputs):
                table += _layer(f"{name}.downsample.0", f"{name}.downsample.conv", "conv", (outputs, inputs, 1, 1))
                table += _layer(f"{name}.downsample.1", f"{name}.downsample.norm", "norm", (outputs,))
            inputs = outputs
    return table


def head_table(features: int, dim: int, head: str) -> list[Entry]:
    """Returns the entries of a head, one of `models.HEADS`."""
    if head == "linear":
        return list(_layer("fc", "fc", "linear", (dim, features)))
    if head == "hcl":
        width = HCLHead.hidden_features
        weight, _ = _layer("fc.0", "fc.hidden", "linear", (width, features))  # it has no bias
        norm = _layer("fc.1", "fc.norm", "norm", (width,))
        return [weight, *norm, *_layer("fc.3", "fc.output", "linear", (dim, width))]
    hidden = _layer("fc.0", "fc.hidden", "linear", (features, features))
    return [*hidden, *_layer("fc.2", "fc.output", "linear", (dim, features))]


def encoder_table(config: Config, head: bool = True) -> list[Entry]:
    """Returns the entries of the encoder that a config describes, in the order of PyTorch's `parameters()`."""
    table = backbone_table(_architecture(config), config.model.stem)
    if head:
        table += head_table(_features(_architecture(config)), *configs.head(config))
    return table


def _architecture(config: Config) -> Architecture:
    architecture = ARCHITECTURES[config.model.arch]
    return architecture._replace(width=config.model.width) if config.model.width else architecture


def _features(architecture: Architecture) -> int:
    return architecture.width * 2 ** (len(architecture.depths) - 1) * (4 if architecture.bottleneck else 1)


def _counters(table: Iterable[Entry]) -> list[str]:
    """Returns the names of PyTorch's batch counters; nothing corresponds to them in JAX but the number of steps."""
    return [entry.torch.replace("running_mean", _COUNTER) for entry in table if entry.path[-1] == "mean"]


def _to_jax(values: np.ndarray, kind: str) -> np.ndarray:
    return values.transpose(_TO_JAX[kind]) if values.ndim > 1 else values


def _to_torch(values: np.ndarray, kind: str) -> np.ndarray:
    return values.transpose(_TO_TORCH[kind]) if values.ndim > 1 else values


def _get(tree: Tree, path: tuple[str, ...]) -> np.ndarray:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Tree, path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


# --- PyTorch -> JAX --------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, step: int | None = None, prefix: str = "") -> Snapshot:
    """Returns what a PyTorch checkpoint, or a run of our own, holds.

    The arrays of a file in PyTorch's present (zip) format stay on disk until they are used.

    The state dict is the file itself, or what it holds under `state_dict`, `model`, `model_state_dict` or `backbone`;
    `module.` before a name goes unnoticed. The network's names may have a prefix (`backbone.conv1.weight`), or be an
    `nn.Sequential`'s (`backbone.0.weight`, ..., `backbone.7.1.bn2.weight`: torchvision's children by number). Where a
    file holds one network only, or only one of several under a usual prefix (`backbone.`, `encoder.`, `model.`), that
    one is read, with a note.

    Args:
      path: a `.pth`, `.pth.tar` or `.safetensors`; a directory goes to `snapshot.read`.
      step: updates done at the time of the file; None: what its batch counters say, which the original moves by one a
        step, or 0 without.
      prefix: what the names of the network begin with, or those of the whole MoCo (`model.` for
        `model.encoder_q.conv1.weight`); "": found as said above. Other tensors are left aside, with a note.

    Raises:
      UsageError: if it cannot be read without executing code, is no ResNet, or if tensors are missing, unexpected or
        mis-shaped (all of them in one message).
    """
    path = pathlib.Path(path)
    if step is not None and not 0 <= step <= _MOST_STEPS:
        raise UsageError(f"step={step}: expected a number from 0 to {_MOST_STEPS}")
    if path.is_dir():
        if prefix:
            raise UsageError(f"--prefix={prefix}: {path} is a directory; a prefix is for files of PyTorch's")
        return snapshot.read(path)
    return _Reader(path, torch_file.read(path), prefix).snapshot(step)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | Unusable)


def _networks(names: Iterable[str]) -> dict[str, bool]:
    """Returns the prefixes under which a state dict holds a ResNet, each with whether that is an `nn.Sequential`."""
    names, found = set(names), {}
    layouts = (("layer1.0.conv1.weight", "conv1.weight", False), ("4.0.conv1.weight", "0.weight", True))
    for block, stem, numbered in layouts:
        for name in names:
            prefix = name.removesuffix(block)
            if name.endswith(block) and (not prefix or prefix.endswith(".")) and prefix + stem in names:
                found.setdefault(prefix, numbered)
    return dict(sorted(found.items()))


def _named_by_child(tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors of an `nn.Sequential` of torchvision's children under torchvision's names."""
    split = {name: name.partition(".") for name in tensors}
    return {f"{_CHILDREN.get(number, number)}.{rest}": tensors[name] for name, (number, _, rest) in split.items()}


def _whole(value: Any) -> int | None:
    """Returns a tensor of one whole number as that number; None: it is another."""
    if not isinstance(value, np.ndarray) or value.size != 1 or value.dtype.kind not in "iuf":
        return None
    number = value.item()
    return int(number) if math.isfinite(number) and number == int(number) else None


def _number(value: Any) -> float | None:
    """Returns a setting of an optimiser as a number; None: it is none."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else None


class _Reader:
    """Sorts the tensors of a checkpoint, and collects all that is wrong with them before it says anything."""

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
        """Returns the tensors by their names, without `module.`."""
        found = [name for name in _HOLDERS if isinstance(self._content.get(name), dict)]
        found = [name for name in found if any(map(_is_tensor, self._content[name].values()))]
        tensors = self._content[found[0]] if found else self._content
        if not any(map(_is_tensor, tensors.values())):
            keys = _abbreviate(list(map(_printable, self._content)), 5) or type(content).__name__
            raise UsageError(
                f"{self.path} holds no state dict (found: {keys}): expected one, alone or under "
                f"{', '.join(map(repr, _HOLDERS))}"
            )
        if len(found) > 1:
            self.notes.append(f"read is what it holds under {found[0]!r}; left aside: {', '.join(found[1:])}")
        if others := [_printable(name) for name, value in tensors.items() if not _is_tensor(value)]:
            raise UsageError(
                f"{self.path}: {_abbreviate(others, 4)} in its state dict is no tensor: expected nothing else"
            )
        if unnamed := [_printable(name) for name in tensors if not isinstance(name, str) or not name.isprintable()]:
            raise UsageError(f"{self.path}: {_abbreviate(unnamed, 4)} in its state dict is no name of a tensor")
        named = {name.removeprefix("module."): value for name, value in tensors.items()}
        if twice := [name for name in tensors if name.startswith("module.") and name[len("module.") :] in tensors]:
            raise UsageError(
                f"{self.path} holds {len(twice)} tensors twice, with and without 'module.' ({_abbreviate(twice, 4)}): "
                "expected each once; save the state_dict of one network"
            )
        return named

    def _within(self, prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """Returns the tensors of the network under its own names; notes what is left aside."""
        given, networks = prefix, _networks(tensors)
        seen = ", ".join(repr(name) for name in networks if name)
        if prefix:
            prefix = f"{prefix.removesuffix('.')}.".removeprefix("module.")
            if not any(name.startswith(prefix) for name in tensors):
                expected = f"one of {seen}" if seen else "what they begin with"
                raise UsageError(
                    f"--prefix={given}: none of the tensors of {self.path} begins with it "
                    f"({_abbreviate(list(tensors), 4)}): expected {expected}"
                )
        elif "conv1.weight" in tensors or any(name.startswith(("encoder_q.", "encoder_k.")) for name in tensors):
            return tensors
        elif len(usual := [name for name in networks if name in _PREFIXES] if len(networks) > 1 else [*networks]) == 1:
            (prefix,) = usual
        elif networks:
            raise UsageError(
                f"{self.path} holds {len(networks)} networks, its tensors begin with {seen}: name one, with --prefix= "
                "of convert_checkpoints.py or eval_linear.py, or prefix= in Python"
            )
        inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        aside = sorted({name.partition(".")[0] for name in tensors if not name.startswith(prefix)})
        if prefix and (aside or not given):
            left = f"; left aside: {_abbreviate(aside, 6)}" if aside else ""
            others = [name for name in networks if not name.startswith(prefix)]
            more = f" (--prefix={others[0]} reads that network instead)" if others else ""
            self.notes.append(f"read is the network whose tensors begin with {prefix!r}{left}{more}")
        if networks.get(prefix):
            inside = _named_by_child(inside)
        first = inside.get("conv1.weight")
        if prefix and isinstance(first, np.ndarray) and first.shape[-1:] == (_KERNEL_OF_STEM["small"],):
            self.notes.append(
                "the first convolution, 3x3, is taken as padded by 1; solo-learn's for CIFAR pads by 2: give such a "
                "network its images with one more pixel of zeros on every side"
            )
        return inside

    def snapshot(self, step: int | None) -> Snapshot:
        query, key, rest = self._tensors, {}, {}
        if self.kind == "moco":
            query, key, rest = self._part("encoder_q."), self._part("encoder_k."), self._others()
        if not query:
            raise UsageError(f"{self.path} holds no query encoder (encoder_q.*): expected one")
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
        epoch = epoch if isinstance(epoch, int) and 0 <= epoch <= _MOST_STEPS else None
        if step is None:
            step = self._step(epoch) if complete else 0
        trace = momentum
        if momentum is None and complete:  # a buffer that was never set acts as zeros
            trace = _map(np.zeros_like, params)
        opt_state = trace and flax.serialization.to_state_dict((optax.EmptyState(), optax.TraceState(trace)))
        if params["conv1"]["kernel"].dtype == np.float64:
            config.model.compute_dtype = "float64"
        memory = MoCoMemory(key_params, key_batch_stats, queue, queue_ptr)
        state = TrainState(np.int32(step), params, batch_stats, opt_state, memory)
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
                f"{self.path} holds no ResNet (tensors: {_abbreviate(list(query), 4)}): "
                "expected torchvision's names, conv1.weight, bn1.weight, layer1.0.conv1.weight and on"
            )
        width = int(first.shape[0])
        stems = [stem for stem, size in _KERNEL_OF_STEM.items() if size == first.shape[-1]]
        stem = stems[0] if stems else "imagenet"
        shapes = {name: getattr(value, "shape", None) for name, value in query.items() if not name.startswith("fc.")}

        def distance(name: str) -> tuple[int, bool]:
            table = backbone_table(ARCHITECTURES[name]._replace(width=width), stem)
            wrong = {(entry.torch, entry.shape) for entry in table} ^ {
                item for item in shapes.items() if not item[0].endswith(_COUNTER)
            }
            return len(wrong), name != self._arch

        # The nearest architecture; what it lacks or has too much is a problem to be reported later.
        arch = min(ARCHITECTURES, key=distance)
        config.model.arch, config.model.stem = arch, stem
        config.model.width = 0 if width == ARCHITECTURES[arch].width else width
        if self._arch in ARCHITECTURES and self._arch != arch:
            self.notes.append(
                f"the file calls itself {self._arch}; its tensors are those of {arch}, and are taken as that"
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
                _set(trees[entry.collection], entry.path, _to_jax(values, entry.kind))
        counters = [name for name in _counters(table) if name in tensors]
        for name in counters:
            number = _whole(tensors[name])
            if number is None or not 0 <= number <= _MOST_STEPS:
                self._problems["wrong"].append(f"{prefix}{name} (expected one number from 0 to {_MOST_STEPS})")
            else:
                self._counters[prefix + name] = number
        known = {entry.torch for entry in table} | set(counters)
        self._problems["unexpected"] += [prefix + name for name in tensors if name not in known]
        return trees["params"], trees["batch_stats"]

    def _array(self, name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """Returns a tensor as a float32 or float64 array; None, and a problem noted, if it is not as expected."""
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
            self.notes.append(f"{name} holds {what}: whatever is computed with it will not be finite")
        return values

    def _queue(self, config: Config, rest: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
        if "queue" not in rest:
            self._problems["missing"] += ["queue"] if "queue_ptr" in rest else []
            return None, None
        shape = getattr(rest["queue"], "shape", ())
        K = int(shape[1]) if len(shape) == 2 else config.moco.queue_size
        config.moco.queue_size = K
        queue = self._array("queue", rest["queue"], (config.moco.dim, K))
        pointer = rest.get("queue_ptr")
        number = _whole(pointer)
        if number is None or not 0 <= number < min(K, _MOST_STEPS):
            found = "missing" if pointer is None else "no whole number" if number is None else number
            self._problems["wrong"].append(f"queue_ptr ({found}, expected one number from 0 to {K - 1})")
            return None, None
        return None if queue is None else queue.T, np.int32(number)

    def _group(self) -> dict[str, Any]:
        """The first parameter group of the optimiser; empty where there is none."""
        optimizer = self._content.get("optimizer")
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}

    def _momentum(self, config: Config, table: list[Entry]) -> Tree | None:
        """Returns SGD's momentum buffers of the query parameters; None if they are not there or were never set."""
        group = self._group()
        if not group or self.kind == "torchvision":
            return None
        parameters = [entry for entry in table if entry.collection == "params"]
        groups, states = self._content["optimizer"]["param_groups"], self._content["optimizer"].get("state", {})
        numbers = group.get("params", [])
        if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
            numbers = []
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
            self.notes.append(f"the optimiser is not SGD (its state: {found}): left out, momentum starts at 0")
            return None
        if group.get("nesterov") or group.get("dampening"):
            self.notes.append("the optimiser used Nesterov momentum or dampening; the training step here has neither")
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
                _set(trace, entry.path, _to_jax(values, entry.kind))
        return trace

    def _step(self, epoch: int | None) -> int:
        """Returns the updates done: what all counters of both encoders agree on."""
        found = set(self._counters.values())
        if len(found) == 1:
            return found.pop()
        if epoch:
            self.notes.append(
                f"the file says epoch {epoch}, but its batch counters do not say how many steps: taken as step 0, "
                "where the learning rate starts; --step=N says otherwise"
            )
        return 0

    def _raise_problems(self, config: Config) -> None:
        problems = {kind: names for kind, names in self._problems.items() if names}
        if problems:
            listed = "; ".join(f"{len(names)} {kind}: {_abbreviate(names, 8)}" for kind, names in problems.items())
            raise UsageError(f"{self.path} is no {config.model.arch}, the nearest architecture: {listed}")


def _map(function, tree: Tree) -> Tree:
    return {name: _map(function, value) if isinstance(value, dict) else function(value) for name, value in tree.items()}


def _printable(name: Any) -> str:
    """Returns a key of a file as a part of a line."""
    text = name if isinstance(name, str) else f"{type(name).__name__} {name!r}"
    return (text if text.isprintable() else repr(text))[:100]


def _abbreviate(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def to_jax(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    config: Config | None = None,
    step: int | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> Snapshot:
    """Converts a PyTorch checkpoint into the working directory of a run.

    A complete one (both encoders, queue) is a run's checkpoint at the step that its batch counters tell, and training
    goes on from it. Of others only the parts that are there are written.

    Args:
      source: the file.
      directory: to make.
      config: recipe of the run; None: the original's defaults, with what can be read off the file.
      step: see `read`.
      prefix: see `read`.
      overwrite: replace a run that is there.

    Returns:
      What was written.

    Raises:
      UsageError: if the file cannot be read, contradicts the config, or the directory cannot be written.
    """
    if pathlib.Path(source).is_dir():
        raise UsageError(f"{source} is a directory: to-jax expects a .pth.tar")
    found = read(source, step, prefix)
    if config is not None:
        snapshot.check_config(config, found, source)
        found = dataclasses.replace(found, config=config)
    snapshot.write(found, directory, overwrite)
    return found


# --- JAX -> PyTorch --------------------------------------------------------------------------------------------------


def state_dict(found: Snapshot) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a snapshot, name and values in PyTorch's layout, without `module.`.

    `queue` and `queue_ptr` first, then the encoders, as a module of the original orders them; batch counters included.
    """
    state = found.state
    memory = _moco_memory(state)
    if memory.queue is not None:
        yield "queue", np.asarray(memory.queue).T
        yield "queue_ptr", np.asarray(memory.queue_ptr, np.int64).reshape(1)
    prefix = "encoder_q." if found.origin is None or found.origin.kind == "moco" else ""
    yield from _encoder_tensors(found, state.params, state.batch_stats, prefix)
    if memory.key_params is not None:
        yield from _encoder_tensors(found, memory.key_params, memory.key_batch_stats, "encoder_k.")


def _moco_memory(state: TrainState) -> MoCoMemory:
    """Returns MoCo's part of a state; of another method's, one without any of its parts."""
    return state.memory if isinstance(state.memory, MoCoMemory) else MoCoMemory(None, None, None, None)


def _encoder_tensors(found: Snapshot, params: Tree, batch_stats: Tree, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    trees = {"params": params, "batch_stats": batch_stats}
    for entry in encoder_table(found.config, head="fc" in params):
        yield prefix + entry.torch, _to_torch(np.asarray(_get(trees[entry.collection], entry.path)), entry.kind)
        if entry.path[-1] == "var":  # the counter follows the running variance
            name = prefix + entry.torch.replace("running_var", _COUNTER)
            yield name, np.asarray(_counter(found, name), np.int64)


def _counter(found: Snapshot, name: str) -> int:
    """Returns a batch counter: the number of training steps, on top of what a converted file began with."""
    step = int(found.state.step)
    if found.origin is None or name not in found.origin.num_batches_tracked:
        return step
    return found.origin.num_batches_tracked[name] + step - found.origin.step


def to_torch(
    source: str | os.PathLike,
    path: str | os.PathLike,
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
        matching, and as MoCo's scripts for linear evaluation and detection (detectron2) read it; "torchvision": the
        backbone under torchvision's names, for torchvision and timm.
      epoch: epochs done, for "moco"; None: what the run's metrics or the converted file say.
      prefix: see `read`, where the source is a PyTorch checkpoint.
      overwrite: replace a file that is there.

    Returns:
      What was read; its `notes` say what the caller should know of the file written.

    Raises:
      UsageError: if the source cannot be read or the file not be written.
    """
    path = pathlib.Path(path)
    if target not in TARGETS:
        raise UsageError(f"--for={target}: expected one of {', '.join(TARGETS)}")
    if not path.name.endswith((".pth", ".pth.tar", ".pt", ".safetensors")):
        raise UsageError(f"{path}: the name must end in .pth, .pth.tar, .pt or .safetensors")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already: name another file, or pass --overwrite")
    found = read(source, prefix=prefix)
    notes = list(found.notes)
    if target == "moco" and found.config.method != "moco":
        raise UsageError(
            f"--for=moco: {source} is a run with method={found.config.method}, whose state MoCo's format has no place "
            "for; expected --for=torchvision, which holds the backbone"
        )
    architecture = _architecture(found.config)
    if found.config.model.stem != "imagenet" or architecture.width != 64 or len(architecture.depths) != 4:
        notes.append(
            f"{_describe_architecture(found.config)} is none of torchvision's networks: the names are its, but its own "
            "classes have other shapes"
        )
    tensors = _torchvision_tensors(found) if target == "torchvision" else _moco_tensors(found, notes)
    if path.suffix == ".safetensors":
        if target == "moco" and _has_momentum(found):
            notes.append("safetensors holds tensors under a name each: the momentum buffers are not among them")
        _write(path, lambda file: _save_safetensors(tensors, found.config.model.arch, file))
        return dataclasses.replace(found, notes=tuple(notes))
    torch = torch_file.import_torch()
    content: dict[str, Any] = {name: _tensor(values) for name, values in tensors.items()}
    if target == "moco":
        if epoch is None and (epoch := found.epoch) is None:
            epoch = 0
            notes.append("nothing says how many epochs are done: written as epoch 0; --epoch=N says otherwise")
        content = {
            "epoch": epoch,
            "arch": found.config.model.arch,
            "state_dict": content,
            "optimizer": _optimizer(found, notes),
        }
    _write(path, lambda file: torch.save(content, file))
    return dataclasses.replace(found, notes=tuple(notes))


def _moco_tensors(found: Snapshot, notes: list[str]) -> dict[str, np.ndarray]:
    if missing := [part for part in found.missing if part != "optimizer state"]:
        notes.append(
            f"no {', '.join(missing)} there: written is what there is; the original's training code does not load it, "
            "its linear evaluation does"
        )
    named = state_dict(found)
    if found.origin and found.origin.kind == "torchvision":
        named = ((f"encoder_q.{name}", values) for name, values in named)
    return {f"module.{name}": values for name, values in named}


def _torchvision_tensors(found: Snapshot) -> dict[str, np.ndarray]:
    """The query encoder without its projection head; `fc` stays where it came as a classifier."""
    if found.origin and found.origin.kind == "torchvision":
        return dict(state_dict(found))
    params, batch_stats = without_head(found.state.params), without_head(found.state.batch_stats)
    named = _encoder_tensors(found, params, batch_stats, "encoder_q.")
    return {name.removeprefix("encoder_q."): values for name, values in named}


def _tensor(values: np.ndarray):
    # A copy in PyTorch's order, so that the file is as any other and no view of the source.
    return torch_file.import_torch().from_numpy(np.array(values, order="C"))


def _optimizer(found: Snapshot, notes: list[str]) -> Tree:
    """Returns `torch.optim.SGD`'s state dict; all parameters are numbered, the query encoder's have buffers."""
    config, state = found.config, found.state
    parameters = [e for e in encoder_table(config, head="fc" in state.params) if e.collection == "params"]
    buffers = {}
    if config.optim.name != "sgd":
        notes.append(f"the optimiser is {config.optim.name}, the original's SGD: its state is left out")
    elif state.opt_state is not None:
        trace = _trace(state)
        values = [np.asarray(_get(trace, entry.path)) for entry in parameters]
        # Before the first step PyTorch has no buffers.
        if any(value.any() for value in values):
            buffers = {
                number: {"momentum_buffer": _tensor(_to_torch(value, entry.kind))}
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
        "params": list(range(len(parameters) * (1 if _moco_memory(state).key_params is None else 2))),
    }
    return {"state": buffers, "param_groups": [group]}


def _save_safetensors(tensors: dict[str, np.ndarray], arch: str, file: pathlib.Path) -> None:
    try:
        import safetensors.numpy
    except ImportError:
        raise UsageError("writing .safetensors takes its library: pip install safetensors") from None
    tensors = {name: np.array(values, order="C") for name, values in tensors.items()}
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt", "arch": arch})
    except safetensors.SafetensorError as error:  # a full disk among others
        raise OSError(str(error)) from None


def _write(path: pathlib.Path, save) -> None:
    """Saves under another name, then renames; who may read the file is as for any new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save(temporary)
        temporary.chmod(mode)  # safetensors makes a file anew that its owner alone may read
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be written ({reason}): name a file that can") from None
    finally:
        temporary.unlink(missing_ok=True)


# --- What a checkpoint holds -----------------------------------------------------------------------------------------


def describe(found: Snapshot) -> dict[str, str]:
    """Returns what a snapshot holds, as rows of a table: name, and value in words."""
    config, state = found.config, found.state
    if found.origin is None:
        kind = f"run of ifm_jax, {config.method}, objective {config.ifm.objective}"
    else:
        names = {"moco": "MoCo/IFM checkpoint", "torchvision": "ResNet state dict"}
        kind = f"PyTorch {names[found.origin.kind]}, {found.origin.file}"
    features = _features(_architecture(config))
    if "fc" not in state.params:
        head = "none"
    else:
        dim, head = configs.head(config)
        head = {"mlp": f"MLP {features} -> {features} -> {dim}", "linear": f"linear {features} -> {dim}"}.get(
            head, f"{head} {features} -> 512 -> {dim}"
        )
    memory = _moco_memory(state)
    parts = ["query encoder"] + ([] if memory.key_params is None else ["key encoder"])
    parts += [] if memory.queue is None else ["queue"]
    if state.opt_state is not None and config.optim.name != "sgd":
        parts.append(f"state of {config.optim.name}")
    elif _has_momentum(found):
        parts.append("momentum buffers")
    rows = {
        "kind": kind,
        "architecture": _describe_architecture(config),
        "head": head,
        "parts": ", ".join(parts),
        "epoch": str(found.epoch) if found.epoch is not None else "not known",
        "step": str(int(state.step)),
        "dtype": str(state.params["conv1"]["kernel"].dtype),
        "parameters": f"{sum(np.size(leaf) for leaf in _leaves(state.params)):,} in the query encoder",
    }
    if found.origin and found.origin.kind == "torchvision":
        del rows["epoch"], rows["step"]
    if memory.queue is not None:
        rows["dim"], rows["K"] = str(memory.queue.shape[1]), str(memory.queue.shape[0])
        rows["queue_ptr"] = str(int(memory.queue_ptr))
    return rows


def _trace(state: TrainState) -> Tree:
    """Returns SGD's momentum buffers: zeros, where none have been set yet."""
    return flax.serialization.to_state_dict(state.opt_state)["1"]["trace"]


def _has_momentum(found: Snapshot) -> bool:
    """Whether SGD's momentum buffers are there, and not only the zeros that stand for none."""
    state = found.state
    sgd = found.config.optim.name == "sgd" and state.opt_state is not None
    return sgd and any(leaf.any() for leaf in _leaves(_trace(state)))


def _describe_architecture(config: Config) -> str:
    stem = "" if config.model.stem == "imagenet" else f", stem {config.model.stem}"
    width = f", width {config.model.width}" if config.model.width else ""
    return f"{config.model.arch}{stem}{width}"


def _leaves(tree: Tree) -> Iterator[np.ndarray]:
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else (value,)
