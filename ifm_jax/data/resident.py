"""Whole data sets held on the devices: the images are read once, then a batch is no more than its numbers.

The batches are those of `training_batches`: the same images in the same order. Of images that it crops on the host the
same boxes are cut, on the device (`ifm_jax.resident`), from a copy of `data.cache_size` pixels.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from ifm_jax.data import crops
from ifm_jax.data.bad_images import BadImages, neighbours
from ifm_jax.data.order import EpochOrder, crop_uniforms
from ifm_jax.data.pipeline import steps_per_epoch
from ifm_jax.data.sources import Source, ViewSource

_RUN = 256  # images of a task


@dataclasses.dataclass(frozen=True)
class Copies:
    """What the images are that are held on the devices.

    Attributes:
      count: of them.
      side: of each in pixels.
      sizes: int32 `(count, 2)`, height and width of the images they are copies of; None: no crops are cut.
      random_crops: what is cut of them; None: nothing.
    """

    count: int
    side: int
    sizes: np.ndarray | None = None
    random_crops: crops.RandomCrops | None = None


def copies_side(source: Source, image_size: int, cache_size: int = 0) -> int:
    """Returns the side of the squares that the images of a source are kept as, in pixels.

    Args:
      source: of the images.
      image_size: of a view.
      cache_size: what the user asks for; 0: 256/224 of a view's, as in evaluation, but not more than the first image's.

    Raises:
      RunError: if the first images cannot be read.
    """
    if not isinstance(source, ViewSource):
        return image_size
    return cache_size or min(round(image_size * 256 / 224), max(_whole(source, 0, len(source), 0, [])[1]))


def read_all(
    source: Source, size: int, side: int, *, threads: int = 0, bad_images: BadImages | None = None
) -> tuple[np.ndarray, Copies]:
    """Reads the images of a source.

    Args:
      source: of images, or of views.
      size: the first so many.
      side: see `copies_side`.
      threads: that read; 0: automatic.
      bad_images: takes note of unreadable images, each of which is then replaced by a neighbour; None: the first ends
        the reading.

    Returns:
      Pixels, uint8 `(size, side, side, 3)`, and what they are of.

    Raises:
      RunError: if an image cannot be read, or too many.
    """
    if not isinstance(source, ViewSource):
        return source.batch(np.arange(size))["image"], Copies(size, side)
    pixels, sizes = np.empty((size, side, side, 3), np.uint8), np.empty((size, 2), np.int32)

    def fill(places: range) -> list[tuple[int, str]]:
        bad = []
        for place in places:
            pixels[place], sizes[place] = _whole(source, place, size, side, bad if bad_images is not None else None)
        return bad

    with concurrent.futures.ThreadPoolExecutor(threads or None, "images") as pool:
        runs = [range(first, min(first + _RUN, size)) for first in range(0, size, _RUN)]
        for bad in pool.map(fill, runs):
            for index, reason in bad:
                bad_images.add(source.name(index), reason)
    return pixels, Copies(size, side, sizes, source.random_crops)


def _whole(source: ViewSource, index: int, size: int, side: int, bad: list | None):
    """Returns an image, or its nearest readable neighbour; adds the unreadable ones met before."""
    from ifm_jax.data.images import UnreadableImageError

    error = None
    for taken in (index, *(neighbours(index, size) if bad is not None else ())):
        try:
            return source.whole(taken, side)
        except UnreadableImageError as unreadable:
            error = error or unreadable
            if bad is not None:
                bad.append((taken, unreadable.reason))
    raise error


def resident_batches(
    copies: Copies, batch_size: int, counts: Iterable[int], most: int, *, seed: int, start: int = 0
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yields which images the batches of the next calls are, several batches at a time.

    Args:
      copies: the images.
      batch_size: global.
      counts: batches of each call, 1 to `most`.
      most: the arrays have room for so many, whatever the call's number.
      seed: of the order, and of the crops.
      start: the number of the first batch.

    Yields:
      The arrays of a call, and how many of its batches are filled: `index` int32 `(most, batch_size)`; where crops are
      cut also `boxes`, float32 `(most, batch_size, crops, 4)`: top, left, height and width in pixels of the copy;
      `steps` int32 `()`, the filled ones.
    """
    order, epoch_steps = EpochOrder(copies.count, seed), steps_per_epoch(copies.count, batch_size)
    number = start
    for count in counts:
        call = {"index": np.zeros((most, batch_size), np.int32), "steps": np.asarray(count, np.int32)}
        if copies.random_crops is not None:
            call["boxes"] = np.ones((most, batch_size, copies.random_crops.count, 4), np.float32)
        for row in range(count):
            epoch, within = divmod(number, epoch_steps)
            index = order(epoch)[within * batch_size : (within + 1) * batch_size]
            call["index"][row] = index
            if copies.random_crops is not None:
                call["boxes"][row] = _boxes(copies, index, seed, number)
            number += 1
        yield call, count


def _boxes(copies: Copies, index: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Returns where the crops of a batch lie in the copies, `(N, crops, 4)`."""
    random_crops, (heights, widths) = copies.random_crops, copies.sizes[index].T
    uniforms = crop_uniforms(seed, number, len(index), random_crops.draws).reshape(len(index), -1, crops.DRAWS)
    boxes = [
        crops.random_boxes(uniforms[:, view], heights, widths, random_crops.scale) for view in range(random_crops.count)
    ]
    to_copy = copies.side / np.stack([heights, widths, heights, widths], axis=1)
    return np.stack(boxes, axis=1) * to_copy[:, None]
