"""Images drawn by the program: the random numbers, the textures and colors, and a source that keeps what it has drawn.

Every random number is a hash of (seed, split, index, number of the draw), so an image depends on nothing else, and not
on the images drawn beside it. A texture is one periodic tile, sampled at the rotated, shifted pixel centers. It is a
light and dark modulation of a color with zero mean and the same strength for every pattern, so that neither mean
brightness nor hue tells the textures apart. The first entries of `TEXTURES` and `COLORS` are the easiest to tell apart;
a smaller set takes the first few.

Each pixel takes additions, multiplications and look-ups, which give the same result on every machine with IEEE
arithmetic. Nothing here needs JAX.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import ClassVar

import numpy as np

SPLITS = ("train", "test")
TEXTURES = ("stripes", "dots", "grid", "checker", "speckle", "blobs", "zigzag", "targets", "triangles", "bricks")
COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white", "purple", "pink")

RGB = np.array(
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
_LIGHT = (0.55, 0.42)  # mean and spread of every texture, relative to the color
_TILE_PERIODS = 4  # periods in a texture tile, the least common span of all patterns
_PIXELS_AT_ONCE = 1 << 18  # in one pass of the drawing loop: few calls and little memory

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A random-access source of drawn images with their labels: what `Trifeature` and `Digits` share.

    An image is a pure function of (`seed`, `split`, index) and the drawing parameters; `size` is only their number. The
    labels are drawn independently and uniformly. Images are drawn on access until `images` has drawn them all; after
    that they are looked up.

    A subclass adds its drawing parameters, `label_names` and `_draw_few`, and sets the class attributes.

    Attributes:
      split: `"train"` or `"test"`; the two share no random draw.
      size: number of images.
      image_size: height and width in pixels, 32 to 224.
      seed: any non-negative integer below 2**64.

    Raises:
      ValueError: if an attribute is outside its range.
    """

    # The folder of its cache files; what stands before the fields in their names, to be changed when the same fields
    # give other pixels; and the number of draws for each image, the first of which choose the labels.
    _folder: ClassVar[str]
    _version: ClassVar[tuple[str | int, ...]]
    _draws: ClassVar[int]

    split: str = "train"
    size: int = 8192
    image_size: int = 32
    seed: int = 0

    def __post_init__(self):
        require(self.split in SPLITS, "split", self.split, "one of 'train' and 'test'", "choose one of them")
        require(self.size >= 1, "size", self.size, "at least 1", "ask for one image or more")
        require(32 <= self.image_size <= 224, "image_size", self.image_size, "32 to 224", "choose a size in between")
        require(0 <= self.seed < 2**64, "seed", self.seed, "0 to 2**64 - 1", "choose a non-negative integer")

    def _require_classes(self, *names: str) -> None:
        """Checks numbers of classes."""
        for name in names:
            require(2 <= getattr(self, name) <= 10, name, getattr(self, name), "2 to 10", "there are ten of each")

    def _require_angles(self, *names: str) -> None:
        """Checks greatest angles."""
        for name in names:
            require(0 <= getattr(self, name) <= 180, name, getattr(self, name), "0 to 180 degrees", "180 is any angle")

    def _require_period(self, period: float) -> None:
        """Checks the period of the textures."""
        require(0.1 <= period <= 1, "texture_period", period, "0.1 to 1", "0.2 is the default")

    def _require_scale(self, scale: tuple[float, float], least: float, largest: str) -> None:
        """Checks the range of a size; `largest` says what happens at 1."""
        expected = f"(low, high) with {least:g} <= low <= high <= 1"
        require(len(scale) == 2 and least <= scale[0] <= scale[1] <= 1, "scale", scale, expected, largest)

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each label, in the order of their draws."""
        raise NotImplementedError

    def _draw_few(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Draws images into `out`, uint8 `(N, H, W, 3)`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """Returns one example: `image`, uint8 `(H, W, 3)`, and its labels.

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
          `image`, uint8 `(N, H, W, 3)`, and int32 `(N,)` for each label.

        Raises:
          IndexError: if an index is out of range.
        """
        indices = self._checked(indices)
        cached = self.__dict__.get("_all_images")
        return {"image": self._draw(indices) if cached is None else np.array(cached[indices]), **self._labels(indices)}

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images, int32 `(size,)` for each."""
        return self._labels(np.arange(self.size))

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
        parameters = json.dumps([*self._version, dataclasses.asdict(self)], sort_keys=True, default=float)
        return hashlib.sha256(parameters.encode()).hexdigest()[:24]

    # The disk cache.

    def _cache_file(self) -> pathlib.Path:
        from ifm_jax import files  # here, so that the drawing itself needs nothing but NumPy

        return files.cache_directory(self._folder) / f"{self.fingerprint}.npy"

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
        stream = mix(np.array([self.seed], np.uint64) + _GOLDEN)
        stream = mix(stream ^ np.uint64(1 + SPLITS.index(self.split)))
        return mix(stream + indices.astype(np.uint64) * _GOLDEN)

    def _uniforms(self, indices: np.ndarray) -> np.ndarray:
        """The draws of each image, float64 `(_draws, N)` in [0, 1)."""
        return uniforms(self._streams(indices)[None, :], np.arange(1, self._draws + 1)[:, None])

    def _labels(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        names = self.label_names
        uniforms = self._uniforms(indices)[: len(names)]
        return {name: (u * len(of)).astype(np.int32) for (name, of), u in zip(names.items(), uniforms, strict=True)}

    def _draw(self, indices: np.ndarray) -> np.ndarray:
        """Draws images, uint8 `(N, H, W, 3)`."""
        images = np.empty((len(indices), *self._all_shape[1:]), np.uint8)
        step = max(1, _PIXELS_AT_ONCE // self.image_size**2)
        for start in range(0, len(indices), step):
            self._draw_few(indices[start : start + step], images[start : start + step])
        return images


def require(holds: bool, name: str, value: object, expected: str, remedy: str) -> None:
    """Raises a `ValueError` that names a field, its value, what was expected and the remedy, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}; {remedy}")


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of uint64 that mixes all bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def words(streams: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Returns random words, uint64: a hash of a stream and the number of the draw, each of any shape."""
    return mix(streams + counters.astype(np.uint64) * _GOLDEN)


def uniforms(streams: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Returns random numbers, float64 in [0, 1): a hash of a stream and the number of the draw, each of any shape."""
    return (words(streams, counters) >> np.uint64(11)) * 2.0**-53


def per_image(values: np.ndarray) -> np.ndarray:
    """Returns one value per image, `(N,)`, in a shape that fits images, `(N, 1, 1)`."""
    return values[:, None, None]


def rotated_grid(
    size: int, center_x: np.ndarray, center_y: np.ndarray, angle: np.ndarray, zoom: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pixel centers in a frame at `center`, turned by `angle` and magnified by `zoom`: two float32 `(N, H, W)`."""
    place = (np.arange(size) + 0.5) / size
    x, y = place[None, :] - center_x[:, None], place[None, :] - center_y[:, None]
    cosine, sine = (zoom * np.cos(angle))[:, None], (zoom * np.sin(angle))[:, None]
    terms = [term.astype(np.float32) for term in (cosine * x, sine * y, -sine * x, cosine * y)]
    return terms[0][:, None, :] + terms[1][:, :, None], terms[2][:, None, :] + terms[3][:, :, None]


# The textures, as boolean patterns of (u, v) in periods, each repeating after `_TILE_PERIODS` in u and in v.


def texture_light(
    texture: np.ndarray,
    size: int,
    period: float,
    center_x: np.ndarray,
    center_y: np.ndarray,
    angle: np.ndarray,
    shift_u: np.ndarray,
    shift_v: np.ndarray,
) -> np.ndarray:
    """Returns the light of a texture at every pixel, float32 `(N, H, W)`, relative to the color.

    Args:
      texture: numbers of the textures in `TEXTURES`, int `(N,)`.
      size: height and width in pixels.
      period: one period of a texture, relative to the image side.
      center_x: the point about which it is turned, relative to the image side, `(N,)`.
      center_y: the same, downwards.
      angle: the angle in radians, `(N,)`.
      shift_u: its shift in tiles, `(N,)` in [0, 1).
      shift_v: the same, in the other direction.
    """
    tile = texture_tile(size, period)
    side = tile.shape[1]  # a power of two
    column, row = rotated_grid(size, center_x, center_y, angle, np.asarray(side / (period * _TILE_PERIODS)))
    # Shifted by one tile or more, so that rounding towards zero rounds down.
    column = (column + per_image((side * (2 + shift_u)).astype(np.float32))).astype(np.int32) & (side - 1)
    row = (row + per_image((side * (2 + shift_v)).astype(np.float32))).astype(np.int32) & (side - 1)
    return tile.ravel()[column + row * side + per_image(texture * tile[0].size)]


@functools.lru_cache(maxsize=4)
def texture_tile(image_size: int, period: float) -> np.ndarray:
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
    bits = mix(np.arange(1, cells * cells + 1, dtype=np.uint64) * _GOLDEN).reshape(cells, cells)
    return (bits[np.floor(3 * v).astype(int), np.floor(3 * u).astype(int)] >> np.uint64(63)) == 1


def _blobs(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The positive part of a sum of waves of about two periods, in directions and phases drawn once for all."""
    waves = [
        (a, b) for a in range(-2, 3) for b in range(3) if 1.4 <= np.sqrt(a * a + b * b) <= 2.3 and (b > 0 or a > 0)
    ]
    phases = (mix(np.arange(1, len(waves) + 1, dtype=np.uint64) * _GOLDEN) >> np.uint64(11)) * 2.0**-53
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
