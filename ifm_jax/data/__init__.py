"""Image sources and the input pipeline."""

from ifm_jax.data.bad_images import BadImages
from ifm_jax.data.digits import Digits
from ifm_jax.data.pipeline import steps_per_epoch, training_batches
from ifm_jax.data.protocols import Source, ViewSource
from ifm_jax.data.sources import open_source
from ifm_jax.data.trifeature import Trifeature

__all__ = [
    "BadImages",
    "Digits",
    "Source",
    "Trifeature",
    "ViewSource",
    "open_source",
    "steps_per_epoch",
    "training_batches",
]
