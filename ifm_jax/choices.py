"""The names from which a caller chooses: networks, methods, losses, optimizers, file formats.

This uses only the standard library, so that flags and configs are checked without importing JAX, which takes a second.
What a name stands for is where it is implemented, which a test compares with this list.
"""

from typing import Literal, get_args

ARCHITECTURES = (
    "resnet8",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)

# First layers of a network.
Stem = Literal["imagenet", "small", "small_stride2"]
STEMS: tuple[str, ...] = get_args(Stem)

# Statistics that BatchNorm's running averages follow.
RunningStats = Literal["first_group", "mean"]

# Who computes convolutions on a CPU.
CPUConvolutions = Literal["xla", "onednn"]
CPU_CONVOLUTIONS: tuple[str, ...] = get_args(CPUConvolutions)

METHODS = ("moco", "simclr")

# Services that show the metrics of a run.
LOGGERS = ("wandb", "mlflow", "trackio")

# Losses on a method's margins.
Kind = Literal["infonce", "ifm", "ifm_only"]
OBJECTIVES: tuple[str, ...] = get_args(Kind)

# Orders in which MoCo computes keys.
ShuffleBN = bool | Literal["balanced"]

# Projection heads.
Head = Literal["linear", "mlp", "hcl"]
HEADS: tuple[str, ...] = get_args(Head)

Optimizer = Literal["sgd", "lars", "adamw", "adam"]
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)

# Learning-rate schedules.
Schedule = Literal["cosine", "step"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

# Formats of PyTorch files, named after the programs that read them.
Target = Literal["moco", "torchvision", "timm"]
TARGETS: tuple[str, ...] = get_args(Target)
