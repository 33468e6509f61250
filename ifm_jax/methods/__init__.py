"""Methods of contrastive learning, and the losses that they share."""

from ifm_jax.choices import OBJECTIVES, Kind, ShuffleBN
from ifm_jax.methods.method import Method, Objective, Outcome, Views
from ifm_jax.methods.moco import MoCo, MoCoMemory
from ifm_jax.methods.simclr import SimCLR

METHODS: dict[str, type[MoCo] | type[SimCLR]] = {"moco": MoCo, "simclr": SimCLR}

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "Kind",
    "Method",
    "MoCo",
    "MoCoMemory",
    "Objective",
    "Outcome",
    "ShuffleBN",
    "SimCLR",
    "Views",
]
