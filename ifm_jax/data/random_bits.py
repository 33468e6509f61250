"""RandBit: a random integer for each image, as constant channels that both views share.

Chen, Luo and Li, "Intriguing properties of contrastive losses" (NeurIPS 2021), append the bits of a random integer to
an image, as channels that the augmentation leaves alone. Both views of an image have the same bits, so they are an easy
feature, of known strength, that competes with what the image shows: with more bits, less of it is learned. Here the
integer belongs to the image: a hash of split and number, the same in every epoch and every run.
"""

import hashlib
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from ifm_jax.data.protocols import Source, ViewSource
from ifm_jax.drawing import SPLITS, words

Of = TypeVar("Of", bound=Source)


class WithRandomBits(Generic[Of]):
    """A source whose images have further channels, one for each bit: 0 or 255 everywhere.

    Its labels are those of the images.

    Attributes:
      source: source of the images, uint8 `(H, W, 3)`.
      bits: bits of each image, uint8 `(N, bits)`, 0 or 1.
    """

    earlier_fingerprints: tuple[str, ...] = ()

    def __init__(self, source: Of, bits: int, split: str):
        """Draws the bits.

        Args:
          source: source of the images.
          bits: number of bits.
          split: "train" or "test"; the two share no draw.
        """
        self.source, self.label_names = source, source.label_names
        stream = np.array([1 + SPLITS.index(split)], np.uint64)
        integers = words(stream, np.arange(1, len(source) + 1))[:, None]
        self.bits = (integers >> np.arange(bits, dtype=np.uint64) & np.uint64(1)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """A hash of the images, their order and their bits."""
        return hashlib.sha256(self.source.fingerprint.encode() + np.packbits(self.bits).tobytes()).hexdigest()[:24]

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns several images with their labels, `image` uint8 `(N, H, W, 3 + bits)`; see `Source`."""
        found = self.source.examples(indices)
        return found | {"image": _appended(found["image"], self.bits[indices][:, None, None])}

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images."""
        return self.source.labels()


class ViewsWithRandomBits(WithRandomBits["ViewSource"]):
    """The same of a `ViewSource`, and a `ViewSource` too: all views of an image have its bits."""

    def __init__(self, source: "ViewSource", bits: int, split: str):
        super().__init__(source, bits, split)
        self.image_size, self.random_crops, self.channels = source.image_size, source.random_crops, 3 + bits

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        return tuple(_appended(view, self.bits[index]) for view in self.source.views(index, uniforms))

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square; see `ViewSource`."""
        image, size = self.source.whole(index, side)
        return _appended(image, self.bits[index]), size

    def name(self, index: int) -> str:
        """Returns the display name of an image; see `ViewSource`."""
        return self.source.name(index)


def _appended(images: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Returns images with their bits as further channels."""
    return np.concatenate([images, np.broadcast_to(255 * bits, (*images.shape[:-1], bits.shape[-1]))], axis=-1)
