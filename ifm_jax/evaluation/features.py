"""Frozen features of images: the query encoder's backbone, before the projection head, in evaluation mode."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from ifm_jax.data import Source
from ifm_jax.models import Encoder
from ifm_jax.models.encoder import Tree


def backbone(encoder: Encoder, params: Tree, batch_stats: Tree) -> Callable[[jax.Array], jax.Array]:
    """Returns the frozen backbone as a compiled function of uint8 images, `(N, H, W, 3)` -> float32 `(N, features)`.

    Args:
      encoder: of which the head is left out.
      params: of the encoder, with or without a head.
      batch_stats: of the encoder; these running averages normalise, and are not moved.
    """
    headless = dataclasses.replace(encoder, dim=0)
    params = {name: value for name, value in params.items() if name != "fc"}

    @jax.jit
    def features(params, batch_stats, images):
        views = normalize(images.astype(jnp.float32) / 255.0, IMAGENET_MEAN, IMAGENET_STD)
        module = headless.bind(params, batch_stats)
        return module(views.astype(headless.compute_dtype), train=False).astype(jnp.float32)

    return lambda images: features(params, batch_stats, images)


def extract(function: Callable, source: Source, batch_size: int = 256) -> np.ndarray:
    """Returns the features of every image of a source, float32 `(len(source), features)`, in its order.

    Args:
      function: from `backbone`.
      source: of images.
      batch_size: images at a time; the last batch is filled up, so that one program serves all.
    """
    parts = []
    for begin in range(0, len(source), batch_size):
        indices = np.arange(begin, begin + batch_size)
        images = source.batch(np.minimum(indices, len(source) - 1))["image"]
        parts.append(function(images))
    return np.concatenate(jax.device_get(parts))[: len(source)]
