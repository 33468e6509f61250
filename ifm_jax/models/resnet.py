"""The ResNet family as torchvision defines it, on `(N, H, W, C)` images.

The parameters have the same names (`conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`). The arithmetic is the same: symmetric
padding (`SAME` pads differently at stride 2), the stride in the 3x3 convolution of a bottleneck (ResNet v1.5), ReLU
after the stem, biased-variance normalization, and the same initial distributions.

Sources: He et al. 2016; torchvision.models.resnet; Xie et al. 2017 (ResNeXt); Zagoruyko and Komodakis 2016 (wide).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ifm_jax.choices import STEMS, CPUConvolutions, Head, RunningStats, Stem
from ifm_jax.models import convolution, heads, layers
from ifm_jax.models.activation import block_relu
from ifm_jax.models.batch_norm import BatchNorm
from ifm_jax.models.pooling import max_pool


class Architecture(NamedTuple):
    """The parameters that distinguish ResNets.

    Attributes:
      bottleneck: three convolutions per block (1x1, 3x3, 1x1), expansion 4, instead of two 3x3.
      depths: number of blocks in each stage.
      groups: number of groups in the 3x3 convolutions (ResNeXt's cardinality).
      width_per_group: width of a group where the stage has 64 channels (wide ResNets: 128).
      width: number of channels in the stem and the first stage; each later stage doubles them.
    """

    bottleneck: bool
    depths: tuple[int, ...]
    groups: int = 1
    width_per_group: int = 64
    width: int = 64


ARCHITECTURES = {
    # The smallest of He et al.'s CIFAR networks (section 4.2): three stages, 16 channels in the first.
    "resnet8": Architecture(False, (1, 1, 1), width=16),
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "wide_resnet50_2": Architecture(True, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Architecture(True, (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Architecture(True, (3, 4, 23, 3), groups=64, width_per_group=4),
}


# Kaiming normal over the fan-out, gain of ReLU (torchvision's initialization of every convolution).
_kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    in_features: int,
    out_features: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    cpu_convolutions: CPUConvolutions,
    **options: Any,
) -> layers.Conv:
    """Returns a convolution without bias, padded by (kernel - 1) / 2 on every side like PyTorch's."""
    pad = (kernel - 1) // 2
    return layers.Conv(
        in_features,
        out_features,
        kernel_size=(kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_kaiming_normal,
        conv_general_dilated=convolution.ON_CPU[cpu_convolutions],
        **options,
    )


class Downsample(nnx.Module):
    """The shortcut where a block changes resolution or channels: 1x1 convolution and normalization."""

    def __init__(self, conv: layers.Conv, norm: BatchNorm):
        self.conv = conv
        self.norm = norm

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `(N, H, W, in)` to `(N, H / stride, W / stride, out)`."""
        return self.norm(self.conv(x), train=train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        arch: Architecture,
        conv: Callable[..., layers.Conv],
        norm: Callable[[int], BatchNorm],
    ):
        if arch.groups != 1 or arch.width_per_group != 64:
            raise ValueError(
                "a basic block supports only one group and width_per_group 64: use a bottleneck block for others"
            )
        self.conv1 = conv(in_features, features, 3, stride=stride)
        self.bn1 = norm(features)
        self.conv2 = conv(features, features, 3)
        self.bn2 = norm(features)
        self.downsample = nnx.data(None)
        if stride != 1 or in_features != features:
            self.downsample = Downsample(conv(in_features, features, 1, stride=stride), norm(features))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `(N, H, W, in)` to `(N, H / stride, W / stride, features * expansion)`."""
        shortcut = x if self.downsample is None else self.downsample(x, train=train)
        y = self.bn1(self.conv1(x), train=train, relu=True)
        y = self.bn2(self.conv2(y), train=train)
        return block_relu(y + shortcut)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the stride is in the 3x3 (ResNet v1.5)."""

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        arch: Architecture,
        conv: Callable[..., layers.Conv],
        norm: Callable[[int], BatchNorm],
    ):
        width = features * arch.width_per_group // 64 * arch.groups
        out_features = features * self.expansion
        self.conv1 = conv(in_features, width, 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride, groups=arch.groups)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_features, 1)
        self.bn3 = norm(out_features)
        self.downsample = nnx.data(None)
        if stride != 1 or in_features != out_features:
            self.downsample = Downsample(conv(in_features, out_features, 1, stride=stride), norm(out_features))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `(N, H, W, in)` to `(N, H / stride, W / stride, features * expansion)`."""
        shortcut = x if self.downsample is None else self.downsample(x, train=train)
        y = self.bn1(self.conv1(x), train=train, relu=True)
        y = self.bn2(self.conv2(y), train=train, relu=True)
        y = self.bn3(self.conv3(y), train=train)
        return block_relu(y + shortcut)


class ResNet(nnx.Module):
    """A ResNet: images `(N, H, W, 3)` -> `(N, num_classes)`, or pooled features if there is no head.

    Args:
      arch: name of the architecture; see `ARCHITECTURES`.
      num_classes: number of outputs of `fc`; 0: no head, the result is the `(N, num_features)` pooled features.
      head: kind of `fc`: "linear" (one layer), "mlp" (MoCo-v2's and SimCLR's) or "hcl"; see `heads`.
      mlp: another spelling of `head="mlp"`.
      stem: "imagenet" (7x7 stride 2, max-pooling), "small" (3x3, no pooling: images of 32 to 64 px) or
        "small_stride2" (5x5 stride 2, no pooling: the cheaper one for processors without an accelerator).
      bn_groups: groups of every BatchNorm in training (see `batch_norm`).
      running_stats: which statistics the running averages follow, "first_group" or "mean".
      dtype: dtype of convolutions and products (None: the promoted dtype of images and parameters); normalization
        statistics are always float32 or better.
      param_dtype: dtype of parameters and running averages.
      reduce_over: mesh of the devices over which gradients are summed in `param_dtype` (see `layers`); None: in
        `dtype`, if there are several.
      cpu_convolutions: who computes convolutions on a CPU, "xla" or "onednn" (one device; see `convolution`).
      in_channels: channels of an image.
      rngs: an `nnx.Rngs` with a `params` stream.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        num_classes: int = 1000,
        head: Head = "linear",
        mlp: bool = False,
        stem: Stem = "imagenet",
        bn_groups: int = 1,
        running_stats: RunningStats = "first_group",
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        reduce_over: jax.sharding.Mesh | None = None,
        cpu_convolutions: CPUConvolutions = "xla",
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "reduce_over": reduce_over, "rngs": rngs}
        conv = functools.partial(_conv, cpu_convolutions=cpu_convolutions, **options)
        norm = functools.partial(BatchNorm, groups=bn_groups, running_stats=running_stats, param_dtype=param_dtype)
        block = Bottleneck if arch.bottleneck else BasicBlock

        self.arch = arch
        self.stem = stem
        if stem == "imagenet":
            self.conv1 = conv(in_channels, arch.width, 7, stride=2)
        elif stem == "small":
            self.conv1 = conv(in_channels, arch.width, 3)
        elif stem == "small_stride2":
            self.conv1 = conv(in_channels, arch.width, 5, stride=2)
        else:
            raise ValueError(f"unknown stem {stem!r}: expected one of {', '.join(STEMS)}")
        self.bn1 = norm(arch.width)

        in_features = arch.width
        for stage, depth in enumerate(arch.depths):
            features = arch.width * 2**stage
            blocks: dict[str, BasicBlock | Bottleneck] = {}
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks[str(i)] = block(in_features, features, stride=stride, arch=arch, conv=conv, norm=norm)
                in_features = features * block.expansion
            setattr(self, f"layer{stage + 1}", nnx.Dict(blocks))

        self.num_features = in_features
        self.fc = nnx.data(None)
        if num_classes:
            self.fc = heads.create("mlp" if mlp else head, in_features, num_classes, norm=norm, **options)

    def features(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        """Returns the `(N, num_features)` globally pooled features before the head, in the compute dtype.

        Args:
          images: `(N, H, W, in_channels)` float, normalized.
          train: normalize with the batch's statistics and move the running averages.
        """
        x = self.bn1(self.conv1(jnp.asarray(images)), train=train, relu=True)
        if self.stem == "imagenet":
            x = max_pool(x)
        for stage, depth in enumerate(self.arch.depths):
            blocks = getattr(self, f"layer{stage + 1}")
            for i in range(depth):  # by number: nnx.split and nnx.merge sort the keys as text, "10" before "2"
                x = blocks[str(i)](x, train=train)
        return jnp.mean(x, axis=(1, 2), dtype=np.promote_types(x.dtype, jnp.float32)).astype(x.dtype)

    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        """Returns `(N, num_classes)`, or the features if there is no head; arguments as for `features`."""
        x = self.features(images, train=train)
        if self.fc is None:
            return x
        return self.fc(x, train=train) if isinstance(self.fc, heads.HCLHead) else self.fc(x)


def create(
    arch: str,
    *,
    num_classes: int = 1000,
    head: heads.Head = "linear",
    mlp: bool = False,
    stem: Stem = "imagenet",
    width: int = 0,
    in_channels: int = 3,
    bn_groups: int = 1,
    running_stats: RunningStats = "first_group",
    dtype: jnp.dtype | None = None,
    param_dtype: jnp.dtype = jnp.float32,
    reduce_over: jax.sharding.Mesh | None = None,
    cpu_convolutions: CPUConvolutions = "xla",
    rngs: nnx.Rngs,
) -> ResNet:
    """Builds a ResNet by name.

    Args:
      arch: one of `ARCHITECTURES`.
      num_classes: see `ResNet`; likewise the others.
      head: kind of `fc`.
      mlp: another spelling of `head="mlp"`.
      stem: "imagenet", "small" or "small_stride2".
      width: channels of the first stage; 0: the architecture's own (64; 16 for resnet8).
      in_channels: channels of an image.
      bn_groups: groups of every BatchNorm in training.
      running_stats: which statistics the running averages follow.
      dtype: dtype of convolutions and products.
      param_dtype: dtype of parameters and running averages.
      reduce_over: mesh of the devices over which gradients are summed in `param_dtype`.
      cpu_convolutions: who computes convolutions on a CPU, "xla" or "onednn".
      rngs: an `nnx.Rngs` with a `params` stream.

    Raises:
      ValueError: if the name is unknown.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: expected one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[arch]
    return ResNet(
        architecture._replace(width=width) if width else architecture,
        num_classes=num_classes,
        head=head,
        mlp=mlp,
        stem=stem,
        in_channels=in_channels,
        bn_groups=bn_groups,
        running_stats=running_stats,
        dtype=dtype,
        param_dtype=param_dtype,
        reduce_over=reduce_over,
        cpu_convolutions=cpu_convolutions,
        rngs=rngs,
    )


_FACTORY_DOC = """Builds a {name} with fresh parameters: images `(N, H, W, 3)` -> `(N, num_classes)`.

    {layout}

    Args:
      num_classes: number of outputs of `fc`; 0: no head, the result is the `(N, num_features)` pooled features.
      head: kind of `fc`: "linear" (one layer), "mlp" (MoCo-v2's and SimCLR's) or "hcl"; see `heads`.
      mlp: another spelling of `head="mlp"`.
      stem: "imagenet" (7x7 stride 2, max-pooling), "small" (3x3, no pooling: images of 32 to 64 px) or
        "small_stride2" (5x5 stride 2, no pooling).
      width: channels of the first stage; 0: the architecture's own, {width}.
      in_channels: channels of an image.
      bn_groups: groups of every BatchNorm in training (see `batch_norm`).
      running_stats: which statistics the running averages follow, "first_group" or "mean".
      dtype: dtype of convolutions and products; None: the promoted dtype of images and parameters.
      param_dtype: dtype of parameters and running averages.
      reduce_over: mesh of the devices over which gradients are summed in `param_dtype`; None: in `dtype`, if there are
        several.
      cpu_convolutions: who computes convolutions on a CPU, "xla" or "onednn" (one device; see `convolution`).
      rngs: an `nnx.Rngs` with a `params` stream.
    """


Options = ParamSpec("Options")


def _factory(name: str, create: Callable[Concatenate[str, Options], ResNet]) -> Callable[Options, ResNet]:
    """Returns a function that builds the named architecture, as in torchvision.models, with the options of `create`."""

    def build(*args: Options.args, **options: Options.kwargs) -> ResNet:
        return create(name, *args, **options)

    signature = inspect.signature(create)
    named = [parameter for parameter in signature.parameters.values() if parameter.name != "arch"]
    build.__signature__ = signature.replace(parameters=named)  # pyrefly: ignore[missing-attribute] (help shows it)
    architecture = ARCHITECTURES[name]
    torchvisions = len(architecture.depths) == 4
    build.__name__ = build.__qualname__ = name
    build.__doc__ = _FACTORY_DOC.format(
        name=name,
        layout="It has torchvision's layout." if torchvisions else "It is He et al.'s smallest network for CIFAR.",
        width=architecture.width,
    )
    return build


resnet8 = _factory("resnet8", create)
resnet18 = _factory("resnet18", create)
resnet34 = _factory("resnet34", create)
resnet50 = _factory("resnet50", create)
resnet101 = _factory("resnet101", create)
resnet152 = _factory("resnet152", create)
wide_resnet50_2 = _factory("wide_resnet50_2", create)
wide_resnet101_2 = _factory("wide_resnet101_2", create)
resnext50_32x4d = _factory("resnext50_32x4d", create)
resnext101_32x8d = _factory("resnext101_32x8d", create)
resnext101_64x4d = _factory("resnext101_64x4d", create)
