"""Where images come from: two small protocols, and the source a config names."""

from typing import Protocol, runtime_checkable

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
        """Returns `image`, uint8 `(N, H, W, 3)`, and int32 `(N,)` for each label; as they are read out."""

    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label."""


@runtime_checkable
class ViewSource(Source, Protocol):
    """A source that cuts the two views of an image itself, on the host, to uint8; the rest happens on the device."""

    def views(self, index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns query and key of one image, uint8 `(H, W, 3)`, cut independently. Threads may call it at once.

        Args:
          index: of the image.
          number: a random number, 0 to 2**63 - 1; the same one gives the same views.

        Raises:
          RunError: if the image cannot be read.
        """


def open_source(data: DataConfig, split: str) -> Source:
    """Returns the source that the config names.

    The trifeature augmentation crops on the device; for the others the source cuts the views, and is a `ViewSource`.

    Args:
      data: a validated config's.
      split: "train" or "test".

    Raises:
      UsageError: if there is no such source, or it does not hold what the config asks for.
    """
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    kind, _, rest = data.source.partition(":")
    if kind == "trifeature":
        source = _open_trifeature(data, split)
        if data.augmentation == "trifeature":
            return source
        from ifm_jax.data.crops import Cropped

        return Cropped(source)
    if kind == "folder":
        from ifm_jax.data.folder import open_folder  # with OpenCV, which the embedded images do without

        return open_folder(rest, split, image_size=data.image_size, classes=data.classes)
    raise UsageError(f"data.source={data.source!r} is not in this version: expected trifeature or folder:PATH")


def _open_trifeature(data: DataConfig, split: str) -> Trifeature:
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
