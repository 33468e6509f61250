"""Where images come from: one small protocol, and the source a config names."""

from typing import Protocol

import numpy as np

from ifm_jax.config import DataConfig
from ifm_jax.data.trifeature import Trifeature
from ifm_jax.errors import UsageError

SPLITS = ("train", "test")


class Source(Protocol):
    """Random access to images and their labels.

    Attributes:
      label_names: the classes of each label, for example `{"shape": ("circle", ...), ...}`; empty without labels.
    """

    label_names: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        """Returns the number of images."""

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `image`, uint8 `(N, H, W, 3)`, and int32 `(N,)` for each label."""


def open_source(data: DataConfig, split: str) -> Source:
    """Returns the source that the config names.

    Args:
      data: a validated config's.
      split: "train" or "test".

    Raises:
      UsageError: if there is no such source.
    """
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if data.source == "trifeature":
        tri = data.trifeature
        source = Trifeature(
            split=split,
            size=tri.train_size if split == "train" else tri.test_size,
            image_size=data.image_size,
            seed=tri.seed,
            num_shapes=tri.shapes,
            num_textures=tri.textures,
            num_colors=tri.colors,
            rotation=tri.rotation,
            texture_rotation=tri.texture_rotation,
            texture_period=tri.texture_period,
            scale=(tri.scale_min, tri.scale_max),
            noise=tri.noise,
        )
        source.images()  # drawn once, now, and looked up from here on
        return source
    raise UsageError(f"data.source={data.source!r} is not in this version: expected trifeature")
