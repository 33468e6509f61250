"""Images in memory as a backbone expects them: the evaluation view, normalized."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from ifm_jax.data import crops
from ifm_jax.errors import UsageError


def preprocess(images: ArrayLike | Sequence[ArrayLike], size: int = 224) -> np.ndarray:
    """Returns images as evaluation makes them: resized, cut to a square, normalized.

    1. The shorter side is resized to 256/224 of `size` (rounded; 256 for 224), bilinear with averaging where it
       shrinks, as close to PIL's as `data.crops.resize` is.
    2. The central square of `size` is cut out. An image of exactly `size` x `size` skips both.
    3. ImageNet's mean (0.485, 0.456, 0.406) is subtracted, and the result divided by its standard deviation (0.229,
       0.224, 0.225), both for values in [0, 1].

    Args:
      images: `(N, H, W, 3)`, or a sequence of `(H, W, 3)` of any sizes, such as PIL images or arrays; RGB, uint8, or
        floats in [0, 1].
      size: side of the result in pixels: the `data.image_size` of the run whose backbone gets them.

    Returns:
      float32 `(N, size, size, 3)`. For uint8 images of sources that are decoded whole it is what evaluation computes,
      up to the rounding of float32. Floats are not rounded to bytes on the way.

    Raises:
      UsageError: if an image has another shape, dtype or range.
    """
    if size < 1:
        raise UsageError(f"size={size}: expected a number of pixels of at least 1")
    prepared = [crops.central_view(_checked(image, number), size) for number, image in enumerate(_each(images))]
    views = np.empty((len(prepared), size, size, 3), np.float32)
    for view, image in zip(views, prepared, strict=True):
        view[:] = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else np.clip(image, 0, 1)
    return (views - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)


def _each(images: ArrayLike | Sequence[ArrayLike]) -> list[ArrayLike]:
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) != 4:
        raise UsageError(
            f"images of shape {tuple(shape)}: expected (N, H, W, 3), or a list of (H, W, 3); images[None] makes a "
            "single image a batch"
        )
    return list(images)  # pyrefly: ignore[bad-argument-type] (a number would not get here from anyone)


def _checked(image: ArrayLike, number: int) -> np.ndarray:
    """Returns an image as uint8 or float32."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise UsageError(
            f"image {number} has shape {image.shape}: expected (H, W, 3); gray images as np.stack([image] * 3, -1), "
            "PIL images as image.convert('RGB')"
        )
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating) and image.dtype.name != "bfloat16":
        raise UsageError(f"image {number} has dtype {image.dtype}: expected uint8, or floats in [0, 1]")
    image = image.astype(np.float32)
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(
            f"image {number} has values from {low:g} to {high:g}: expected floats in [0, 1], not normalized yet, or "
            "uint8"
        )
    return image
