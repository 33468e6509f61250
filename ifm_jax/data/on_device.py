"""Whole data sets held on the devices: the images are read once, and a batch is then just a list of image numbers.

Python then has nothing to do between two steps, so one compiled call runs many steps (`OnDeviceStep`).

The batches equal those of `training_batches`: the same images in the same order. Where that crops on the host,
`OnDeviceStep` cuts the same boxes on the device, from a copy of `data.cache_size` pixels.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import sharding
from ifm_jax.augment import resized_crops
from ifm_jax.data import crops
from ifm_jax.data.bad_images import BadImages, neighbors
from ifm_jax.data.order import EpochOrder, crop_uniforms
from ifm_jax.data.pipeline import steps_per_epoch
from ifm_jax.data.protocols import Source, ViewSource
from ifm_jax.errors import UsageError
from ifm_jax.pretrain import DeviceState, PretrainStep, placements

_RUN = 256  # images per task
_SHARE = 0.8  # of a device's memory that images may fill


@dataclasses.dataclass(frozen=True)
class Copies:
    """Describes the images held on the devices.

    Attributes:
      count: number of images.
      side: side of each image in pixels.
      sizes: height and width of the original images, int32 `(count, 2)`; None: no crops are cut.
      random_crops: crops to cut from them; None: none.
    """

    count: int
    side: int
    sizes: np.ndarray | None = None
    random_crops: crops.RandomCrops | None = None


def copies_side(source: Source, image_size: int, cache_size: int = 0) -> int:
    """Returns the side, in pixels, of the squares in which a source's images are kept.

    Args:
      source: source of the images.
      image_size: side of a view in pixels.
      cache_size: side that the user requests; 0: 256/224 of a view's, as in evaluation, up to the first image's.

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
      source: source of images, or of views.
      size: how many images to read, from the first on.
      side: see `copies_side`.
      threads: number of reading threads; 0: automatic.
      bad_images: records unreadable images, each of which a neighbor then replaces; None: the first ends the reading.

    Returns:
      Pixels, uint8 `(size, side, side, C)`, and their description.

    Raises:
      RunError: if an image, or too many of them, cannot be read.
    """
    if not isinstance(source, ViewSource):
        return source.examples(np.arange(size))["image"], Copies(size, side)
    pixels, sizes = np.empty((size, side, side, source.channels), np.uint8), np.empty((size, 2), np.int32)

    def fill(places: range) -> list[tuple[int, str]]:
        bad: list[tuple[int, str]] = []
        for place in places:
            pixels[place], sizes[place] = _whole(source, place, size, side, bad if bad_images is not None else None)
        return bad

    with concurrent.futures.ThreadPoolExecutor(threads or None, "images") as pool:
        runs = [range(first, min(first + _RUN, size)) for first in range(0, size, _RUN)]
        for bad in pool.map(fill, runs):
            for index, reason in bad:
                assert bad_images is not None  # without it, the first unreadable image has ended the reading
                bad_images.add(source.name(index), reason)
    return pixels, Copies(size, side, sizes, source.random_crops)


def _whole(
    source: ViewSource, index: int, size: int, side: int, bad: list[tuple[int, str]] | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns an image, or its nearest readable neighbor; adds the unreadable ones before it to `bad`."""
    from ifm_jax.data.images import UnreadableImageError

    errors: list[UnreadableImageError] = []
    for taken in (index, *(neighbors(index, size) if bad is not None else ())):
        try:
            return source.whole(taken, side)
        except UnreadableImageError as unreadable:
            errors.append(unreadable)
            if bad is not None:
                bad.append((taken, unreadable.reason))
    raise errors[0]


def on_device_batches(
    copies: Copies, batch_size: int, counts: Iterable[int], most: int, *, seed: int, start: int = 0
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yields the image numbers for the batches of the next calls, several batches at a time.

    Args:
      copies: images on the devices.
      batch_size: number of images in a global batch.
      counts: number of batches in each call, 1 to `most`.
      most: number of batches that the arrays have room for in every call.
      seed: seed of the order, and of the crops.
      start: number of the first batch.

    Yields:
      The arrays of a call, and the number of its filled batches. The arrays are `index`, int32 `(most, batch_size)`;
      where crops are cut also `boxes`, float32 `(most, batch_size, crops, 4)`: top, left, height and width in pixels of
      the copy; `steps` int32 `()`, the number of filled batches.
    """
    order, epoch_steps = EpochOrder(copies.count, seed), steps_per_epoch(copies.count, batch_size)
    number = start
    for count in counts:
        call: dict[str, np.ndarray] = {
            "index": np.zeros((most, batch_size), np.int32),
            "steps": np.asarray(count, np.int32),
        }
        if copies.random_crops is not None:
            call["boxes"] = np.ones((most, batch_size, copies.random_crops.count, 4), np.float32)
        for row in range(count):
            epoch, within = divmod(number, epoch_steps)
            index = order(epoch)[within * batch_size : (within + 1) * batch_size]
            call["index"][row] = index
            if copies.random_crops is not None:
                call["boxes"][row] = _boxes(copies, copies.random_crops, index, seed, number)
            number += 1
        yield call, count


def _boxes(copies: Copies, random_crops: crops.RandomCrops, index: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Returns the boxes of a batch's crops in the copies, `(N, crops, 4)`."""
    assert copies.sizes is not None  # crops exist, so their originals have sizes
    heights, widths = copies.sizes[index].T
    uniforms = crop_uniforms(seed, number, len(index), random_crops.draws).reshape(len(index), -1, crops.DRAWS)
    boxes = [
        crops.random_boxes(uniforms[:, view], heights, widths, random_crops.scale) for view in range(random_crops.count)
    ]
    to_copy = copies.side / np.stack([heights, widths, heights, widths], axis=1)
    return np.stack(boxes, axis=1) * to_copy[:, None]


_Carried = tuple[DeviceState[Any], dict[str, jax.Array]]  # a state, and metrics


@dataclasses.dataclass(frozen=True, eq=False)
class OnDeviceStep:
    """`(state, images, call, rng, learning_rates) -> (state, metrics)`: several pre-training steps.

    Attributes:
      step: a single step.
      image_size: side of a view in pixels, where crops are cut.
      most: greatest number of steps in a call.
    """

    step: PretrainStep
    image_size: int
    most: int = 1

    def __call__(
        self,
        state: DeviceState[Any],
        images: jax.Array,
        call: dict[str, jax.Array],
        rng: jax.Array,
        learning_rates: jax.Array | None = None,
    ) -> _Carried:
        """Trains on several batches.

        Args:
          state: state before the first step.
          images: all images, uint8 `(images, S, S, C)`.
          call: arrays from `on_device_batches`.
          rng: see `PretrainStep`.
          learning_rates: see `PretrainStep`.

        Returns:
          The state after the last step; the metrics of all steps, each `(most,)`, padded with 0 where the call has
          fewer steps.
        """
        rows = {name: call[name] for name in ("index", "boxes") if name in call}

        def one(state: DeviceState[Any], number: jax.Array | int) -> _Carried:
            batch = self.batch(images, {name: row[number] for name, row in rows.items()})
            return self.step(state, batch, rng, learning_rates)

        if self.most == 1:
            state, metrics = one(state, 0)
            return state, {name: value[None] for name, value in metrics.items()}

        def body(number: jax.Array, carried: _Carried) -> _Carried:
            state, metrics = carried
            state, of_step = one(state, number)
            return state, {name: metrics[name].at[number].set(value) for name, value in of_step.items()}

        shapes = jax.eval_shape(one, state, 0)[1]
        metrics = {name: jnp.zeros(self.most, value.dtype) for name, value in shapes.items()}
        # Only the requested steps, not all there is room for: a call also ends where a checkpoint is due.
        return jax.lax.fori_loop(0, call["steps"], body, (state, metrics))

    def batch(self, images: jax.Array, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the batch of one step; part of the compiled program.

        Args:
          images: all images, uint8 `(images, S, S, C)`.
          row: `index` int32 `(N,)`; where crops are cut `boxes`, float32 `(N, 2, 4)`.
        """
        split = functools.partial(sharding.split_rows, mesh=self.step.method.mesh)
        chosen = split(images.at[split(row["index"])].get(mode="promise_in_bounds"))
        if "boxes" not in row:
            return {"views": chosen[:, None]}
        boxes = split(row["boxes"])
        return {"views": jnp.stack([resized_crops(chosen, boxes[:, i], self.image_size) for i in range(2)], axis=1)}

    def jit(self) -> jax.stages.Wrapped:
        """Returns the compiled step; the new state reuses the old state's memory."""
        method, mesh = self.step.method, self.step.method.mesh
        if mesh is None:
            return jax.jit(self.__call__, donate_argnums=0)
        whole, state = sharding.replicated(mesh), placements(mesh, method)
        return jax.jit(
            self.__call__,
            donate_argnums=0,
            in_shardings=(state, whole, whole, whole, whole),
            out_shardings=(state, whole),
        )


def check_memory(images: int, side: int, has: int | None, channels: int = 3) -> None:
    """Checks that images fit on each of the devices.

    Args:
      images: number of images.
      side: side of each image in pixels.
      has: bytes of memory of a device; None: unknown, and nothing is checked.
      channels: channels of an image.

    Raises:
      UsageError: if they fill more than 80 % of its memory.
    """
    needed = images * side * side * channels
    if has is not None and needed > _SHARE * has:
        raise UsageError(
            f"data.cache='device' needs {needed / 1e9:.1f} GB of each device's {has / 1e9:.1f} GB, for {images:,} "
            f"images of {side} px: expected at most {_SHARE:.0%}; use a smaller data.cache_size, or data.cache=''"
        )
