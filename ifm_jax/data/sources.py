"""Where images come from: small protocols, and the source a config names."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, overload, runtime_checkable

import numpy as np

from ifm_jax.config import DataConfig
from ifm_jax.data.trifeature import Trifeature
from ifm_jax.errors import UsageError

if TYPE_CHECKING:
    from ifm_jax.data.crops import RandomCrops

SPLITS = ("train", "test")

# Least area of a training crop, relative to the image's; the greatest is the whole.
_LEAST_AREA = {"moco_v1": 0.2, "moco_v2": 0.2, "moco_cifar": 0.08}


class Images(Protocol):
    """Random access to images."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `image`, uint8 `(N, H, W, 3)`, and int32 `(N,)` for each label; as they are evaluated."""


class Source(Images, Protocol):
    """Random access to images and their labels.

    Attributes:
      label_names: the classes of each label, for example `{"shape": ("circle", ...), ...}`; empty without labels.
      fingerprint: a hash of which images these are, in which order; the same wherever they lie.
      earlier_fingerprints: what it was in earlier versions, so that their runs may go on; empty: the same.
    """

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]: ...  # noqa: D102 (an attribute)

    if TYPE_CHECKING:  # not looked for by isinstance(), which would compute it on Python 3.11

        @property
        def fingerprint(self) -> str: ...  # noqa: D102

        @property
        def earlier_fingerprints(self) -> tuple[str, ...]: ...  # noqa: D102

    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label; -1 where an image has none."""


@runtime_checkable
class ViewSource(Source, Protocol):
    """A source that cuts the views of an image itself, on the host, to uint8; the rest happens on the device.

    Attributes:
      image_size: side of a view in pixels.
      random_crops: how many views there are, and of which size.
    """

    image_size: int
    random_crops: "RandomCrops"

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Returns random crops of one image, each uint8 `(H, W, 3)`, cut independently. Threads may call it at once.

        Args:
          index: of the image.
          uniforms: `random_crops.draws` random numbers in [0, 1); the same ones give the same views.

        Raises:
          UnreadableImageError: if the image cannot be read.
        """

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image stretched or shrunk to a square, uint8 `(side, side, 3)`, and its own height and width.

        Raises:
          UnreadableImageError: if the image cannot be read.
        """

    def name(self, index: int) -> str:
        """Returns what to call an image: the path of its file, or the record it is."""


def open_source(data: DataConfig, split: str) -> Source:
    """Returns the source that the config names.

    The trifeature augmentation crops on the device; for the others the source cuts the two views of pre-training, and
    is a `ViewSource`.

    Args:
      data: a validated config's.
      split: "train" or "test".

    Raises:
      UsageError: if there is no such source, or it does not hold what the config asks for.
    """
    if data.source == "trifeature" and data.augmentation == "trifeature":
        return _open_trifeature(data, split)
    return open_views(data, split, count=2, least_area=_LEAST_AREA.get(data.augmentation, 0.2))


def open_views(data: DataConfig, split: str, *, count: int, least_area: float) -> ViewSource:
    """Returns the source that the config names, to cut so many views of an image.

    Args:
      data: a validated config's.
      split: "train" or "test".
      count: views of an image.
      least_area: of a crop, relative to the image's: 0.08 for a linear probe.

    Raises:
      UsageError: as `open_source`.
    """
    # With OpenCV, which the embedded images do without.
    from ifm_jax.data.crops import RandomCrops
    from ifm_jax.data.images import Cropped

    random_crops = RandomCrops(count, (least_area, 1.0))
    kind, _, rest = data.source.partition(":")
    if kind == "trifeature":
        return Cropped(_open_trifeature(data, split), random_crops)
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
    raise UsageError(f"data.source={data.source!r}: expected trifeature, folder:PATH, tfds:NAME or array:FILE.npz")


def _open_trifeature(data: DataConfig, split: str) -> Trifeature:
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
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


Of = TypeVar("Of", bound=Source)


class Subset(Generic[Of]):
    """Some of a source's images; `subset` makes one.

    Attributes:
      source: of all of them.
      indices: int `(N,)`, which ones, as they are numbered here.
    """

    earlier_fingerprints: tuple[str, ...] = ()

    def __init__(self, source: Of, indices: np.ndarray):
        self.source, self.indices, self.label_names = source, np.asarray(indices), source.label_names

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """A hash of which images these are."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()[:24]

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns several images with their labels; see `Source`."""
        return self.source.examples(self.indices[indices])

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images."""
        return {name: values[self.indices] for name, values in self.source.labels().items()}


class ViewSubset(Subset[ViewSource]):
    """Some of the images of a `ViewSource`, and one itself."""

    def __init__(self, source: ViewSource, indices: np.ndarray):
        super().__init__(source, indices)
        self.image_size, self.random_crops = source.image_size, source.random_crops

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        return self.source.views(int(self.indices[index]), uniforms)

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square; see `ViewSource`."""
        return self.source.whole(int(self.indices[index]), side)

    def name(self, index: int) -> str:
        """Returns what to call an image; see `ViewSource`."""
        return self.source.name(int(self.indices[index]))


@overload
def subset(source: ViewSource, indices: np.ndarray) -> ViewSubset: ...
@overload
def subset(source: Source, indices: np.ndarray) -> Subset[Source]: ...
def subset(source: Source, indices: np.ndarray) -> Subset[Source] | ViewSubset:
    """Returns some of a source's images: a `ViewSource` if that is one.

    Args:
      source: of all of them.
      indices: int `(N,)`, which ones, in this order.
    """
    return ViewSubset(source, indices) if isinstance(source, ViewSource) else Subset(source, indices)


def drawn(source: Source, count: int, seed: int) -> Source:
    """Returns so many of a source's images, drawn at random, in their own order; the source where it has no more.

    Args:
      source: of all of them, which may lie sorted by class.
      count: of the images wanted; 0: all.
      seed: of the draw, which depends on nothing else.
    """
    if not count or len(source) <= count:
        return source
    return subset(source, np.sort(np.random.default_rng(seed).permutation(len(source))[:count]))
