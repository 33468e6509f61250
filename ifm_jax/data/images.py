"""Images one at a time, on the host: decoding, and cutting views.

Files, records and arrays are all treated alike: `views` cuts random crops of an image for training, `examples` the
central view for evaluation.
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
    from ifm_jax.drawing import Drawn

# A large JPEG is decoded at a half, a quarter or an eighth, in a third of the time, if that leaves at least this many
# pixels per pixel of the view. The result is as close to PIL's as when the whole is decoded and then shrunk.
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
    """An image that is missing, broken, or not an image; the message names it and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"{name} cannot be read ({reason}): replace or delete it and start again; a run resumes from its last "
            "checkpoint if you also delete its data.json, which would reject the new images"
        )
        self.name, self.reason = name, reason

    def __reduce__(self):
        return UnreadableImageError, (self.name, self.reason)  # from a worker process


class Images(abc.ABC):
    """Random access to images: random crops of each for training, the central view and the labels for evaluation.

    Attributes:
      image_size: side of a view in pixels.
      random_crops: crops that `views` cuts.
      label_names: names of the classes of each label; empty without labels.
      earlier_fingerprints: values of `fingerprint` in earlier versions, so that their runs can resume.
    """

    channels = 3

    def __init__(self, image_size: int, random_crops: crops.RandomCrops, label_names: dict[str, tuple[str, ...]]):
        self.image_size, self.random_crops, self.label_names = image_size, random_crops, label_names

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns the display name of an image: the path of its file, or its record."""

    @abc.abstractmethod
    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label."""

    @abc.abstractmethod
    def _fingerprint(self) -> list[str | bytes]:
        """Returns data that identifies these images, wherever they are stored."""

    @abc.abstractmethod
    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""

    @abc.abstractmethod
    def central_view(self, index: int) -> np.ndarray:
        """Returns the evaluation view of one image, uint8 `(image_size, image_size, 3)`.

        Raises:
          UnreadableImageError: if it cannot be read.
        """

    @abc.abstractmethod
    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image stretched or shrunk to a square, to be cropped on a device, and its original size.

        Args:
          index: number of the image.
          side: side of the square in pixels; 0: leave the image as it is.

        Returns:
          uint8 `(side, side, 3)`; height and width in pixels.

        Raises:
          UnreadableImageError: if it cannot be read.
        """

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """Values of `fingerprint` in earlier versions: none."""
        return ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the images and their order, independent of where they are stored."""
        return digest(self._fingerprint())

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads the evaluation views of several images: the shorter side resized, the central square cut out.

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
    """Images stored encoded: JPEG, PNG, WebP or BMP."""

    @abc.abstractmethod
    def encoded(self, index: int) -> np.ndarray:
        """Returns the bytes of an image, uint8 `(N,)`.

        Raises:
          UnreadableImageError: if they cannot be read.
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
        """Returns the evaluation view of one image; see `Images`."""
        encoded = self.encoded(index)
        size = jpeg_size(encoded)
        shrink = min(size) / crops.central_size(*size, self.image_size)[0] if size else 1
        return _rgb(crops.central_view(decode(self.name(index), encoded, _reduction(shrink)), self.image_size))

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square, and its original size; see `Images`."""
        encoded = self.encoded(index)
        size = jpeg_size(encoded)
        image = decode(self.name(index), encoded, _reduction(min(size) / side) if size and side else 1)
        size = size or image.shape[:2]
        return _rgb(crops.resize(image, side, side) if side else image), size


class PixelImages(Images):
    """Images stored decoded."""

    @abc.abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """Returns an image, uint8 `(H, W, 3)`: red, green, blue."""

    def views(self, index: int, uniforms: Sequence[float]) -> tuple[np.ndarray, ...]:
        """Cuts random crops of one image; see `ViewSource`."""
        image = self.pixels(index)
        boxes = self.random_crops.boxes(uniforms, *image.shape[:2])
        return tuple(crops.cut(image, box, self.image_size) for box in boxes)

    def central_view(self, index: int) -> np.ndarray:
        """Returns the evaluation view of one image; see `Images`."""
        return crops.central_view(self.pixels(index), self.image_size)

    def whole(self, index: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as a square, and its original size; see `Images`."""
        image = self.pixels(index)
        return crops.resize(image, side, side) if side else image, image.shape[:2]


class Cropped(PixelImages):
    """Views cut on the host from a source of whole images.

    Args:
      source: source whose images have the size of a view.
      random_crops: crops that `views` cuts.
    """

    def __init__(self, source: "Drawn", random_crops: crops.RandomCrops):
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
    """The fields of a JPEG header, before any rotation.

    Attributes:
      height: height in pixels.
      width: width in pixels.
      channels: 1, 3, or 4 (inks).
      place: byte offset of the frame header in the file.
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
    """Returns height and width from a JPEG's header, before any rotation; None if it is not a JPEG.

    Args:
      encoded: the file's bytes, uint8 `(N,)`.
    """
    header = _jpeg_header(encoded)
    return None if header is None else (header.height, header.width)


def _reduction(shrink: float) -> int:
    """Returns the largest reduction for decoding an image whose sides will shrink by the factor `shrink`."""
    return max(reduction for reduction in _REDUCED if reduction == 1 or reduction * _PIXELS_LEFT <= shrink)


def decode(name: str, encoded: np.ndarray, reduction: int = 1) -> np.ndarray:
    """Decodes an image file by its content, not its name.

    The pixels equal those of PIL's `Image.open(path).convert("RGB")`, which the original's loader uses: the orientation
    tag is ignored, transparency is dropped, gray is repeated three times. The one exception: 16-bit gray is scaled to 8
    bits, where PIL clips values above 255.

    Args:
      name: name of the image, for the error.
      encoded: the file's bytes, uint8 `(N,)`.
      reduction: 1, 2, 4 or 8: the factor by which height and width shrink, rounded up.

    Returns:
      uint8 `(H, W, 3)`: blue, green, red. Converting only the views to RGB is less work.

    Raises:
      UnreadableImageError: if it cannot be decoded, for example because it is truncated.
    """
    # libjpeg and libpng write warnings to the process's standard error, from C, whatever OpenCV's log level.
    # Redirecting it would hide the messages of XLA and of a crash. So JPEG goes to the same library through a silent
    # interface (same pixels, same time), and PNG is checked before OpenCV gets it, which costs a fortieth of the time.
    # Only a PNG that was written broken, with correct checksums, can still cause a warning.
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
    """Decodes a JPEG as OpenCV does, without warnings.

    Raises:
      ValueError: if it is truncated or too broken to decode.
    """
    header = _jpeg_header(encoded)
    if header is None:
        raise ValueError
    _check_pixels(header.height, header.width)
    # The end marker is missing: libjpeg would invent the rest. An embedded preview has its own, before the header.
    if encoded[-2:].tobytes() != _JPEG_END and encoded.tobytes().rfind(_JPEG_END) < header.place:
        raise ValueError
    # The library derives the reduction from the least size requested.
    least = {"min_height": -(-header.height // reduction), "min_width": -(-header.width // reduction)}
    options: dict[str, Any] = {"strict": False} | (least if reduction > 1 else {})
    if header.channels != 4:
        return simplejpeg.decode_jpeg(encoded, "BGR", **options)
    inks = simplejpeg.decode_jpeg(encoded, "CMYK", **options)  # inverted, as everyone writes them
    return cv2.multiply(inks[..., 2::-1], np.repeat(inks[..., 3:], 3, axis=2), scale=1 / 255)


def _plain_png(encoded: np.ndarray) -> np.ndarray:
    """Returns a PNG reduced to the chunks that its pixels need, after checking their checksums.

    Raises:
      ValueError: if a checksum is wrong or something is missing.
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
