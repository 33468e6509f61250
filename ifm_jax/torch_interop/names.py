"""The tensors of an encoder under PyTorch's names and under ours: one table, read in both directions."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.models import ARCHITECTURES, HCLHead, Stem
from ifm_jax.models.resnet import Architecture

Tree = dict[str, Any]

COUNTER = "num_batches_tracked"
KERNEL_OF_STEM: dict[Stem, int] = {"imagenet": 7, "small": 3, "small_stride2": 5}
MOST_STEPS = np.iinfo(np.int32).max


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


def backbone_table(architecture: Architecture, stem: Stem = "imagenet") -> list[Entry]:
    """Returns the entries of a ResNet without its head, in torchvision's order."""
    width, kernel = architecture.width, KERNEL_OF_STEM[stem]
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
    table = backbone_table(architecture_of(config), config.model.stem)
    if head:
        table += head_table(num_features(architecture_of(config)), *configs.head(config))
    return table


def architecture_of(config: Config) -> Architecture:
    """Returns the architecture that a config describes, at its own width."""
    architecture = ARCHITECTURES[config.model.arch]
    return architecture._replace(width=config.model.width) if config.model.width else architecture


def num_features(architecture: Architecture) -> int:
    """Returns the number of features that the backbone gives."""
    return architecture.width * 2 ** (len(architecture.depths) - 1) * (4 if architecture.bottleneck else 1)


def counters(table: Iterable[Entry]) -> list[str]:
    """Returns the names of PyTorch's batch counters; nothing corresponds to them in JAX but the number of steps."""
    return [entry.torch.replace("running_mean", COUNTER) for entry in table if entry.path[-1] == "mean"]


def to_jax_layout(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns a tensor of PyTorch's with its axes in our order; `kind` as in `Entry`."""
    return values.transpose(_TO_JAX[kind]) if values.ndim > 1 else values


def to_torch_layout(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns a tensor of ours with its axes in PyTorch's order; `kind` as in `Entry`."""
    return values.transpose(_TO_TORCH[kind]) if values.ndim > 1 else values


def get(tree: Tree, path: tuple[str, ...]) -> np.ndarray:
    """Returns the array of nested dicts that a path leads to."""
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def set_(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    """Puts an array into nested dicts, which are made where they are missing."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
