"""What is learned from: methods of contrastive learning, and the losses that they share."""

from ifm_jax.methods.method import OBJECTIVES, Method, Objective, Outcome, Views
from ifm_jax.methods.moco import MoCo, MoCoMemory
from ifm_jax.methods.simclr import SimCLR

METHODS: dict[str, type] = {"moco": MoCo, "simclr": SimCLR}

__all__ = ["METHODS", "OBJECTIVES", "Method", "MoCo", "MoCoMemory", "Objective", "Outcome", "SimCLR", "Views"]
