"""Images one at a time, on the host: decoded, cut to views.

Whatever holds the images, files or records or an array, what becomes of one is the same: `views` cuts random crops of
it for training, `batch` the central view for evaluation.
"""

import abc
import concurrent.futures
import functools
import hashlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import simplejpeg

from ifm_jax.data import crops
from ifm_jax.data.opencv import MOST_PIXELS, cv2
from ifm_jax.errors import RunError

if TYPE_CHECKING:
    from ifm_jax.data.trifeature import Trifeature

# A large JPEG is decoded at a half, a quarter or an eighth, which takes a third of the time, if that still leaves so
# many pixels to one of the view. It is no further from PIL's result than decoding the whole and shrinking that.
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PIXELS_LEFT = 1.5

_JPEG, _JPEG_END, _PNG = b"\xff\xd8", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class UnreadableImageError(RunError):
    """An image that is not there, is none, or is broken; the message says which and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"{name} cannot be read ({reason}): replace or remove it and start again; a run goes on from its last "
            "checkpoint, if you remove its data.json too, by which it would notice"
        )
        self.name, self.reason = name, reason

    def __reduce__(self):
        return UnreadableImageError, (self.name, self.reason)  # from a worker process


class Images(abc.ABC):
    """Random access to images: random crops of each for training, the central view and the labels for evaluation.

    Attributes:
      image_size: side of a view in pixels.
      random_crops: what `views` cuts.
      label_names: the classes of each label; empty without labels.
      earlier_fingerprints: what `fingerprint` was in earlier versions, so that their runs may go on.
    """

    def __init__(self, image_size: int, random_crops: crops.RandomCrops, label_names: dict[str, tuple[str, ...]]):
        self.image_size, self.random_crops, self.label_names = image_size, random_crops, label_names

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns what to call an image: the path of its file, or the record it is."""

    @abc.abstractmethod
    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label."""

    @abc.abstractmethod
    def _fingerprint(self) -> list[str | bytes]:
        """Returns what tells these images from others, wherever they lie."""

    @abc.abstractmethod
    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""

    @abc.abstractmethod
    def central_view(self, index: int) -> np.ndarray:
        """Returns one image as it is evaluated, uint8 `(image_size, image_size, 3)`.

        Raises:
          UnreadableImageError: if it cannot be read.
        """

    @abc.abstractmethod
    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image stretched or shrunk to a square, of which crops can be cut on a device; and its own size.

        Args:
          index: of the image.
          side: of the square in pixels; 0: leave the image as it is.

        Returns:
          uint8 `(side, side, 3)`; height and width in pixels.

        Raises:
          UnreadableImageError: if it cannot be read.
        """

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """What `fingerprint` was in earlier versions: nothing else."""
        return ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of which images these are, in which order; the same wherever they lie."""
        return digest(self._fingerprint())

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads several images as they are evaluated: the shorter side resized, the central square cut out.

        Args:
          indices: integers `(N,)`.

        Returns:
          `image`, uint8 `(N, image_size, image_size, 3)`, and int32 `(N,)` for each label.

        Raises:
          UnreadableImageError: if an image cannot be read.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = list(pool.map(self.central_view, np.asarray(indices).tolist()))
        return {"image": np.stack(images), **{name: values[indices] for name, values in self.labels().items()}}


def digest(parts: Sequence[str | bytes]) -> str:
    """Returns a hash of several texts."""
    found = hashlib.sha256()
    for part in parts:
        part = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        found.update(b"%d:%b" % (len(part), part))
    return found.hexdigest()[:24]


class EncodedImages(Images):
    """Images held as files are: JPEG, PNG, WebP or BMP."""

    @abc.abstractmethod
    def encoded(self, index: int) -> np.ndarray:
        """Returns the bytes of an image, uint8 `(N,)`.

        Raises:
          UnreadableImageError: if they cannot be had.
        """

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        encoded = self.encoded(index)
        size, image = jpeg_size(encoded), None
        if size is None:
            image = decode(self.name(index), encoded)
            size = image.shape[0], image.shape[1]
        boxes = self.random_crops.boxes(uniforms, *size)
        if image is None:
            reduction = _reduction(min(min(height, width) for _, _, height, width in boxes) / self.image_size)
            image = decode(self.name(index), encoded, reduction)
            boxes = [crops.reduced_box(box, reduction, *image.shape[:2]) for box in boxes]
        return tuple(_rgb(crops.cut(image, box, self.image_size)) for box in boxes)

    def central_view(self, index: int) -> np.ndarray:
        """Returns one image as it is evaluated; see `Images`."""
        encoded = self.encoded(index)
        size = jpeg_size(encoded)
        shrink = min(size) / crops.central_size(*size, self.image_size)[0] if size else 1
        return _rgb(crops.central_view(decode(self.name(index), encoded, _reduction(shrink)), self.image_size))

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square, and its own size; see `Images`."""
        encoded = self.encoded(index)
        size = jpeg_size(encoded)
        image = decode(self.name(index), encoded, _reduction(min(size) / side) if size and side else 1)
        size = size or image.shape[:2]
        return _rgb(crops.resize(image, side, side) if side else image), size


class PixelImages(Images):
    """Images held decoded."""

    @abc.abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """Returns an image, uint8 `(H, W, 3)`: red, green, blue."""

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        image = self.pixels(index)
        boxes = self.random_crops.boxes(uniforms, *image.shape[:2])
        return tuple(crops.cut(image, box, self.image_size) for box in boxes)

    def central_view(self, index: int) -> np.ndarray:
        """Returns one image as it is evaluated; see `Images`."""
        return crops.central_view(self.pixels(index), self.image_size)

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square, and its own size; see `Images`."""
        image = self.pixels(index)
        return crops.resize(image, side, side) if side else image, image.shape[:2]


class Cropped(PixelImages):
    """Views cut on the host from a source that has whole images to offer.

    Args:
      source: with images of the size of a view.
      random_crops: what `views` cuts.
    """

    def __init__(self, source: "Trifeature", random_crops: crops.RandomCrops):
        super().__init__(source.image_size, random_crops, source.label_names)
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Returns the number of an image."""
        return f"image {index}"

    def labels(self) -> dict[str, np.ndarray]:
        """Returns the labels of all images."""
        return self.source.labels()

    def pixels(self, index: int) -> np.ndarray:
        """Returns an image; see `PixelImages`."""
        return self.source.examples(np.array([index]))["image"][0]

    def _fingerprint(self) -> list[str | bytes]:
        return [self.source.fingerprint]


class _JpegHeader(NamedTuple):
    """What a JPEG's header says, before any rotation.

    Attributes:
      height: in pixels.
      width: in pixels.
      channels: 1, 3, or 4 inks.
      place: where in the file it says so.
    """

    height: int
    width: int
    channels: int
    place: int


def _jpeg_header(encoded: np.ndarray) -> _JpegHeader | None:
    data = encoded.data
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return _JpegHeader(height, width, data[place + 9], place) if height and width else None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def jpeg_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """Returns height and width as a JPEG's header has them, before any rotation; None: not a JPEG.

    Args:
      encoded: the file's bytes, uint8 `(N,)`.
    """
    header = _jpeg_header(encoded)
    return None if header is None else (header.height, header.width)


def _reduction(shrink: float) -> int:
    """Returns by how much an image may be reduced while it is decoded, if its pixels will be `shrink` to one."""
    return max(reduction for reduction in _REDUCED if reduction == 1 or reduction * _PIXELS_LEFT <= shrink)


def decode(name: str, encoded: np.ndarray, reduction: int = 1) -> np.ndarray:
    """Decodes an image file; what it holds decides how, not its name.

    The pixels are those of PIL's `Image.open(path).convert("RGB")`, which the original's loader uses: an orientation
    noted in the file is ignored, transparency dropped, gray repeated three times. The one exception: 16-bit gray is
    scaled to 8 bits, where PIL cuts off what is above 255.

    Args:
      name: of the image, for the error.
      encoded: the file's bytes, uint8 `(N,)`.
      reduction: 1, 2, 4 or 8: so much less high and wide, rounded up.

    Returns:
      uint8 `(H, W, 3)`: blue, green, red. The views made of it are turned into RGB, which is less work.

    Raises:
      UnreadableImageError: if it cannot be decoded; a truncated file cannot.
    """
    # libjpeg and libpng write what they think of a file to the process's standard error, from C, whatever OpenCV is
    # told: to lead that elsewhere would hide what XLA and a crash have to say. So JPEG goes to the same library by an
    # interface that keeps its remarks to itself (the same pixels in the same time), and PNG is checked before OpenCV
    # gets it, for a fortieth of the time. What may still speak is a PNG whose checksums are right and whose content is
    # not, which was written so.
    try:
        if encoded[:2].tobytes() == _JPEG:
            image = _decode_jpeg(encoded, reduction)
        elif encoded[:8].tobytes() == _PNG:
            image = cv2.imdecode(_plain_png(encoded), _REDUCED[reduction])
        else:
            image = cv2.imdecode(encoded, _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    except _TooLargeError as error:
        raise UnreadableImageError(name, str(error)) from None
    except (cv2.error, ValueError):
        image = None
    if image is None:
        raise UnreadableImageError(name, "not an image, or a broken one")
    return image


class _TooLargeError(Exception):
    """An image that would fill memory."""


def _check_pixels(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise _TooLargeError(f"{width} x {height} pixels, more than {MOST_PIXELS}")


def _decode_jpeg(encoded: np.ndarray, reduction: int) -> np.ndarray:
    """Decodes a JPEG as OpenCV does, without a word.

    Raises:
      ValueError: if it is truncated, or so broken that nothing can be made of it.
    """
    header = _jpeg_header(encoded)
    if header is None:
        raise ValueError
    _check_pixels(header.height, header.width)
    # Its end is missing: libjpeg would make up the rest. An embedded preview has an end of its own, before the header.
    if encoded[-2:].tobytes() != _JPEG_END and encoded.tobytes().rfind(_JPEG_END) < header.place:
        raise ValueError
    # The least size asked for says by how much to reduce.
    least = {"min_height": -(-header.height // reduction), "min_width": -(-header.width // reduction)}
    options: dict[str, Any] = {"strict": False} | (least if reduction > 1 else {})
    if header.channels != 4:
        return simplejpeg.decode_jpeg(encoded, "BGR", **options)
    inks = simplejpeg.decode_jpeg(encoded, "CMYK", **options)  # inverted, as everyone writes them
    return cv2.multiply(inks[..., 2::-1], np.repeat(inks[..., 3:], 3, axis=2), scale=1 / 255)


def _plain_png(encoded: np.ndarray) -> np.ndarray:
    """Returns a PNG without what does not concern its pixels, whose checksums are right.

    Raises:
      ValueError: if one is wrong, or something is missing.
    """
    data = encoded.tobytes()
    place, parts = len(_PNG), [_PNG]
    while place + 12 <= len(data):
        kind, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], "big")
        if kind in _PNG_CHUNKS:
            if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError
            parts.append(data[place:end])
        if kind == b"IHDR":
            width, height = (int.from_bytes(data[place + at : place + at + 4], "big") for at in (8, 12))
            if not width or not height:
                raise ValueError
            _check_pixels(height, width)
        if kind == b"IEND":
            return np.frombuffer(b"".join(parts), np.uint8)
        place = end
    raise ValueError


def _rgb(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_BGR2RGB)
