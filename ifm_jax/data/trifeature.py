"""Trifeature: images that vary independently in shape, texture and color, drawn by the program.

The data set follows Hermann and Lampinen, "What shapes feature representations?" (NeurIPS 2020). The IFM paper uses it
to see which features a contrastive encoder keeps and which it suppresses. An image shows a shape, filled with a rotated
texture, in a color, at a random place on a gray background. The first entries of `SHAPES` are the easiest to tell
apart; a smaller set takes the first few. A shape is a table of signed distances, sampled at the rotated, shifted pixel
centers. `drawing` has the rest: random numbers, textures, colors.
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ifm_jax.drawing import COLORS, RGB, TEXTURES, Drawn, per_image, require, rotated_grid, texture_light, words

SHAPES = ("circle", "triangle", "plus", "ring", "star", "square", "hourglass", "tee", "crescent", "rhombus")

# Increase this when the same parameters give other pixels: it is part of the name of a cache file.
DRAWING_VERSION = 1

_GREY = (90.0, 140.0)  # the background's level, one draw per image
_EXTENT = 1.25  # a shape table covers [-1.25, 1.25]^2; the shape lies within the unit circle


@dataclasses.dataclass(frozen=True)
class Trifeature(Drawn):
    """A random-access source of Trifeature images with their three labels.

    An image is a pure function of (`seed`, `split`, index) and the drawing parameters; `size` is only their number. The
    labels are drawn independently and uniformly. Images are drawn on access until `images` has drawn them all; after
    that they are looked up.

    Example:
        >>> source = Trifeature("train", size=1000, image_size=32)
        >>> source[3]["image"].shape
        (32, 32, 3)

    Attributes:
      split: `"train"` or `"test"`; the two share no random draw.
      size: number of images.
      image_size: height and width in pixels, 32 to 224.
      seed: any non-negative integer below 2**64.
      num_shapes: how many of `SHAPES` to use, from the first on, 2 to 10.
      num_textures: how many of `TEXTURES` to use, from the first on, 2 to 10.
      num_colors: how many of `COLORS` to use, from the first on, 2 to 10.
      rotation: greatest angle in degrees by which the shape is turned to either side; the angle is uniform.
      texture_rotation: the same for the texture, with its own angle; 180 allows any angle.
      texture_period: one period of a texture, relative to the image side.
      scale: least and greatest diameter of the circle around the shape, relative to the image side. The shape always
        lies within the image.
      noise: amplitude of the uniform noise on the gray background, relative to the full range of a pixel.

    Raises:
      ValueError: if an attribute is outside its range.
    """

    _folder: ClassVar[str] = "trifeature"
    _version: ClassVar[tuple[str | int, ...]] = (DRAWING_VERSION,)
    _draws: ClassVar[int] = 11  # besides the noise

    num_shapes: int = 10
    num_textures: int = 10
    num_colors: int = 10
    rotation: float = 45.0
    texture_rotation: float = 45.0
    texture_period: float = 0.2
    scale: tuple[float, float] = (0.7, 0.9)
    noise: float = 0.06

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))
        super().__post_init__()
        self._require_classes("num_shapes", "num_textures", "num_colors")
        self._require_angles("rotation", "texture_rotation")
        self._require_period(self.texture_period)
        self._require_scale(self.scale, 0.2, "a shape of size 1 touches the border")
        require(0 <= self.noise <= 0.3, "noise", self.noise, "0 to 0.3", "0.06 is the default")

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each label."""
        return {
            "shape": SHAPES[: self.num_shapes],
            "texture": TEXTURES[: self.num_textures],
            "color": COLORS[: self.num_colors],
        }

    def _draw_few(self, indices: np.ndarray, out: np.ndarray) -> None:
        size = self.image_size
        labels = self._labels(indices)
        turn, zoom, right, down, grain, shift_u, shift_v, gray = self._uniforms(indices)[3:]
        # Lengths are relative to the image side. The circle around the shape stays within the image.
        radius = 0.5 * (self.scale[0] + (self.scale[1] - self.scale[0]) * zoom)
        center_x = radius + (1 - 2 * radius) * right
        center_y = radius + (1 - 2 * radius) * down
        angle = np.deg2rad(self.rotation) * (2 * turn - 1)

        table = _shape_table(size)
        cells = table.shape[1] / (2 * _EXTENT)  # of the table, for a length of one radius
        column, row = rotated_grid(size, center_x, center_y, angle, cells / radius)
        last = np.float32(table.shape[1] - 1)
        column = np.clip(column + np.float32(_EXTENT * cells), 0, last).astype(np.int32)
        row = np.clip(row + np.float32(_EXTENT * cells), 0, last).astype(np.int32)
        distance = table.ravel()[column + row * table.shape[1] + per_image(labels["shape"] * table[0].size)]
        # The share of the pixel inside the shape, to first order: one pixel from 0 to 1 across the outline.
        coverage = np.clip(np.float32(0.5) - distance * per_image((radius * size).astype(np.float32)), 0, 1)

        grain_angle = np.deg2rad(self.texture_rotation) * (2 * grain - 1)
        light = texture_light(
            labels["texture"], size, self.texture_period, center_x, center_y, grain_angle, shift_u, shift_v
        )

        background = per_image((_GREY[0] + (_GREY[1] - _GREY[0]) * gray).astype(np.float32))
        if self.noise:
            background = background + self._noise(indices)
        light *= coverage
        background = background * (1 - coverage) + np.float32(0.5)  # the half rounds to nearest
        for channel, value in enumerate(RGB[labels["color"]].T):
            out[..., channel] = np.clip(light * per_image(value) + background, 0, 255)

    def _noise(self, indices: np.ndarray) -> np.ndarray:
        """Uniform noise in gray levels, float32 `(N, H, W)`; one hash serves eight pixels."""
        pixels = self.image_size**2
        counters = np.arange(self._draws + 1, self._draws + 1 + -(-pixels // 8))[None, :]
        bits = words(self._streams(indices)[:, None], counters)
        levels = bits.astype("<u8", copy=False).view(np.uint8)[:, :pixels].astype(np.float32)
        levels = (levels - np.float32(127.5)) * np.float32(2 * self.noise)
        return levels.reshape(len(indices), self.image_size, self.image_size)


# The shapes, as signed distances: negative inside, in units of the radius of the circle around the shape.


@functools.lru_cache(maxsize=4)
def _shape_table(image_size: int) -> np.ndarray:
    """Signed distances of `SHAPES`, float32 `(10, T, T)` over [-1.25, 1.25]^2, with two cells or more to a pixel."""
    cells = 128 if image_size <= 48 else 256 if image_size <= 96 else 512
    place = ((np.arange(cells) + 0.5) / cells * 2 - 1) * _EXTENT
    x, y = np.meshgrid(place, place)  # y points down, as in the image
    return np.stack([globals()[f"_{name}"](x, y) for name in SHAPES]).astype(np.float32)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y, [(0, -1), (0.866, 0.5), (-0.866, 0.5)])


def _plus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.3, 0.95), _box(x, y, 0.95, 0.3))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.71) - 0.25


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    turns = np.arange(10) / 10 * 2 * np.pi
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.48)
    return _polygon(x, y, np.stack([radii * np.sin(turns), -radii * np.cos(turns)], 1))


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.7, 0.7)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y, [(-0.62, -0.78), (0.62, -0.78), (0.16, 0), (0.62, 0.78), (-0.62, 0.78), (-0.16, 0)])


def _tee(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y + 0.37, 0.78, 0.25), _box(x, y - 0.165, 0.27, 0.785))


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    bite = np.sqrt((x - 0.52) ** 2 + y * y) - 0.68
    return np.maximum(np.sqrt(x * x + y * y) - 0.95, -bite)


def _rhombus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y, [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)])


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to a rectangle around the origin."""
    right, down = np.abs(x) - half_width, np.abs(y) - half_height
    return np.sqrt(np.maximum(right, 0) ** 2 + np.maximum(down, 0) ** 2) + np.minimum(np.maximum(right, down), 0)


def _polygon(x: np.ndarray, y: np.ndarray, corners: ArrayLike) -> np.ndarray:
    """Signed distance to a simple polygon: the nearest edge, with the sign from the parity of crossings."""
    corners = np.asarray(corners, float)
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        nearest = np.minimum(nearest, (x - x0 - along * (x1 - x0)) ** 2 + (y - y0 - along * (y1 - y0)) ** 2)
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return np.where(inside, -1, 1) * np.sqrt(nearest)
