"""Images in folders: a folder for each class as torchvision's `ImageFolder` has it, or a plain folder of images.

PATH/<class>/**/*.jpg                            one set, for training
PATH/train/<class>/..., PATH/val/<class>/...     two sets: `val`, or else `test`, is held out
PATH/*.jpg, PATH/train/*.jpg                     no classes, so no labels
"""

import concurrent.futures
import contextlib
import os
import pathlib
import stat
from collections.abc import Sequence

import numpy as np

from ifm_jax.data import crops, scan
from ifm_jax.data.classes import chosen, shown
from ifm_jax.data.images import EncodedImages, UnreadableImageError, digest
from ifm_jax.errors import UsageError

HELD_OUT = ("val", "test")  # in this order of preference

_MOST_BYTES = 2**30  # of a file; OpenCV takes less than twice as many
_AT_ONCE = 256  # files whose sizes one thread reads


class Folder(EncodedImages):
    """Random access to image files.

    Attributes:
      root: root of the paths.
      paths: paths of the files, relative to it, in the order of their numbers.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        paths: Sequence[str],
        image_size: int,
        class_names: Sequence[str] = (),
        classes: Sequence[int] = (),
        random_crops: crops.RandomCrops = crops.TWO_VIEWS,
    ):
        """Wraps files, numbered in the given order.

        Args:
          root: root of the paths.
          paths: paths of the files, relative to it.
          image_size: side of a view in pixels.
          class_names: names of all classes; empty: there are none.
          classes: class of each file as an index into `class_names`.
          random_crops: crops that `views` cuts.
        """
        super().__init__(image_size, random_crops, {"class": tuple(class_names)} if class_names else {})
        self.root, self.paths = os.fspath(root), paths
        self._labels = {"class": np.asarray(classes, np.int32)} if class_names else {}

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self) -> dict[str, np.ndarray]:
        """Returns `class`, int32 `(len(self),)`; nothing without classes."""
        return self._labels

    def name(self, index: int) -> str:
        """Returns the path of a file for display."""
        return shown(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def encoded(self, index: int) -> np.ndarray:
        """Returns the bytes of a file; see `EncodedImages`."""
        try:
            with open(self._path(index), "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImageError(self.name(index), "not a regular file")
                if status.st_size > _MOST_BYTES:
                    raise UnreadableImageError(self.name(index), f"{status.st_size} bytes, more than {_MOST_BYTES}")
                return np.frombuffer(file.read(status.st_size), np.uint8)  # read() allocates as many bytes as requested
        except OSError as error:
            raise UnreadableImageError(self.name(index), error.strerror or str(error)) from None

    def _fingerprint(self) -> list[str | bytes]:
        return [*self._names(), self._sizes().tobytes()]

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """The `fingerprint` from before it covered the sizes of the files."""
        return (digest(self._names()),)

    def _names(self) -> list[str | bytes]:
        return ["\0".join(self.paths), *(labels.tobytes() for labels in self._labels.values())]

    def _sizes(self) -> np.ndarray:
        """Returns the current size of each file in bytes, int64; -1 for a missing file. Sizes are not cached."""
        sizes = np.full(len(self.paths), -1, "<i8")

        def ask(begin: int) -> None:
            for place in range(begin, min(begin + _AT_ONCE, len(sizes))):
                with contextlib.suppress(OSError):  # an unreadable image, reported later
                    sizes[place] = os.stat(self._path(place)).st_size

        with concurrent.futures.ThreadPoolExecutor(scan.THREADS) as pool:
            for _ in pool.map(ask, range(0, len(sizes), _AT_ONCE)):
                pass
        return sizes


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without blocking, in case a pipe has replaced it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def has_held_out(path: str) -> bool:
    """Returns whether a folder has held-out images of its own; see the module's description.

    Raises:
      UsageError: if there is no such folder.
    """
    try:
        return "test" in _parts(path)
    except (OSError, RuntimeError):  # opening it explains what is wrong
        return True


def open_folder(
    path: str,
    split: str,
    *,
    image_size: int,
    classes: str = "",
    random_crops: crops.RandomCrops = crops.TWO_VIEWS,
) -> Folder:
    """Finds the images of a split.

    Args:
      path: path of the folder; see the module's description.
      split: "train" or "test".
      image_size: side of a view in pixels.
      classes: a file that names the classes to keep, see `classes.read_names`; empty: all.
      random_crops: crops that `views` of the source cuts.

    Returns:
      The source. Files are in the order of torchvision's `ImageFolder`. The held-out images have the classes of the
      training images, by name.

    Raises:
      UsageError: if the folder is missing, empty or mixed up, or the split or a class does not exist.
    """
    try:
        parts = _parts(path)
        if split not in parts:
            root = pathlib.Path(path).expanduser()
            raise UsageError(
                f"data.source='folder:{path}' has no held-out images: expected {root / 'train'} and "
                f"{root / HELD_OUT[0]} (or {HELD_OUT[1]}), with the same classes in both"
            )
        return _open_part(path, parts, split, image_size, classes, random_crops)
    except OSError as error:
        raise UsageError(
            f"data.source='folder:{path}': {error.filename} cannot be read ({error.strerror}); expected readable "
            "folders"
        ) from None
    except RuntimeError as error:  # ~nobody
        raise UsageError(f"data.source='folder:{path}': {error}; expected the path of a folder") from None


def _parts(path: str) -> dict[str, pathlib.Path]:
    """Returns the folder of each existing split.

    Raises:
      UsageError: if there is no folder at all.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"data.source='folder:{path}': {root} {'is not a folder' if root.exists() else 'does not exist'}; "
            "expected a folder of images, or of one folder for each class"
        )
    parts = {"train": root}
    if (root / "train").is_dir():
        parts["train"] = root / "train"
        if held_out := next((name for name in HELD_OUT if (root / name).is_dir()), None):
            parts["test"] = root / held_out
    return parts


def _open_part(
    path: str,
    parts: dict[str, pathlib.Path],
    split: str,
    image_size: int,
    classes: str,
    random_crops: crops.RandomCrops,
) -> Folder:
    trees = {name: scan.tree(parts[name]) for name in {"train", split}}
    found = _class_folders(trees["train"])
    if not found:
        if classes:
            raise UsageError(
                f"data.classes={classes!r}: {parts['train']} has no class folders to choose from; expected one for "
                "each class, or leave data.classes empty"
            )
        paths = trees[split].images_in("")
        if not paths:
            raise UsageError(
                f"data.source='folder:{path}': no images in {parts[split]}; expected {', '.join(scan.SUFFIXES)} "
                "there, or in one folder for each class"
            )
        return Folder(parts[split], paths, image_size, random_crops=random_crops)

    names = chosen(classes, found, f"class folders of {parts['train']}")
    if split == "test":
        if other := sorted(set(_class_folders(trees["test"])) - set(found)):
            raise UsageError(
                f"{parts[split]} has the class {other[0]!r}, which {parts['train']} does not have: expected the same "
                "classes in both"
            )
        found = _class_folders(trees["test"])
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in found:
            continue  # no held-out images of this class
        files = trees[split].images_below(name)
        if not files:
            raise UsageError(
                f"class folder {parts[split] / name} has no images: expected {', '.join(scan.SUFFIXES)}; remove it, "
                "or list the classes to keep in data.classes"
            )
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise UsageError(
            f"data.source='folder:{path}': {parts[split]} has none of the classes of {parts['train']}; expected the "
            "same classes in both"
        )
    return Folder(parts[split], paths, image_size, [shown(name) for name in names], labels, random_crops)


def _class_folders(tree: scan.Tree) -> list[str]:
    """Returns the names of the class folders, sorted; none if the images lie directly in the root."""
    names = tree.listings[""].folders
    if names and (loose := tree.images_in("")):
        full = next((name for name in names if tree.images_below(name)), None)
        if full is None:
            return []
        raise UsageError(
            f"{tree.root} has both images ({loose[0]}, ...) and folders of images ({full}, ...): "
            "expected one or the other; move the images into a folder of their own"
        )
    return names
