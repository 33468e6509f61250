"""A network as a pure function: parameters and statistics in, embeddings and new statistics out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ifm_jax.choices import CPUConvolutions, Head, RunningStats, Stem
from ifm_jax.models import resnet

Tree = dict[str, Any]
_HEAD = "fc"


def without_head(tree: Tree) -> Tree:
    """Returns an encoder's `params` or `batch_stats` without the head's part."""
    return {name: value for name, value in tree.items() if name != _HEAD}


def only_head(tree: Tree) -> Tree:
    """Returns the head's part of an encoder's `params` or `batch_stats`: one entry, or none."""
    return {name: value for name, value in tree.items() if name == _HEAD}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The architecture of query and key encoder: a ResNet backbone and a projection head of `dim` outputs.

    The module itself is defined with Flax NNX; this splits it into plain nested dicts of arrays, so that a training
    step is a pure function and a checkpoint holds only names and arrays.

    Attributes:
      arch: one of `resnet.ARCHITECTURES`.
      dim: length of an embedding; 0: no head, pooled features instead.
      head: "linear" (MoCo v1's), "mlp" (MoCo-v2's and SimCLR's: linear, ReLU, linear) or "hcl"; see `heads`.
      stem: see `resnet.ResNet`.
      width: channels of the first stage; 0: the architecture's own.
      bn_groups: groups of every BatchNorm in training.
      running_stats: which statistics the running averages follow, "first_group" or "mean".
      compute_dtype: dtype of convolutions and products.
      param_dtype: dtype of parameters and running averages.
      reduce_over: mesh of the devices over which gradients are summed in `param_dtype`; None: in `compute_dtype`.
      in_channels: channels of an image.
      cpu_convolutions: who computes convolutions on a CPU, "xla" or "onednn" (one device; see `models.convolution`).
      mlp: only an argument: whether the head is "mlp" or "linear", the spelling from before there were more heads.
    """

    arch: str
    dim: int = 128
    head: Head = "mlp"
    stem: Stem = "imagenet"
    width: int = 0
    bn_groups: int = 1
    running_stats: RunningStats = "first_group"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    reduce_over: jax.sharding.Mesh | None = None
    in_channels: int = 3
    cpu_convolutions: CPUConvolutions = "xla"
    mlp: dataclasses.InitVar[bool | None] = None

    def __post_init__(self, mlp: bool | None):
        if mlp is not None:
            object.__setattr__(self, "head", "mlp" if mlp else "linear")

    def module(self, rngs: nnx.Rngs) -> resnet.ResNet:
        """Returns the live module with fresh parameters."""
        return resnet.create(
            self.arch,
            width=self.width,
            num_classes=self.dim,
            head=self.head,
            stem=self.stem,
            bn_groups=self.bn_groups,
            running_stats=self.running_stats,
            dtype=jnp.dtype(self.compute_dtype),
            param_dtype=jnp.dtype(self.param_dtype),
            reduce_over=self.reduce_over,
            cpu_convolutions=self.cpu_convolutions,
            in_channels=self.in_channels,
            rngs=rngs,
        )

    def init(self, rng: jax.Array) -> tuple[Tree, Tree]:
        """Returns fresh `(params, batch_stats)`, nested dicts of arrays."""
        _, params, batch_stats = nnx.split(self.module(nnx.Rngs(params=rng)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

    def bind(self, params: Tree, batch_stats: Tree) -> resnet.ResNet:
        """Returns the live module with these values."""
        # An abstract module costs nothing: it creates no arrays.
        abstract = nnx.eval_shape(lambda: self.module(nnx.Rngs(params=0)))
        graphdef, param_state, stats_state = nnx.split(abstract, nnx.Param, nnx.BatchStat)
        nnx.replace_by_pure_dict(param_state, params)
        nnx.replace_by_pure_dict(stats_state, batch_stats)
        return nnx.merge(graphdef, param_state, stats_state)

    def __call__(self, params: Tree, batch_stats: Tree, images: jax.Array, *, train: bool) -> tuple[jax.Array, Tree]:
        """Returns L2-normalized embeddings `(N, dim)`, float32 or better, and the new batch statistics.

        Normalization is PyTorch's: embeddings are divided by max(norm, 1e-12).

        Args:
          params: parameters of this encoder.
          batch_stats: running averages of this encoder.
          images: `(N, H, W, in_channels)` float, normalized.
          train: normalize with the batch's statistics and move the running averages.
        """
        module = self.bind(params, batch_stats)
        outputs = module(images, train=train)
        outputs = outputs.astype(np.promote_types(outputs.dtype, jnp.float32))
        # max under the root keeps the gradient at zero finite.
        square = jnp.sum(jnp.square(outputs), axis=-1, keepdims=True)
        embeddings = outputs * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return embeddings, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
