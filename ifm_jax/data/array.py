"""Images in one NumPy file: `array:FILE.npz`.

train_images  uint8 (N, H, W, 3) or gray (N, H, W)      also: x_train (Keras), images
train_labels  integers (N,) or (N, 1), if there are any       y_train,         labels
test_images, test_labels: held out                            x_test, y_test
class_names   text (C,), if there are any; a class's number is its index
"""

import hashlib
import pathlib

import numpy as np

from ifm_jax.data import crops
from ifm_jax.data.classes import chosen
from ifm_jax.data.images import PixelImages
from ifm_jax.data.npz import Npz, NpzError
from ifm_jax.errors import UsageError

_NAMES = {
    "train": {"images": ("train_images", "x_train", "images"), "labels": ("train_labels", "y_train", "labels")},
    "test": {"images": ("test_images", "x_test"), "labels": ("test_labels", "y_test")},
}

_MOST_CLASSES = 2**20  # classes without names are named by their numbers


class ArrayFile(PixelImages):
    """Random access to the images of an array in memory.

    Attributes:
      images: uint8 `(N, H, W, 3)` or `(N, H, W)`.
    """

    def __init__(
        self,
        images: np.ndarray,
        image_size: int,
        class_names: tuple[str, ...] = (),
        classes: np.ndarray | None = None,
        random_crops: crops.RandomCrops = crops.TWO_VIEWS,
    ):
        """Wraps arrays without copying them.

        Args:
          images: uint8 `(N, H, W, 3)`, or `(N, H, W)`: gray.
          image_size: side of a view in pixels.
          class_names: names of all classes; empty: there are none.
          classes: class of each image as an index into `class_names`, int32 `(N,)`; None: there are none.
          random_crops: crops that `views` cuts.
        """
        self._labels = {} if classes is None or not class_names else {"class": classes}
        super().__init__(image_size, random_crops, {"class": class_names} if self._labels else {})
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the number of an image."""
        return f"image {index}"

    def labels(self) -> dict[str, np.ndarray]:
        """Returns `class`, int32 `(len(self),)`; nothing without classes."""
        return self._labels

    def pixels(self, index: int) -> np.ndarray:
        """Returns an image; see `PixelImages`."""
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def _fingerprint(self) -> list[str | bytes]:
        pixels = hashlib.sha256(np.ascontiguousarray(self.images).data).digest()
        return [repr(self.images.shape), pixels, *(labels.tobytes() for labels in self._labels.values())]


def has_held_out(path: pathlib.Path) -> bool:
    """Returns whether a file has held-out images, without reading them.

    Raises:
      FileNotFoundError: if the file does not exist.
      NpzError: if it is not a .npz file.
    """
    with Npz(path) as file:
        return any(name in file for name in _NAMES["test"]["images"])


def open_array(
    path: str,
    split: str,
    *,
    image_size: int,
    classes: str = "",
    random_crops: crops.RandomCrops = crops.TWO_VIEWS,
) -> ArrayFile:
    """Reads the images of a split.

    Args:
      path: path of the file; see the module's description.
      split: "train" or "test".
      image_size: side of a view in pixels.
      classes: a file that names the classes to keep, see `classes.read_names`; empty: all.
      random_crops: crops that `views` of the source cuts.

    Raises:
      UsageError: if the file is missing or holds something else, or the split or a class does not exist.
    """
    said = f"data.source='array:{path}'"
    try:
        file = pathlib.Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UsageError(f"{said}: {error}; expected the path of a .npz file") from None
    arrays = _read(file, split, said)
    images, labels = arrays["images"], arrays["labels"]
    if images is None:
        raise UsageError(
            f"{said} has no {'held-out' if split == 'test' else 'training'} images: expected an array "
            f"{' or '.join(_NAMES[split]['images'])}"
        )
    if (
        images.dtype != np.uint8
        or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3))
        or not images.size
    ):
        raise UsageError(
            f"{said}: its {split} images are {images.dtype} of shape {images.shape}; expected uint8 of shape "
            "(N, H, W, 3), or (N, H, W) for gray"
        )
    if labels is None:
        if classes:
            raise UsageError(f"data.classes={classes!r}: {said} has no labels; leave data.classes empty")
        return ArrayFile(images, image_size, random_crops=random_crops)
    labels = _checked(labels, len(images), f"{said}: its {split} labels")
    names = arrays["class_names"]
    if names is not None and names.size:
        if names.ndim != 1:
            raise UsageError(f"{said}: class_names has shape {names.shape}; expected one name for each class")
        names = tuple(map(str, names))
        if labels.max() >= len(names):
            raise UsageError(
                f"{said}: a {split} label is {labels.max()}; expected 0 to {len(names) - 1}: class_names has "
                f"{len(names)}"
            )
    else:
        train_labels = labels
        if split == "test" and (train_labels := arrays["train_labels"]) is not None:
            train_labels = _checked(train_labels, train_labels.size, f"{said}: its training labels")
        count = 0 if train_labels is None else int(train_labels.max()) + 1
        if labels.max() >= count:
            raise UsageError(
                f"{said}: a {split} label is {labels.max()}; expected 0 to {count - 1}, the training labels"
            )
        names = tuple(map(str, range(count)))
    kept = chosen(classes, names, f"classes of {path}")
    if classes:
        number = np.full(len(names), -1, np.int32)
        number[[names.index(name) for name in kept]] = np.arange(len(kept), dtype=np.int32)
        labels = number[labels]
        images, labels = images[labels >= 0], labels[labels >= 0]
        if not len(images):
            raise UsageError(f"data.classes={classes!r}: {said} has no {split} images of these classes")
    return ArrayFile(images, image_size, tuple(kept), labels.astype(np.int32), random_crops)


def _checked(labels: np.ndarray, count: int, said: str) -> np.ndarray:
    """Returns labels `(count,)`.

    Raises:
      UsageError: if they are not integers of at least 0, one for each image.
    """
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != count or not count:
        raise UsageError(
            f"{said} are {labels.dtype} of shape {labels.shape}; expected {count} integers of at least 0, one for each "
            "image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MOST_CLASSES:
        raise UsageError(
            f"{said} contain {low if low < 0 else high}; expected class numbers from 0 to {_MOST_CLASSES - 1}"
        )
    return labels.reshape(-1)


def _read(path: pathlib.Path, split: str, said: str) -> dict[str, np.ndarray | None]:
    """Returns `images`, `labels`, `train_labels` and `class_names`, None for each that the file lacks."""
    names = _NAMES[split] | {"train_labels": _NAMES["train"]["labels"], "class_names": ("class_names",)}
    try:
        with Npz(path) as file:
            found = {kind: next((name for name in each if name in file), None) for kind, each in names.items()}
            arrays = {name: file[name] for name in set(found.values()) if name is not None}
            return {kind: None if name is None else arrays[name] for kind, name in found.items()}
    except FileNotFoundError:
        raise UsageError(f"{said}: {path} does not exist; expected a .npz file with train_images") from None
    except NpzError as error:
        raise UsageError(f"{said}: {path} cannot be read ({error}); expected a .npz file with train_images") from None
