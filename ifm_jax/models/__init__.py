"""Networks: torchvision's ResNet family, grouped BatchNorm, projection heads."""

from ifm_jax.choices import HEADS, STEMS, Head, RunningStats, Stem
from ifm_jax.models.batch_norm import BatchNorm
from ifm_jax.models.encoder import Encoder, only_head, without_head
from ifm_jax.models.heads import HCLHead, MLPHead
from ifm_jax.models.resnet import (
    ARCHITECTURES,
    ResNet,
    create,
    resnet8,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "ARCHITECTURES",
    "HEADS",
    "STEMS",
    "BatchNorm",
    "Encoder",
    "HCLHead",
    "Head",
    "MLPHead",
    "ResNet",
    "RunningStats",
    "Stem",
    "create",
    "only_head",
    "resnet8",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "without_head",
]
