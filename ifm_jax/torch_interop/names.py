"""The tensors of an encoder under PyTorch's names and under ours: one table, read in both directions."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ifm_jax import config as configs
from ifm_jax.choices import Head, Stem
from ifm_jax.config import Config
from ifm_jax.models import ARCHITECTURES, BatchNorm, HCLHead, heads
from ifm_jax.models.heads import MLPHead
from ifm_jax.models.resnet import Architecture, Downsample, ResNet

Tree = dict[str, Any]

COUNTER = "num_batches_tracked"
KERNEL_OF_STEM: dict[Stem, int] = {"imagenet": 7, "small": 3, "small_stride2": 5}
MOST_STEPS = np.iinfo(np.int32).max


class Entry(NamedTuple):
    """A tensor of an encoder with both of its names.

    Attributes:
      torch: name in a state dict.
      collection: "params" or "batch_stats".
      path: keys that lead to the tensor in the nested dicts.
      shape: shape in PyTorch's layout.
      kind: "conv", "norm" or "linear"; determines how the layouts differ.
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

_LAYERS = {"conv": nnx.Conv, "linear": nnx.Linear, "norm": BatchNorm}

# The axes of a kernel: PyTorch (out, in, height, width) and (out, in), JAX (height, width, in, out) and (in, out).
_TO_JAX = {"conv": (2, 3, 1, 0), "linear": (1, 0)}
_TO_TORCH = {"conv": (3, 2, 0, 1), "linear": (1, 0)}


# Positions of layers that PyTorch keeps in an `nn.Sequential`; other layers keep their names.
_PLACES: dict[type[nnx.Module], dict[str, str]] = {
    Downsample: {"conv": "0", "norm": "1"},
    MLPHead: {"hidden": "0", "output": "2"},
    HCLHead: {"hidden": "0", "norm": "1", "output": "3"},
}


def _entries(module: nnx.Module, torch: str, path: tuple[str, ...]) -> Iterator[Entry]:
    """Yields the entries of a module and its submodules, in order of creation, which is torchvision's order.

    Args:
      module: module, whose arrays may be tracers.
      torch: name in a state dict.
      path: keys that lead to it.
    """
    kind = next((kind for kind, layer in _LAYERS.items() if isinstance(module, layer)), None)
    if kind is None:
        places = _PLACES.get(type(module), {})
        for name, child in vars(module).items():
            if isinstance(child, nnx.Module):
                yield from _entries(child, ".".join(filter(None, (torch, places.get(name, name)))), (*path, name))
        return
    for leaf, collection, name in _LEAVES[kind]:
        value = getattr(module, name)
        if value is not None:  # a layer without bias
            order = _TO_TORCH.get(kind, (0,)) if leaf == "weight" else (0,)
            shape = tuple(value.shape[axis] for axis in order)
            yield Entry(f"{torch}.{leaf}", collection, (*path, name), shape, kind)


def _traced(make: Callable[[nnx.Rngs], nnx.Module], torch: str = "", path: tuple[str, ...] = ()) -> list[Entry]:
    """Returns the entries of the module that `make` builds, without computing its parameters."""
    table: list[Entry] = []

    def collect() -> tuple[()]:
        table.extend(_entries(make(nnx.Rngs(params=0)), torch, path))
        return ()

    jax.eval_shape(collect)
    return table


@functools.cache
def backbone_table(architecture: Architecture, stem: Stem = "imagenet") -> tuple[Entry, ...]:
    """Returns the entries of a ResNet without its head, in torchvision's order."""
    # All blocks of a stage but the first are alike: tracing two per stage takes a fraction of the time.
    short = architecture._replace(depths=tuple(min(depth, 2) for depth in architecture.depths))
    table: list[Entry] = []
    for stage, entries in itertools.groupby(
        _traced(lambda rngs: ResNet(short, num_classes=0, stem=stem, rngs=rngs)), lambda entry: entry.path[0]
    ):
        blocks = list(entries)
        table += blocks
        if stage.startswith("layer"):
            second = [entry for entry in blocks if entry.path[1] == "1"]
            for number in range(2, architecture.depths[int(stage.removeprefix("layer")) - 1]):
                table += [_of_block(entry, str(number)) for entry in second]
    return tuple(table)


def _of_block(entry: Entry, number: str) -> Entry:
    """Returns the same entry for another block of the stage."""
    stage, _, rest = entry.torch.split(".", 2)
    return entry._replace(torch=f"{stage}.{number}.{rest}", path=(entry.path[0], number, *entry.path[2:]))


@functools.cache
def head_table(features: int, dim: int, head: Head) -> tuple[Entry, ...]:
    """Returns the entries of a head, one of `models.HEADS`."""
    options = {"norm": BatchNorm, "dtype": None, "param_dtype": jnp.float32}
    return tuple(_traced(lambda rngs: heads.create(head, features, dim, rngs=rngs, **options), "fc", ("fc",)))


def encoder_table(config: Config, head: bool = True) -> list[Entry]:
    """Returns the entries of the encoder that a config describes, in the order of PyTorch's `parameters()`."""
    table = list(backbone_table(architecture_of(config), config.model.stem))
    if head:
        table += head_table(num_features(architecture_of(config)), *configs.head(config))
    return table


def architecture_of(config: Config) -> Architecture:
    """Returns the architecture that a config describes, with the config's width."""
    architecture = ARCHITECTURES[config.model.arch]
    return architecture._replace(width=config.model.width) if config.model.width else architecture


def num_features(architecture: Architecture) -> int:
    """Returns the number of features of the backbone."""
    return architecture.width * 2 ** (len(architecture.depths) - 1) * (4 if architecture.bottleneck else 1)


def counters(table: Iterable[Entry]) -> list[str]:
    """Returns the names of PyTorch's batch counters; in JAX only the number of steps corresponds to them."""
    return [entry.torch.replace("running_mean", COUNTER) for entry in table if entry.path[-1] == "mean"]


def to_jax_layout(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns a PyTorch tensor with its axes in our order; `kind` as in `Entry`."""
    return values.transpose(_TO_JAX[kind]) if values.ndim > 1 else values


def to_torch_layout(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns one of our tensors with its axes in PyTorch's order; `kind` as in `Entry`."""
    return values.transpose(_TO_TORCH[kind]) if values.ndim > 1 else values


def get(tree: Tree, path: tuple[str, ...]) -> Any:
    """Returns the array at a path in nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def set_(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    """Puts an array into nested dicts and creates missing ones."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
