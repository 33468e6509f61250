"""Implicit Feature Modification (Robinson et al., NeurIPS 2021) on MoCo-v2, in JAX.

    import ifm_jax
    ifm_jax.losses.ifm_info_nce(query, key, queue, temperature, epsilon)     the loss of each query
    ifm_jax.models.resnet50(num_classes=..., rngs=...)                        torchvision's networks
    ifm_jax.PretrainStep(...)                                                 one training step
    ifm_jax.train(config, workdir)                                            a run
    ifm_jax.load(path)                                                        the frozen backbone of a run
    ifm_jax.preprocess(images)                                                images as this backbone expects them
    ifm_jax.evaluate(path)                                                    nearest neighbors and linear readouts

Importing this takes no time: every name is imported when it is first used.
"""

import importlib

TYPE_CHECKING = False  # same as typing's, without its slow import
if TYPE_CHECKING:
    from ifm_jax import augment, config, errors, models, optim, pretrain, sharding
    from ifm_jax.config import Config
    from ifm_jax.data.preprocessing import preprocess
    from ifm_jax.errors import RunError, UsageError
    from ifm_jax.evaluation.quick import evaluate
    from ifm_jax.methods import losses, queue
    from ifm_jax.models import Encoder
    from ifm_jax.pretrain import PretrainStep, TrainState
    from ifm_jax.runs.loading import load
    from ifm_jax.runs.training import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Encoder",
    "PretrainStep",
    "RunError",
    "TrainState",
    "UsageError",
    "augment",
    "config",
    "errors",
    "evaluate",
    "load",
    "losses",
    "models",
    "optim",
    "preprocess",
    "pretrain",
    "queue",
    "sharding",
    "train",
]

# A script prepares its process (`process.begin`) before it imports JAX, so nothing is imported here.
_HOMES = {
    "Config": "config",
    "Encoder": "models",
    "PretrainStep": "pretrain",
    "RunError": "errors",
    "TrainState": "pretrain",
    "UsageError": "errors",
    "evaluate": "evaluation.quick",
    "load": "runs.loading",
    "preprocess": "data.preprocessing",
    "train": "runs.training",
}
_MODULES = ("augment", "config", "errors", "losses", "models", "optim", "pretrain", "queue", "sharding")


if not TYPE_CHECKING:  # a type checker knows the names above, and is to reject others

    def __getattr__(name: str):
        if name in _HOMES:
            value = getattr(importlib.import_module(f"ifm_jax.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"ifm_jax.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
