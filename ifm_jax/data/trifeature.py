"""Trifeature: images that vary independently in shape, texture and color, drawn by the program.

The data set follows Hermann and Lampinen, "What shapes feature representations?" (NeurIPS 2020). The IFM paper uses it
to see which features a contrastive encoder keeps and which it suppresses. An image shows a shape, filled with a rotated
texture, in a color, at a random place on a gray background. The texture is a light and dark modulation of the color
with zero mean and the same strength for every pattern, so that neither mean brightness nor hue tells the textures
apart. The first entries of `SHAPES`, `TEXTURES` and `COLORS` are the easiest to tell apart; a smaller set takes the
first few.

Every random number is a hash of (seed, split, index, number of the draw), so an image depends on nothing else, and not
on the images drawn beside it. A shape is a table of signed distances, a texture one periodic tile; both are sampled at
the rotated, shifted pixel centers. Each pixel takes additions, multiplications and two look-ups, which give the same
result on every machine with IEEE arithmetic.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

SHAPES = ("circle", "triangle", "plus", "ring", "star", "square", "hourglass", "tee", "crescent", "rhombus")
TEXTURES = ("stripes", "dots", "grid", "checker", "speckle", "blobs", "zigzag", "targets", "triangles", "bricks")
COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white", "purple", "pink")
SPLITS = ("train", "test")

# Increase this when the same parameters give other pixels: it is part of the name of a cache file.
DRAWING_VERSION = 1

_RGB = np.array(
    [
        (225, 40, 40),
        (45, 170, 60),
        (45, 80, 230),
        (235, 215, 40),
        (50, 205, 220),
        (225, 60, 200),
        (245, 135, 25),
        (245, 245, 245),
        (125, 60, 205),
        (250, 160, 175),
    ],
    dtype=np.float32,
)
_GREY = (90.0, 140.0)  # the background's level, one draw per image
_LIGHT = (0.55, 0.42)  # mean and spread of every texture, relative to the color
_TILE_PERIODS = 4  # periods in a texture tile, the least common span of all patterns
_EXTENT = 1.25  # a shape table covers [-1.25, 1.25]^2; the shape lies within the unit circle
_PIXELS_AT_ONCE = 1 << 18  # in one pass of the drawing loop: few calls and little memory

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NUM_DRAWS = 11  # per image, besides the noise


@dataclasses.dataclass(frozen=True)
class Trifeature:
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

    split: str = "train"
    size: int = 8192
    image_size: int = 32
    seed: int = 0
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
        _require(self.split in SPLITS, "split", self.split, "one of 'train' and 'test'", "choose one of them")
        _require(self.size >= 1, "size", self.size, "at least 1", "ask for one image or more")
        _require(32 <= self.image_size <= 224, "image_size", self.image_size, "32 to 224", "choose a size in between")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "0 to 2**64 - 1", "choose a non-negative integer")
        for name in ("num_shapes", "num_textures", "num_colors"):
            _require(2 <= getattr(self, name) <= 10, name, getattr(self, name), "2 to 10", "there are ten of each")
        for name in ("rotation", "texture_rotation"):
            _require(0 <= getattr(self, name) <= 180, name, getattr(self, name), "0 to 180 degrees", "180 is any angle")
        _require(
            0.1 <= self.texture_period <= 1, "texture_period", self.texture_period, "0.1 to 1", "0.2 is the default"
        )
        _require(
            len(self.scale) == 2 and 0.2 <= self.scale[0] <= self.scale[1] <= 1,
            "scale",
            self.scale,
            "(low, high) with 0.2 <= low <= high <= 1",
            "a shape of size 1 touches the border",
        )
        _require(0 <= self.noise <= 0.3, "noise", self.noise, "0 to 0.3", "0.06 is the default")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """Returns one example: `image`, uint8 `(H, W, 3)`, and the labels `shape`, `texture` and `color`.

        Raises:
          IndexError: if `index` is not in 0..size - 1.
        """
        example = self.examples(np.asarray([index]))
        return {"image": example["image"][0], **{name: int(example[name][0]) for name in self.label_names}}

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns several examples at once.

        Args:
          indices: integers `(N,)`, each in 0..size - 1.

        Returns:
          `image`, uint8 `(N, H, W, 3)`, and `shape`, `texture` and `color`, int32 `(N,)`.

        Raises:
          IndexError: if an index is out of range.
        """
        indices = self._checked(indices)
        cached = self.__dict__.get("_all_images")
        return {"image": self._draw(indices) if cached is None else np.array(cached[indices]), **self._labels(indices)}

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images: `shape`, `texture` and `color`, int32 `(size,)`."""
        return self._labels(np.arange(self.size))

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each label."""
        return {
            "shape": SHAPES[: self.num_shapes],
            "texture": TEXTURES[: self.num_textures],
            "color": COLORS[: self.num_colors],
        }

    def images(self) -> np.ndarray:
        """Returns all images, uint8 `(size, H, W, 3)`, read-only; drawn once and kept.

        They are kept in a file under `$IFM_JAX_CACHE` (`~/.cache/ifm_jax` if unset) named after everything that
        determines them, and mapped into memory from there. Where no file can be written they stay in memory.
        """
        return self._all_images

    @functools.cached_property
    def _all_images(self) -> np.ndarray:
        path = self._cache_file()
        if (images := self._open(path)) is None:
            try:
                self._write(path)
                images = self._open(path)
            except OSError:  # read-only, full, or no home directory: keep them in memory
                pass
        if images is None:
            images = self._draw(np.arange(self.size))
            images.flags.writeable = False
        return images

    def __getstate__(self):
        """Pickles only the fields: a worker process maps the cache file, or draws, itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """Values of `fingerprint` in earlier versions: none."""
        return ()

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the images."""
        parameters = json.dumps([DRAWING_VERSION, dataclasses.asdict(self)], sort_keys=True, default=float)
        return hashlib.sha256(parameters.encode()).hexdigest()[:24]

    # The disk cache.

    def _cache_file(self) -> pathlib.Path:
        from ifm_jax import files  # here, so that the drawing itself needs nothing but NumPy

        return files.cache_directory("trifeature") / f"{self.fingerprint}.npy"

    def _open(self, path: pathlib.Path) -> np.ndarray | None:
        try:
            images = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError):  # missing, unreadable or incomplete
            return None
        return images if images.shape == self._all_shape and images.dtype == np.uint8 else None

    def _write(self, path: pathlib.Path) -> None:
        """Writes the file under a temporary name, part by part, and renames it when it is whole."""
        from ifm_jax import files

        path.parent.mkdir(parents=True, exist_ok=True)
        # Plain writes: on a full disk a write to a memory map would kill the process.
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": self._all_shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, self.size, 1024):
                file.write(self._draw(np.arange(start, min(start + 1024, self.size))).data)

    @property
    def _all_shape(self) -> tuple[int, int, int, int]:
        return (self.size, self.image_size, self.image_size, 3)

    # The random draws.

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim != 1 or not (indices.size == 0 or np.issubdtype(indices.dtype, np.integer)):
            raise ValueError(
                f"indices are {indices.dtype} of shape {indices.shape}, expected integers of shape (N,); pass a "
                "one-dimensional integer array"
            )
        if wrong := [int(index) for index in indices if not 0 <= index < self.size][:1]:
            raise IndexError(f"index is {wrong[0]}, expected 0 to {self.size - 1}; `size` sets the number of images")
        return indices.astype(np.int64)

    def _streams(self, indices: np.ndarray) -> np.ndarray:
        """One uint64 per image, from which all its random numbers derive."""
        stream = _mix(np.array([self.seed], np.uint64) + _GOLDEN)
        stream = _mix(stream ^ np.uint64(1 + SPLITS.index(self.split)))
        return _mix(stream + indices.astype(np.uint64) * _GOLDEN)

    def _uniforms(self, indices: np.ndarray) -> np.ndarray:
        """The draws of each image, float64 `(_NUM_DRAWS, N)` in [0, 1)."""
        counters = np.arange(1, _NUM_DRAWS + 1, dtype=np.uint64)[:, None]
        bits = _mix(self._streams(indices)[None, :] + counters * _GOLDEN)
        return (bits >> np.uint64(11)) * 2.0**-53

    def _labels(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        uniforms = self._uniforms(indices)[:3]
        classes = (self.num_shapes, self.num_textures, self.num_colors)
        names = ("shape", "texture", "color")
        return {name: (u * count).astype(np.int32) for name, u, count in zip(names, uniforms, classes, strict=True)}

    def _draw(self, indices: np.ndarray) -> np.ndarray:
        """Draws images, uint8 `(N, H, W, 3)`."""
        images = np.empty((len(indices), *self._all_shape[1:]), np.uint8)
        step = max(1, _PIXELS_AT_ONCE // self.image_size**2)
        for start in range(0, len(indices), step):
            self._draw_few(indices[start : start + step], images[start : start + step])
        return images

    def _draw_few(self, indices: np.ndarray, out: np.ndarray) -> None:
        size = self.image_size
        labels = self._labels(indices)
        turn, zoom, right, down, grain, shift_u, shift_v, gray = self._uniforms(indices)[3:]
        # Lengths are relative to the image side. The circle around the shape stays within the image.
        radius = 0.5 * (self.scale[0] + (self.scale[1] - self.scale[0]) * zoom)
        center_x = radius + (1 - 2 * radius) * right
        center_y = radius + (1 - 2 * radius) * down
        angle = np.deg2rad(self.rotation) * (2 * turn - 1)
        grain_angle = np.deg2rad(self.texture_rotation) * (2 * grain - 1)

        table = _shape_table(size)
        cells = table.shape[1] / (2 * _EXTENT)  # of the table, for a length of one radius
        column, row = _rotated_grid(size, center_x, center_y, angle, cells / radius)
        last = np.float32(table.shape[1] - 1)
        column = np.clip(column + np.float32(_EXTENT * cells), 0, last).astype(np.int32)
        row = np.clip(row + np.float32(_EXTENT * cells), 0, last).astype(np.int32)
        distance = table.ravel()[column + row * table.shape[1] + _per_image(labels["shape"] * table[0].size)]
        # The share of the pixel inside the shape, to first order: one pixel from 0 to 1 across the outline.
        coverage = np.clip(np.float32(0.5) - distance * _per_image((radius * size).astype(np.float32)), 0, 1)

        tile = _texture_tile(size, self.texture_period)
        side = tile.shape[1]  # a power of two
        column, row = _rotated_grid(size, center_x, center_y, grain_angle, side / (self.texture_period * _TILE_PERIODS))
        # Shifted by one tile or more, so that rounding towards zero rounds down.
        column = (column + _per_image((side * (2 + shift_u)).astype(np.float32))).astype(np.int32) & (side - 1)
        row = (row + _per_image((side * (2 + shift_v)).astype(np.float32))).astype(np.int32) & (side - 1)
        light = tile.ravel()[column + row * side + _per_image(labels["texture"] * tile[0].size)]

        background = _per_image((_GREY[0] + (_GREY[1] - _GREY[0]) * gray).astype(np.float32))
        if self.noise:
            background = background + self._noise(indices)
        light *= coverage
        background = background * (1 - coverage) + np.float32(0.5)  # the half rounds to nearest
        for channel, value in enumerate(_RGB[labels["color"]].T):
            out[..., channel] = np.clip(light * _per_image(value) + background, 0, 255)

    def _noise(self, indices: np.ndarray) -> np.ndarray:
        """Uniform noise in gray levels, float32 `(N, H, W)`; one hash serves eight pixels."""
        pixels = self.image_size**2
        counters = np.arange(_NUM_DRAWS + 1, _NUM_DRAWS + 1 + -(-pixels // 8), dtype=np.uint64)[None, :]
        words = _mix(self._streams(indices)[:, None] + counters * _GOLDEN)
        levels = words.astype("<u8", copy=False).view(np.uint8)[:, :pixels].astype(np.float32)
        levels = (levels - np.float32(127.5)) * np.float32(2 * self.noise)
        return levels.reshape(len(indices), self.image_size, self.image_size)


def _require(holds: bool, name: str, value: object, expected: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}; {remedy}")


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of uint64 that mixes all bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _per_image(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]


def _rotated_grid(
    size: int, center_x: np.ndarray, center_y: np.ndarray, angle: np.ndarray, zoom: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pixel centers in a frame at `center`, turned by `angle` and magnified by `zoom`: two float32 `(N, H, W)`."""
    place = (np.arange(size) + 0.5) / size
    x, y = place[None, :] - center_x[:, None], place[None, :] - center_y[:, None]
    cosine, sine = (zoom * np.cos(angle))[:, None], (zoom * np.sin(angle))[:, None]
    terms = [term.astype(np.float32) for term in (cosine * x, sine * y, -sine * x, cosine * y)]
    return terms[0][:, None, :] + terms[1][:, :, None], terms[2][:, None, :] + terms[3][:, :, None]


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


# The textures, as boolean patterns of (u, v) in periods, each repeating after `_TILE_PERIODS` in u and in v.


@functools.lru_cache(maxsize=4)
def _texture_tile(image_size: int, period: float) -> np.ndarray:
    """The light of `TEXTURES`, float32 `(10, T, T)` over `_TILE_PERIODS` periods, T a power of two.

    Blurred over one pixel, so that sampling at pixel centers does not alias; then all with the same mean and spread.
    """
    per_period = 32 if image_size <= 96 else 64
    place = (np.arange(per_period * _TILE_PERIODS) + 0.5) / per_period
    u, v = np.meshgrid(place, place)
    width = max(1, round(per_period / (period * image_size)))
    tiles = []
    for name in TEXTURES:
        tile = _wrapped_blur(globals()[f"_{name}"](u, v).astype(float), width)
        tiles.append(_LIGHT[0] + _LIGHT[1] * (tile - tile.mean()) / tile.std())
    return np.stack(tiles).astype(np.float32)


def _wrapped_blur(tile: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` x `width` samples, around the edges of the tile."""
    for axis in (0, 1):
        tile = np.asarray(sum(np.roll(tile, shift - width // 2, axis) for shift in range(width))) / width
    return tile


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u % 1 < 0.5


def _checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.floor(u) + np.floor(v)) % 2 == 0


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _staggered(u, v, 4 / 3, 1.0, lambda x, y: x * x + y * y < 0.4**2)


def _zigzag(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (0.75 * v + 0.75 * np.abs(u % 2 - 1)) % 1 < 0.5


def _grid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u % (4 / 3) < 0.38) | (v % (4 / 3) < 0.38)


def _speckle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A random choice in each cell of a fine lattice, drawn once for all."""
    cells = 3 * _TILE_PERIODS
    bits = _mix(np.arange(1, cells * cells + 1, dtype=np.uint64) * _GOLDEN).reshape(cells, cells)
    return (bits[np.floor(3 * v).astype(int), np.floor(3 * u).astype(int)] >> np.uint64(63)) == 1


def _blobs(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The positive part of a sum of waves of about two periods, in directions and phases drawn once for all."""
    waves = [
        (a, b) for a in range(-2, 3) for b in range(3) if 1.4 <= np.sqrt(a * a + b * b) <= 2.3 and (b > 0 or a > 0)
    ]
    phases = (_mix(np.arange(1, len(waves) + 1, dtype=np.uint64) * _GOLDEN) >> np.uint64(11)) * 2.0**-53
    angles = [2 * np.pi * ((a * u + b * v) / 4 + p) for (a, b), p in zip(waves, phases, strict=True)]
    return np.asarray(sum(np.cos(angle) for angle in angles)) > 0


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _staggered(u, v, 4 / 3, 1.0, lambda x, y: np.abs(x) < (y + 0.5) * 2 / 3)


def _targets(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Dots with a ring around each."""
    radius = np.sqrt((u % 2 - 1) ** 2 + (v % 2 - 1) ** 2)
    return (radius < 0.32) | (np.abs(radius - 0.85) < 0.19)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Light bricks, dark mortar."""
    row = np.floor(v)
    return (v % 1 > 0.3) & ((u + row % 2) % 2 > 0.3)


def _staggered(
    u: np.ndarray,
    v: np.ndarray,
    width: float,
    height: float,
    motif: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """A motif in the cells of a `width` x `height` lattice, every other row shifted by half a cell."""
    row = np.floor(v / height)
    return motif((u + row % 2 * width / 2) % width - width / 2, v % height - height / 2)
