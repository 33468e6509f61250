"""Implicit Feature Modification (Robinson et al., NeurIPS 2021) on MoCo-v2, in JAX.

    import ifm_jax
    ifm_jax.losses.ifm_info_nce(query, key, queue, temperature, epsilon)     the loss of each query
    ifm_jax.models.resnet50(num_classes=..., rngs=...)                        torchvision's networks
    ifm_jax.PretrainStep(...)                                                 one training step
    ifm_jax.train(config, workdir)                                            a run
    ifm_jax.load(path)                                                        the frozen backbone of one

Importing this pulls in neither PyTorch nor TensorFlow nor Grain; `train` and `load` import what they need when called.
"""

import importlib
import sys

from ifm_jax import augment, models, optim, sharding
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError
from ifm_jax.methods import losses, queue
from ifm_jax.models import Encoder
from ifm_jax.pretrain import PretrainStep
from ifm_jax.state import TrainState

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Encoder",
    "PretrainStep",
    "RunError",
    "TrainState",
    "UsageError",
    "augment",
    "load",
    "losses",
    "models",
    "optim",
    "queue",
    "sharding",
    "train",
]

# `from ifm_jax.losses import info_nce`: the names that these modules had before they moved.
sys.modules |= {f"{__name__}.losses": losses, f"{__name__}.queue": queue}

# Public functions whose modules are slow to import (Orbax, Grain): found on first use.
_LAZY = {"load": "ifm_jax.loading", "train": "ifm_jax.training"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
