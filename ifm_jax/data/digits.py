"""Digits: scikit-learn's handwritten digits over Trifeature's textures, in Trifeature's colors.

An image shows a handwritten digit, a white stroke with a black outline, at a random place and in a random size, over a
texture that fills the image. The labels digit, texture and color are independent. The IFM paper studies such a set
with STL-10 images and MNIST digits; this one needs no download.

The handwriting is that of scikit-learn's `load_digits`: 1797 images of 8 x 8 pixels with values 0 to 16, by 13 writers
(Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI 1998; the set's test part). About a fifth of
these images, chosen by a hash of the seed, are drawn in the test split only, the others in the training split only. A
writer may occur in both: the set does not say who wrote what.
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from ifm_jax.drawing import COLORS, RGB, TEXTURES, Drawn, mix, per_image, texture_light, uniforms

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Increase this when the same parameters give other pixels: it is part of the name of a cache file.
DRAWING_VERSION = 1

_TEST_SHARE = 0.2  # of the handwritten images, drawn in the test split only
_MARGIN = 2  # empty cells around a handwritten image, for its outline
# The ink at which the stroke and the outline begin, and by how much the ink rises across an edge.
_STROKE, _OUTLINE, _EDGE = 0.45, 0.5, 0.25
_WHITE = 255.0


@dataclasses.dataclass(frozen=True)
class Digits(Drawn):
    """A random-access source of handwritten digits over colored textures, with three labels.

    An image is a pure function of (`seed`, `split`, index) and the drawing parameters; `size` is only their number. The
    labels are drawn independently and uniformly, then one of the split's handwritten images of that digit. Images are
    drawn on access until `images` has drawn them all; after that they are looked up.

    Example:
        >>> source = Digits("train", size=1000, image_size=32)
        >>> source[3]["image"].shape
        (32, 32, 3)

    Attributes:
      split: `"train"` or `"test"`; the two share no random draw and no handwritten image.
      size: number of images.
      image_size: height and width in pixels, 32 to 224.
      seed: any non-negative integer below 2**64; it also splits the handwritten images.
      num_digits: how many of `DIGITS` to use, from the first on, 2 to 10.
      num_textures: how many of `TEXTURES` to use, from the first on, 2 to 10.
      num_colors: how many of `COLORS` to use, from the first on, 2 to 10.
      texture_rotation: greatest angle in degrees by which the texture is turned to either side; the angle is uniform.
      texture_period: one period of a texture, relative to the image side.
      scale: least and greatest side of the handwritten image, relative to the image side, at least 0.4, below which a
        stroke is narrower than two pixels of 32. The handwritten image always lies within the image.

    Raises:
      ValueError: if an attribute is outside its range.
    """

    _folder: ClassVar[str] = "digits"
    _version: ClassVar[tuple[str | int, ...]] = ("digits", DRAWING_VERSION)
    _draws: ClassVar[int] = 10

    num_digits: int = 10
    num_textures: int = 10
    num_colors: int = 10
    texture_rotation: float = 45.0
    texture_period: float = 0.2
    scale: tuple[float, float] = (0.55, 0.75)

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))
        super().__post_init__()
        self._require_classes("num_digits", "num_textures", "num_colors")
        self._require_angles("texture_rotation")
        self._require_period(self.texture_period)
        self._require_scale(self.scale, 0.4, "a digit of size 1 touches the border")

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each label."""
        return {
            "digit": DIGITS[: self.num_digits],
            "texture": TEXTURES[: self.num_textures],
            "color": COLORS[: self.num_colors],
        }

    def handwritten(self, indices: np.ndarray) -> np.ndarray:
        """Returns which of scikit-learn's images are drawn, int `(N,)` in 0..1796.

        Args:
          indices: integers `(N,)`, each in 0..size - 1.

        Raises:
          IndexError: if an index is out of range.
        """
        indices = self._checked(indices)
        digit, choice = self._labels(indices)["digit"], self._uniforms(indices)[3]
        table, counts = _of_split(self.seed, self.split)
        return table[digit, (choice * counts[digit]).astype(np.int64)]

    def _draw_few(self, indices: np.ndarray, out: np.ndarray) -> None:
        size = self.image_size
        labels = self._labels(indices)
        zoom, right, down, grain, shift_u, shift_v = self._uniforms(indices)[4:]
        # Lengths are relative to the image side. The handwritten image stays within the image.
        side = self.scale[0] + (self.scale[1] - self.scale[0]) * zoom
        left, top = (1 - side) * right, (1 - side) * down

        middle = np.full(len(indices), 0.5)
        angle = np.deg2rad(self.texture_rotation) * (2 * grain - 1)
        light = texture_light(labels["texture"], size, self.texture_period, middle, middle, angle, shift_u, shift_v)

        ink, spread = _handwriting()[:2]
        number = self.handwritten(indices)
        columns, rows = _cells(size, left, side), _cells(size, top, side)
        stroke = _above(_interpolated(ink, number, columns, rows), _STROKE)
        outline = _above(_interpolated(spread, number, columns, rows), _OUTLINE)

        light *= 1 - np.maximum(outline, stroke)
        stroke = stroke * np.float32(_WHITE) + np.float32(0.5)  # the half rounds to nearest
        for channel, value in enumerate(RGB[labels["color"]].T):
            out[..., channel] = np.clip(light * per_image(value) + stroke, 0, 255)


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The handwritten images.

    Returns:
      Their ink in [0, 1], float32 `(1797, 12, 12)` with `_MARGIN` empty cells on each side; the same, spread to the
      cells above, below, left and right; and the digits, int `(1797,)`.
    """
    from sklearn.datasets import load_digits  # here: the import takes a second

    pixels, digit = load_digits(return_X_y=True)
    ink = pixels.astype(np.float32).reshape(-1, 8, 8) / 16
    ink = np.pad(ink, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    neighbors = [np.roll(ink, shift, axis) for shift in (-1, 1) for axis in (1, 2)]  # the margin is empty
    return ink, np.maximum.reduce([ink, *neighbors]), np.asarray(digit)


@functools.lru_cache(maxsize=8)
def _of_split(seed: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten images of a split by digit: numbers, int `(10, most)`, and how many there are, int `(10,)`."""
    digit = _handwriting()[2]
    stream = mix(np.array([seed], np.uint64))  # not one of the streams of images, which add a constant before mixing
    in_test = uniforms(stream, np.arange(1, len(digit) + 1)) < _TEST_SHARE
    numbers = [np.flatnonzero((digit == one) & (in_test == (split == "test"))) for one in range(len(DIGITS))]
    counts = np.array([len(of) for of in numbers])
    table = np.stack([np.pad(of, (0, counts.max() - len(of))) for of in numbers])
    return table, counts


def _cells(size: int, start: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where pixel centers lie among the cells of a padded handwritten image, along one axis.

    Returns:
      The cell whose center comes before, int `(N, size)`, and the distance from it in cells, float32 `(N, size)`.
    """
    place = ((np.arange(size) + 0.5) / size - start[:, None]) * (8 / side)[:, None] + (_MARGIN - 0.5)
    place = np.clip(place, 0, 8 + 2 * _MARGIN - 1)
    cell = np.minimum(place.astype(np.int64), 8 + 2 * _MARGIN - 2)
    return cell, (place - cell).astype(np.float32)


def _interpolated(
    table: np.ndarray,
    number: np.ndarray,
    columns: tuple[np.ndarray, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Bilinear interpolation in the images `number` of a table, at pixels given by `_cells`: float32 `(N, H, W)`."""
    width, area = table.shape[2], table.shape[1] * table.shape[2]
    first = per_image(number * area) + rows[0][:, :, None] * width + columns[0][:, None, :]
    right, down = columns[1][:, None, :], rows[1][:, :, None]
    flat = table.ravel()
    above = flat[first] * (1 - right) + flat[first + 1] * right
    below = flat[first + width] * (1 - right) + flat[first + width + 1] * right
    return above * (1 - down) + below * down


def _above(ink: np.ndarray, threshold: float) -> np.ndarray:
    """The share of a pixel with more ink than a threshold: from 0 to 1 within `_EDGE` around it."""
    return np.clip((ink - np.float32(threshold)) * np.float32(1 / _EDGE) + np.float32(0.5), 0, 1)
