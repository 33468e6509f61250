"""Images in folders: a folder for each class as torchvision's `ImageFolder` has it, or just a folder of images.

    PATH/<class>/**/*.jpg                            one set, for training
    PATH/train/<class>/..., PATH/val/<class>/...     two: `val`, or else `test`, is the held-out one
    PATH/*.jpg, PATH/train/*.jpg                     no classes, so no labels

Pixels are those of PIL's `Image.open(path).convert("RGB")`, which the original's loader uses: an orientation noted in
the file is ignored, transparency dropped, grey repeated three times. The one exception: 16-bit grey is scaled to 8
bits, where PIL cuts off what is above 255.
"""

import concurrent.futures
import os
import pathlib
import re
from collections.abc import Sequence

import cv2
import numpy as np

from ifm_jax.data import crops
from ifm_jax.errors import RunError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
HELD_OUT = ("val", "test")  # in this order of preference

# A large JPEG is decoded at a half, a quarter or an eighth, which takes a third of the time, if that still leaves so
# many pixels to one of the view. It is no further from PIL's result than decoding the whole and shrinking that.
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PIXELS_LEFT = 1.5

_UNREADABLE = "replace or remove the file and start again; the run goes on from its last checkpoint"


class Folder:
    """Random access to image files: two random crops of each for training, the central view and the label for readouts.

    Attributes:
      paths: of the files.
      image_size: side of a view in pixels.
      label_names: `{"class": names}`; empty without classes.
    """

    def __init__(
        self, paths: Sequence[str], image_size: int, class_names: Sequence[str] = (), classes: Sequence[int] = ()
    ):
        """Takes files in the order in which they are numbered.

        Args:
          paths: of the files.
          image_size: side of a view in pixels.
          class_names: of all classes; empty: there are none.
          classes: of each file, an index of `class_names`.
        """
        self.paths, self.image_size = paths, image_size
        self.label_names = {"class": tuple(class_names)} if class_names else {}
        self._labels = {"class": np.asarray(classes, np.int32)} if class_names else {}
        # Images are small and there is one for every thread: OpenCV's own threads would only be in the way.
        cv2.setNumThreads(0)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # what it warns of is raised

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self) -> dict[str, np.ndarray]:
        """Returns `class`, int32 `(len(self),)`; nothing without classes."""
        return self._labels

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads several images as they are evaluated: the shorter side resized, the central square cut out.

        Args:
          indices: integers `(N,)`.

        Returns:
          `image`, uint8 `(N, image_size, image_size, 3)`, and `class`, int32 `(N,)`, where there are classes.

        Raises:
          RunError: if an image cannot be read.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = list(pool.map(self._central_view, np.asarray(indices).tolist()))
        return {"image": np.stack(images), **{name: values[indices] for name, values in self._labels.items()}}

    def views(self, index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Cuts two random crops of one image; see `ViewSource`."""
        path = self.paths[index]
        encoded = _read(path)
        size = jpeg_size(encoded)
        image = None if size else decode(path, encoded)
        boxes = crops.two_random_boxes(number, *(size or image.shape[:2]))
        if image is None:
            reduction = _reduction(min(min(height, width) for _, _, height, width in boxes) / self.image_size)
            image = decode(path, encoded, reduction)
            boxes = [crops.reduced_box(box, reduction, *image.shape[:2]) for box in boxes]
        query, key = (_rgb(crops.cut(image, box, self.image_size)) for box in boxes)
        return query, key

    def _central_view(self, index: int) -> np.ndarray:
        path = self.paths[index]
        encoded = _read(path)
        size = jpeg_size(encoded)
        shrink = min(size) / crops.central_size(*size, self.image_size)[0] if size else 1
        return _rgb(crops.central_view(decode(path, encoded, _reduction(shrink)), self.image_size))


def _read(path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): {_UNREADABLE}") from None


def jpeg_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """Returns height and width as a JPEG's header has them, before any rotation; None: not a JPEG.

    Args:
      encoded: the file's bytes, uint8 `(N,)`.
    """
    data = memoryview(encoded)
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return (height, width) if height and width else None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _reduction(shrink: float) -> int:
    """Returns by how much an image may be reduced while it is decoded, if its pixels will be `shrink` to one."""
    return max(reduction for reduction in _REDUCED if reduction == 1 or reduction * _PIXELS_LEFT <= shrink)


def decode(path: str, encoded: np.ndarray, reduction: int = 1) -> np.ndarray:
    """Decodes an image file; what it holds decides how, not its name.

    Args:
      path: of the file, for the error.
      encoded: its bytes, uint8 `(N,)`.
      reduction: 1, 2, 4 or 8: so much less high and wide, rounded up.

    Returns:
      uint8 `(H, W, 3)`: blue, green, red. The views made of it are turned into RGB, which is less work.

    Raises:
      RunError: if it cannot be decoded.
    """
    # A later place to bear with a share of such files: replace, count, name once.
    try:
        image = cv2.imdecode(encoded, _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    except cv2.error:
        image = None
    if image is None:
        raise RunError(f"{path} cannot be read (not an image, or a broken one): {_UNREADABLE}")
    return image


def _rgb(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_BGR2RGB)


def open_folder(path: str, split: str, *, image_size: int, classes: str = "") -> Folder:
    """Finds the images of a split.

    Args:
      path: of the folder; see the module's description.
      split: "train" or "test".
      image_size: side of a view in pixels.
      classes: a file that names the classes to keep, see `read_class_names`; empty: all.

    Returns:
      The source. Files are in the order of torchvision's `ImageFolder`. The held-out images have the classes of the
      training images, by name.

    Raises:
      UsageError: for a folder that is missing, empty or in disorder, a split that is not there, an unknown class.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"data.source='folder:{path}': {root} is {'not a folder' if root.exists() else 'not there'}; expected a "
            "folder of images, or of one folder for each class"
        )
    parts = {"train": root}
    if (root / "train").is_dir():
        parts["train"] = root / "train"
        if held_out := next((name for name in HELD_OUT if (root / name).is_dir()), None):
            parts["test"] = root / held_out
    if split not in parts:
        raise UsageError(
            f"data.source='folder:{path}' has no held-out images: expected {root / 'train'} and {root / HELD_OUT[0]} "
            f"(or {HELD_OUT[1]}), with the same classes in both"
        )

    found = _class_folders(parts["train"])
    if not found:
        if classes:
            raise UsageError(
                f"data.classes={classes!r}: {parts['train']} has no class folders to choose from; expected one for "
                "each class, or leave data.classes empty"
            )
        paths = _images_directly_in(parts[split])
        if not paths:
            raise UsageError(
                f"data.source='folder:{path}': no images in {parts[split]}; expected {', '.join(SUFFIXES)} there, or "
                "in one folder for each class"
            )
        return Folder(paths, image_size)

    names = read_class_names(classes) if classes else found
    if unknown := sorted(set(names) - set(found)):
        raise UsageError(
            f"data.classes={classes!r}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"{len(found)} class folders of {parts['train']} ({_some(found)}); remove or correct the name"
        )
    if split == "test":
        found = _class_folders(parts[split])
        if other := sorted(set(found) - set(_class_folders(parts["train"]))):
            raise UsageError(
                f"{parts[split]} holds the class {other[0]!r}, which {parts['train']} does not: expected the same "
                "classes in both"
            )
    paths, labels = [], []
    for label, name in enumerate(names):
        if name not in found:
            continue  # no held-out images of this class
        # A later place to scan a million files in parallel, with progress, and to remember what was found.
        files = _images_below(parts[split] / name)
        if not files:
            raise UsageError(
                f"class folder {parts[split] / name} holds no images: expected {', '.join(SUFFIXES)}; remove it or "
                "name the classes to keep in data.classes"
            )
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise UsageError(f"data.source='folder:{path}': {parts[split]} holds none of the classes of {parts['train']}")
    return Folder(paths, image_size, names, labels)


def read_class_names(path: str) -> list[str]:
    """Returns the class names that a file lists, sorted.

    One a line; a # at the start of a line or after a space begins a comment.

    Raises:
      UsageError: if it cannot be read or names no class.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data.classes={path!r} cannot be read ({getattr(error, 'strerror', None) or error}): expected a text "
            "file of class names, one a line"
        ) from None
    names = {re.split(r"(?:^|\s)#", line)[0].strip() for line in lines} - {""}
    if not names:
        raise UsageError(f"data.classes={path!r} names no class: expected class names, one a line")
    return sorted(names)


def _class_folders(root: pathlib.Path) -> list[str]:
    """Returns the names of the class folders, sorted; none if the images lie directly in `root`."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if names and (loose := _images_directly_in(root)):
        full = next((name for name in names if _images_below(root / name)), None)
        if full is None:
            return []
        raise UsageError(
            f"{root} holds both images ({os.path.basename(loose[0])}, ...) and folders of images ({full}, ...): "
            "expected one or the other; move the images into a folder of their own"
        )
    return names


def _images_directly_in(folder: pathlib.Path) -> list[str]:
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if _is_image(name)]


def _images_below(folder: pathlib.Path) -> list[str]:
    """Returns the images in a folder and its subfolders, in `ImageFolder`'s order."""
    walk = sorted(os.walk(folder, followlinks=True))
    return [os.path.join(root, name) for root, _, names in walk for name in sorted(names) if _is_image(name)]


def _is_image(name: str) -> bool:
    # Files that start with a dot are other programs' (such as ._photo.jpg beside photo.jpg on some disks).
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")
