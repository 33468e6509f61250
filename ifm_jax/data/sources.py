"""The image source that a config names, and a part of a source."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

import numpy as np

from ifm_jax import config as configs
from ifm_jax.config import DataConfig, DigitsConfig
from ifm_jax.data.digits import Digits
from ifm_jax.data.protocols import Source, ViewSource
from ifm_jax.data.random_bits import ViewsWithRandomBits, WithRandomBits
from ifm_jax.data.trifeature import Trifeature
from ifm_jax.drawing import SPLITS, Drawn
from ifm_jax.errors import UsageError

# Least area of a training crop, relative to the image's; the greatest is the whole.
_LEAST_AREA = {"moco_v1": 0.2, "moco_v2": 0.2, "moco_cifar": 0.08}


def open_source(data: DataConfig, split: str) -> Source:
    """Returns the source that the config names.

    The trifeature augmentation crops on the device, and takes drawn images; for the others the source is a
    `ViewSource`, which cuts the two views of pre-training.

    Args:
      data: data section of a validated config.
      split: "train" or "test".

    Raises:
      UsageError: if there is no such source, or it lacks what the config asks for.
    """
    if configs.drawn_source(data) and data.augmentation == "trifeature":
        bits, images = configs.random_bits(data)[0], _open_drawn(data, split)
        return WithRandomBits(images, bits, split) if bits else images
    return open_views(data, split, count=2, least_area=_LEAST_AREA.get(data.augmentation, 0.2))


def open_views(data: DataConfig, split: str, *, count: int, least_area: float) -> ViewSource:
    """Returns the source that the config names, which cuts `count` views of each image.

    Args:
      data: data section of a validated config.
      split: "train" or "test".
      count: number of views per image.
      least_area: least area of a crop, relative to the image's: 0.08 for a linear probe.

    Raises:
      UsageError: see `open_source`.
    """
    bits, source = configs.random_bits(data)
    if bits:
        plain = dataclasses.replace(data, source=source)
        return ViewsWithRandomBits(open_views(plain, split, count=count, least_area=least_area), bits, split)
    # These import OpenCV, which drawn images alone do not need.
    from ifm_jax.data.crops import RandomCrops
    from ifm_jax.data.images import Cropped

    random_crops = RandomCrops(count, (least_area, 1.0))
    kind, _, rest = source.partition(":")
    if configs.drawn_source(data):
        return Cropped(_open_drawn(data, split), random_crops)
    options = {"image_size": data.image_size, "classes": data.classes, "random_crops": random_crops}
    if kind == "folder":
        from ifm_jax.data.folder import open_folder

        return open_folder(rest, split, **options)
    if kind == "tfds":
        from ifm_jax.data.tfds import open_tfds

        expression = data.train_split if split == "train" else data.test_split
        return open_tfds(rest, split, expression=expression, **options)
    if kind == "array":
        from ifm_jax.data.array import open_array

        return open_array(rest, split, **options)
    raise UsageError(f"data.source={data.source!r}: expected {configs.SOURCES}")


def _open_drawn(data: DataConfig, split: str) -> Drawn:
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    fields = configs.drawn_source(data)
    assert fields is not None, data.source
    source: Drawn
    common = {
        "split": split,
        "size": fields.train_size if split == "train" else fields.test_size,
        "image_size": data.image_size,
        "seed": fields.seed,
        "num_textures": fields.textures,
        "num_colors": fields.colors,
        "texture_rotation": fields.texture_rotation,
        "texture_period": fields.texture_period,
        "scale": (fields.scale_min, fields.scale_max),
    }
    if isinstance(fields, DigitsConfig):
        source = Digits(num_digits=fields.digits, **common)
    else:
        source = Trifeature(num_shapes=fields.shapes, rotation=fields.rotation, noise=fields.noise, **common)
    source.images()  # draws all images once; later calls look them up
    return source


Of = TypeVar("Of", bound=Source)


class Subset(Generic[Of]):
    """A part of a source's images; `subset` makes one.

    Attributes:
      source: source of all images.
      indices: int `(N,)`, the images to keep, in the order of their new numbers.
    """

    earlier_fingerprints: tuple[str, ...] = ()

    def __init__(self, source: Of, indices: np.ndarray):
        self.source, self.indices, self.label_names = source, np.asarray(indices), source.label_names

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """A hash of these images."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()[:24]

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns several images with their labels; see `Source`."""
        return self.source.examples(self.indices[indices])

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images."""
        return {name: values[self.indices] for name, values in self.source.labels().items()}


class ViewSubset(Subset[ViewSource]):
    """A part of a `ViewSource`, which is a `ViewSource` too."""

    def __init__(self, source: ViewSource, indices: np.ndarray):
        super().__init__(source, indices)
        self.image_size, self.random_crops = source.image_size, source.random_crops
        self.channels = source.channels

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        return self.source.views(int(self.indices[index]), uniforms)

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square; see `ViewSource`."""
        return self.source.whole(int(self.indices[index]), side)

    def name(self, index: int) -> str:
        """Returns the display name of an image; see `ViewSource`."""
        return self.source.name(int(self.indices[index]))


@overload
def subset(source: ViewSource, indices: np.ndarray) -> ViewSubset: ...
@overload
def subset(source: Source, indices: np.ndarray) -> Subset[Source]: ...
def subset(source: Source, indices: np.ndarray) -> Subset[Source] | ViewSubset:
    """Returns a part of a source's images; a part of a `ViewSource` is one too.

    Args:
      source: source of all images.
      indices: int `(N,)`, the images to keep, in this order.
    """
    return ViewSubset(source, indices) if isinstance(source, ViewSource) else Subset(source, indices)


def drawn(source: Source, count: int, seed: int) -> Source:
    """Draws `count` of a source's images at random, in their original order; returns the source if it has no more.

    Args:
      source: source of all images, which may be sorted by class.
      count: how many images to draw; 0: all.
      seed: seed of the draw; nothing else decides it.
    """
    if not count or len(source) <= count:
        return source
    return subset(source, np.sort(np.random.default_rng(seed).permutation(len(source))[:count]))
