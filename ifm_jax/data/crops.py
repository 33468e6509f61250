"""Views cut on the host: random resized crops for training, the central view for evaluation.

Boxes follow torchvision's `RandomResizedCrop`, computed from given random numbers. OpenCV resamples each crop to within
3/255 of PIL's antialiased bilinear filter, on average over each view of a photograph, in a fraction of its time.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ifm_jax.data.opencv import cv2

SCALE = (0.2, 1.0)  # least and greatest area of a crop, relative to the image's: MoCo v1 and v2
RATIO = (3 / 4, 4 / 3)  # least and greatest width over height
DRAWS = 22  # random numbers for each crop: ten areas, ten aspect ratios, the place

_ATTEMPTS = 10
_LONGEST = 16  # times the shorter side; only the middle is evaluated anyway
_LINEAR_UP_TO = 2.2  # source pixels per result pixel; beyond this, interpolation would skip some
_LINEAR_BY = 1.4  # likewise, where more averaging follows

Box = tuple[int, int, int, int]  # top, left, height, width


def random_box(
    uniforms: Sequence[float],
    height: int,
    width: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Box:
    """Chooses a crop as torchvision's `RandomResizedCrop` does.

    The area and the logarithm of the aspect ratio are uniform. The function uses the first of ten such draws that fits
    in the image, at a uniform position. If none fits, it uses the largest central box whose aspect ratio is in range.

    Args:
      uniforms: `DRAWS` numbers in [0, 1).
      height: height of the image in pixels.
      width: width of the image in pixels.
      scale: least and greatest area, relative to the image's.
      ratio: least and greatest width over height.

    Returns:
      top, left, height and width in whole pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        area = (scale[0] + (scale[1] - scale[0]) * uniforms[attempt]) * height * width
        aspect = math.exp(low + (high - low) * uniforms[_ATTEMPTS + attempt])
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(uniforms[2 * _ATTEMPTS] * (height - box_height + 1))
            left = int(uniforms[2 * _ATTEMPTS + 1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width / ratio[0]))
    box_width = min(width, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_boxes(
    uniforms: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> np.ndarray:
    """Chooses one crop for each of many images at once, the same as `random_box`.

    Args:
      uniforms: `(N, DRAWS)` in [0, 1).
      heights: heights of the images in pixels, `(N,)`.
      widths: widths of the images in pixels, `(N,)`.
      scale: least and greatest area, relative to the image's.
      ratio: least and greatest width over height.

    Returns:
      int64 `(N, 4)`: top, left, height and width in whole pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    areas = (scale[0] + (scale[1] - scale[0]) * uniforms[:, :_ATTEMPTS]) * heights[:, None] * widths[:, None]
    aspects = np.exp(low + (high - low) * uniforms[:, _ATTEMPTS : 2 * _ATTEMPTS])
    tall = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    wide = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    fits = (tall > 0) & (tall <= heights[:, None]) & (wide > 0) & (wide <= widths[:, None])
    first, found = fits.argmax(axis=1)[:, None], fits.any(axis=1)
    largest = (
        np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64)),
        np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64)),
    )
    height, width = (
        np.where(found, np.take_along_axis(sides, first, axis=1)[:, 0], most)
        for sides, most in zip((tall, wide), largest, strict=True)
    )
    top = np.where(found, uniforms[:, -2] * (heights - height + 1), (heights - height) // 2)
    left = np.where(found, uniforms[:, -1] * (widths - width + 1), (widths - width) // 2)
    return np.stack([top.astype(np.int64), left.astype(np.int64), height, width], axis=1)


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """The number and the size range of the crops cut from an image.

    Attributes:
      count: number of independent crops per image.
      scale: least and greatest area, relative to the image's.
    """

    count: int = 2
    scale: tuple[float, float] = SCALE

    @property
    def draws(self) -> int:
        """Number of random numbers that the crops of an image need."""
        return self.count * DRAWS

    def boxes(self, uniforms: Sequence[float], height: int, width: int) -> list[Box]:
        """Returns the boxes to cut.

        Args:
          uniforms: `draws` numbers in [0, 1).
          height: height of the image in pixels.
          width: width of the image in pixels.
        """
        return [
            random_box(uniforms[first : first + DRAWS], height, width, self.scale)
            for first in range(0, self.draws, DRAWS)
        ]


TWO_VIEWS = RandomCrops()  # query and key


def reduced_box(box: Box, reduction: int, height: int, width: int) -> Box:
    """Returns a box in the pixels of a reduced image, rounded to whole ones.

    Args:
      box: box in pixels of the whole image.
      reduction: how many pixels of the whole image, along each side, make one of the reduced image.
      height: height of the reduced image.
      width: width of the reduced image.
    """
    box_height, box_width = (
        min(max(1, round(side / reduction)), whole) for side, whole in zip(box[2:], (height, width), strict=True)
    )
    return (
        min(box[0] // reduction, height - box_height),
        min(box[1] // reduction, width - box_width),
        box_height,
        box_width,
    )


def cut(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Cuts a box out and resizes it to a square.

    Args:
      image: uint8 `(H, W, 3)`.
      box: box within the image.
      size: size of the square in pixels.

    Returns:
      uint8 `(size, size, 3)`.
    """
    top, left, height, width = box
    return resize(image[top : top + height, left : left + width], size, size)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image close to PIL's `resize(..., BILINEAR)`, which averages over a triangle when it shrinks.

    Args:
      image: uint8 `(H, W, 3)`.
      height: height of the result in pixels.
      width: width of the result in pixels.

    Returns:
      uint8 `(height, width, 3)`.
    """
    shrinks = image.shape[0] / height, image.shape[1] / width
    if shrinks == (1, 1):
        return image
    # PIL averages over a triangle as wide as two pixels of the result: s^2 / 6 of variance in pixels of the source, if
    # s of them become one. Both ways below come close with fast OpenCV functions; three taps add the missing variance.
    largest = max(shrinks)
    if largest <= _LINEAR_UP_TO:
        # Interpolation has a variance of 1/6 on average over positions; the taps supply (s^2 - 1) / 6 before it.
        image = _three_taps(image, [max(0.0, shrink * shrink - 1) / 12 for shrink in shrinks])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # Interpolation to a multiple of the result, then means of two by two, which OpenCV is fast at: (1 - 1 / k^2) / 12
    # of the result's pixels. The taps after them supply the rest of 1/6.
    multiple = next(k for k in (2, 4, 8, 16, 32) if largest <= k * _LINEAR_BY or k == 32)
    image = cv2.resize(image, (multiple * width, multiple * height), interpolation=cv2.INTER_LINEAR)
    while image.shape[0] > height:
        image = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)
    lacks = [1 - 1 / (shrink * shrink) - (1 - 1 / multiple**2) / 2 for shrink in shrinks]
    return _three_taps(image, [max(0.0, each) / 12 for each in lacks])


def _three_taps(image: np.ndarray, sides: Sequence[float]) -> np.ndarray:
    """Averages each pixel with its neighbors, weighted by `sides` down and across; repeats the border outward."""
    if not any(sides):
        return image
    down, across = (np.array([side, 1 - 2 * side, side], np.float32) for side in sides)
    # Isolated: a crop's neighbors in the image it is cut from are not its own.
    return cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE | cv2.BORDER_ISOLATED)


def central_view(image: np.ndarray, size: int) -> np.ndarray:
    """Makes the evaluation view: resizes the shorter side to 256/224 of `size` and cuts out the central square.

    This follows torchvision's `Resize` and `CenterCrop`, with ImageNet's 256 and 224 scaled to `size`. An image that
    already has this size stays unchanged: small images, such as CIFAR's, are evaluated whole.

    Args:
      image: uint8 `(H, W, 3)`.
      size: size of the square in pixels.

    Returns:
      uint8 `(size, size, 3)`.
    """
    if image.shape[:2] == (size, size):
        return image
    # For a very long image use only the middle: the whole, resized, might not fit in memory.
    high, wide = image.shape[:2]
    long = _LONGEST * min(high, wide)
    top, left = max(0, high - long) // 2, max(0, wide - long) // 2
    image = image[top : top + long, left : left + long]
    height, width = central_size(image.shape[0], image.shape[1], size)
    whole = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return whole[top : top + size, left : left + size]


def central_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns the height and width to which `central_view` resizes an image before it cuts the square out."""
    short = round(size * 256 / 224)
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
