"""What an image source offers: three protocols, each with more than the one before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from ifm_jax.data.crops import RandomCrops


class Images(Protocol):
    """Random access to images."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `image`, uint8 `(N, H, W, 3)`, and int32 `(N,)` for each label; the evaluation views."""


class Source(Images, Protocol):
    """Random access to images and their labels.

    Attributes:
      label_names: class names of each label, for example `{"shape": ("circle", ...), ...}`; empty without labels.
      fingerprint: a hash of the images and their order, independent of where they are stored.
      earlier_fingerprints: its values in earlier versions, so that their runs can resume; empty: the same.
    """

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]: ...  # noqa: D102 (an attribute)

    if TYPE_CHECKING:  # hidden from isinstance(), which would compute it on Python 3.11

        @property
        def fingerprint(self) -> str: ...  # noqa: D102

        @property
        def earlier_fingerprints(self) -> tuple[str, ...]: ...  # noqa: D102

    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label; -1 where an image has none."""


@runtime_checkable
class ViewSource(Source, Protocol):
    """A source that cuts uint8 views of an image itself, on the host; the rest of the augmentation runs on the device.

    Attributes:
      image_size: side of a view in pixels.
      random_crops: the number of views and their size range.
      channels: channels of an image, 3 unless it has random bits.
    """

    image_size: int
    random_crops: "RandomCrops"
    channels: int

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Returns random crops of one image, each uint8 `(H, W, 3)`, cut independently. Thread-safe.

        Args:
          index: number of the image.
          uniforms: `random_crops.draws` random numbers in [0, 1); the same ones give the same views.

        Raises:
          UnreadableImageError: if the image cannot be read.
        """

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image stretched or shrunk to a square, uint8 `(side, side, 3)`, and its original size.

        Raises:
          UnreadableImageError: if the image cannot be read.
        """

    def name(self, index: int) -> str:
        """Returns the display name of an image: the path of its file, or its record."""
