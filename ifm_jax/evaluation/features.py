"""Frozen features of images: the query encoder in evaluation mode, before or after its projection head."""

import concurrent.futures
import copy
import dataclasses
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ifm_jax import sharding
from ifm_jax.augment import normalize
from ifm_jax.data import Source
from ifm_jax.errors import UsageError
from ifm_jax.models import Encoder, without_head
from ifm_jax.models.encoder import Tree

LAYERS = ("backbone", "projection")


class FrozenEncoder:
    """A network that never changes: it normalizes with its running averages, and no gradient flows into it.

    Attributes:
      weights: parameters and running averages, on every device of the mesh; the first argument of `apply`.
      mesh: mesh of the devices.
    """

    def __init__(
        self,
        encoder: Encoder,
        params: Tree,
        batch_stats: Tree,
        *,
        mesh: jax.sharding.Mesh | None = None,
        layer: str = "backbone",
    ):
        """Wraps an encoder.

        Args:
          encoder: architecture of the network.
          params: parameters of the encoder, with or without a head.
          batch_stats: statistics of the encoder.
          mesh: mesh of the devices; None: all of them.
          layer: "backbone", the pooled features, or "projection", the embedding, L2-normalized.

        Raises:
          UsageError: if the projection is asked for and there is no head.
        """
        if layer == "projection" and "fc" not in params:
            raise UsageError(
                "the checkpoint has no projection head: expected a checkpoint with one, or --layer=backbone"
            )
        if layer == "backbone":
            encoder = dataclasses.replace(encoder, dim=0)
            params, batch_stats = without_head(params), without_head(batch_stats)
        self._encoder, self._layer = encoder, layer
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        self.weights = jax.tree.map(self._place, (params, batch_stats))
        whole = sharding.replicated(self.mesh)
        self._of_images = jax.jit(self._features, in_shardings=(whole, sharding.split(self.mesh)), out_shardings=whole)

    def _place(self, array: ArrayLike) -> jax.Array:
        value = np.asarray(array)
        placement = sharding.replicated(self.mesh)
        return jax.make_array_from_callback(value.shape, placement, lambda index: value[index])

    def holding(self, params: Tree, batch_stats: Tree) -> "FrozenEncoder":
        """Returns the same network with other weights, without recompiling.

        Args:
          params: parameters on the devices of the mesh.
          batch_stats: likewise.
        """
        other = copy.copy(self)
        if self._layer == "backbone":
            params, batch_stats = without_head(params), without_head(batch_stats)
        other.weights = params, batch_stats
        return other

    def apply(self, weights: tuple[Tree, Tree], views: jax.Array) -> jax.Array:
        """Returns the features of normalized views, `(N, H, W, 3)` -> `(N, features)`, float32 or better.

        This is a pure function, for use in a compiled step. The weights are an argument: XLA would try to fold constant
        weights while it compiles.
        """
        views = views.astype(self._encoder.compute_dtype)
        if self._layer == "projection":
            return self._encoder(*weights, views, train=False)[0]
        features = self._encoder.bind(*weights)(views, train=False)
        return features.astype(np.promote_types(features.dtype, jnp.float32))

    def _features(self, weights: tuple[Tree, Tree], images: jax.Array) -> jax.Array:
        dtype = jnp.float64 if self._encoder.compute_dtype == "float64" else jnp.float32
        return self.apply(weights, normalize(images.astype(dtype) / 255))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the features of uint8 images `(N, H, W, 3)`, split over the devices, on every device."""
        return self._of_images(self.weights, images)

    def digest(self) -> str:
        """Returns a hash of all tensors."""
        digest = hashlib.sha256()
        for path, value in jax.tree_util.tree_leaves_with_path(self.weights):
            value = np.asarray(value)
            digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()[:24]


def extract(
    frozen: FrozenEncoder, source: Source, batch_size: int = 256, *, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Returns the features of every image's evaluation view, in the source's order, each exactly once.

    Each host reads its piece of every batch; all hosts get the whole result.

    Args:
      frozen: frozen network.
      source: source of images.
      batch_size: images at a time on all devices, rounded up to a multiple of their number; the last batch is padded,
        so that one program serves all batches.
      progress: receives the number of images done.

    Returns:
      `(len(source), features)`, float32 or better.

    Raises:
      RunError: if an image cannot be read.
    """
    count, devices = len(source), frozen.mesh.size
    batch_size = -(-min(batch_size, count) // devices) * devices
    local = batch_size // jax.process_count()

    def read(begin: int) -> np.ndarray:
        indices = begin + jax.process_index() * local + np.arange(local)
        return source.examples(np.minimum(indices, count - 1))["image"]

    begins = range(0, count, batch_size)
    result, pending = None, None
    # Read images and fetch results while the device computes.
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        following = reader.submit(read, 0)
        for begin in [*begins, None]:
            computing = None
            if begin is not None:
                images = following.result()
                if begin + batch_size < count:
                    following = reader.submit(read, begin + batch_size)
                computing = begin, frozen(sharding.put_batch(frozen.mesh, {"image": images})["image"])
            if pending is not None:
                done, features = pending[0], np.asarray(pending[1])
                if result is None:
                    result = np.empty((count, features.shape[1]), features.dtype)
                result[done : done + batch_size] = features[: count - done]
                if progress is not None:
                    progress(min(done + batch_size, count))
            pending = computing
    assert result is not None  # there are images, or range() would have rejected steps of 0
    return result
