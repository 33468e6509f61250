"""Turns a source into batches with Grain: the same batches wherever and whenever they are read.

Batch i depends on the seed and i alone: each epoch is a fresh permutation without its remainder, and a restart needs
only the number of the next step. Each host reads its piece of every global batch, so the number of hosts does not
change the batches; neither does the number of reading threads or processes.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from ifm_jax.data.bad_images import BadImages, neighbors
from ifm_jax.data.order import EpochOrder, crop_uniforms
from ifm_jax.data.protocols import Images, ViewSource
from ifm_jax.errors import UsageError

_ENDLESS = 2**62  # batches
_BAD = "bad"  # a batch's entry for unreadable images, removed before it is handed on


def steps_per_epoch(size: int, batch_size: int, *, remainder: bool = False) -> int:
    """Returns how many batches `size` images make.

    Args:
      size: number of images.
      batch_size: number of images in a global batch.
      remainder: count a last, smaller batch too.

    Raises:
      UsageError: if there are too few images for one batch.
    """
    if remainder and size:
        return -(-size // batch_size)
    if size < batch_size:
        images = f"{size} training image{'s' if size != 1 else ''}"
        smaller = 2 ** (size.bit_length() - 1) if size else 0
        remedy = f"use a smaller one, such as {smaller}" if smaller > 1 else "expected more images"
        raise UsageError(f"batch_size={batch_size} is more than the {images}: {remedy}")
    return size // batch_size


def training_batches(
    source: Images,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    size: int = 0,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
    processes: int = 0,
    bad_images: BadImages | None = None,
    indices: bool = False,
    remainder: bool = False,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields the batches of an endless training run, or this host's part of them.

    Args:
      source: source of images, or of views cut on the host (`ViewSource`).
      batch_size: number of images in a global batch.
      seed: seed of the order, and of the views cut on the host.
      start: number of the first batch; a run resumed after step s starts at s.
      size: use only the first `size` examples of the source; 0: all.
      host: number of this host. It gets the rows of the global batch from `host * batch_size / hosts` on.
      hosts: number of hosts; a divisor of `batch_size`.
      threads: threads in each process that look up images or cut views; 0: two to look up, or one for each processor to
        cut.
      processes: worker processes that do so; 0: this process does it.
      bad_images: records unreadable images, each of which a neighbor then replaces; None: the first ends the iteration.
        Images that are not cut on the host are always readable.
      indices: also yield the numbers of the images.
      remainder: end an epoch with its remaining images, filled up with copies; else drop them.

    Yields:
      `{"views": uint8 (batch_size / hosts, V, H, W, 3)}`: the V crops of each image that a `ViewSource` cuts, two for
      pre-training and one for a linear probe; for other sources the image itself, V = 1. With `indices` also `"index"`,
      int64 `(batch_size / hosts,)`; with `remainder` also `"weight"`, float32 `(batch_size / hosts,)`, 0 for a copy,
      else 1.

    Raises:
      RunError: if an image, or too many of them, cannot be read.
    """
    size = min(size, len(source)) if size else len(source)
    steps = steps_per_epoch(size, batch_size, remainder=remainder)

    cuts = isinstance(source, ViewSource)
    threads = threads or (max(1, _processors() // max(1, processes)) if cuts else 2)
    if cuts:
        # All threads share a batch, with two batches in progress: as fast as one batch per thread, in less memory.
        load, readers, ahead = _Cutter(source, size, batch_size, seed, threads, bad_images is not None, indices), 2, 3
    else:
        load, readers, ahead = _LookUp(source, indices), threads, 2 * threads

    piece = _Piece(EpochOrder(size, seed), steps, batch_size, host, hosts, remainder)
    batches = grain.MapDataset.range(start, _ENDLESS).map(piece).map(load)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=readers, prefetch_buffer_size=ahead))
    if processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own flags there, even where no script has parsed any
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2))
    return _checked(iter(batches), source, bad_images)


def _checked(
    batches: Iterator[dict[str, Any]], source: Images, bad_images: BadImages | None
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields batches without their entry for unreadable images, which it records."""
    for batch in batches:
        for index, reason in batch.pop(_BAD, ()):
            assert bad_images is not None  # else no batch lists any
            assert isinstance(source, ViewSource)  # only its batches list any
            bad_images.add(source.name(index), reason)
        yield batch


# Classes, not closures: they are pickled for worker processes.


@dataclasses.dataclass
class _Part:
    """This host's part of a batch.

    Attributes:
      number: number of the batch.
      first: position of the first example in the global batch.
      images: numbers of the images, int64 `(N,)`.
      weights: weights of the images, float32 `(N,)`; None: all count alike.
    """

    number: int
    first: int
    images: np.ndarray
    weights: np.ndarray | None = None

    def finished(self, views: dict[str, Any], indices: bool) -> dict[str, Any]:
        """Returns the batch: the views and the other requested fields."""
        batch = dict(views)
        if indices:
            batch["index"] = self.images
        if self.weights is not None:
            batch["weight"] = self.weights
        return batch


class _Piece:
    """Maps the number of a batch to this host's part of it."""

    def __init__(self, order: EpochOrder, steps: int, batch_size: int, host: int, hosts: int, remainder: bool):
        self._order, self._steps, self._batch_size, self._remainder = order, steps, batch_size, remainder
        self._first, self._local = host * (batch_size // hosts), batch_size // hosts

    def __call__(self, number: int) -> _Part:
        epoch, within = divmod(number, self._steps)
        order = self._order(epoch)
        # A contiguous piece, in line with the placement over the devices.
        places, begin = np.arange(self._first, self._first + self._local), within * self._batch_size
        weights = None
        if self._remainder:
            count = min(self._batch_size, len(order) - begin)
            weights = (places < count).astype(np.float32)
            places = np.minimum(places, count - 1)
        return _Part(number, self._first, order[begin + places], weights)


class _LookUp:
    """Maps image numbers to a batch of these images."""

    def __init__(self, source: Images, indices: bool):
        self._source, self._indices = source, indices

    def __call__(self, part: _Part) -> dict[str, np.ndarray]:
        return part.finished({"views": self._source.examples(part.images)["image"][:, None]}, self._indices)


class _Cutter:
    """Maps image numbers to a batch of their views; threads share the work."""

    def __init__(
        self, source: ViewSource, size: int, batch_size: int, seed: int, threads: int, replace: bool, indices: bool
    ):
        self._source, self._size, self._batch_size, self._seed = source, size, batch_size, seed
        self._threads, self._replace, self._indices = threads, replace, indices
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}

    def __call__(self, part: _Part) -> dict[str, Any]:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "views")  # ends with its last reference
        count, side, crops = len(part.images), self._source.image_size, self._source.random_crops
        # Drawn for the whole global batch, so that the number of hosts does not matter.
        uniforms = crop_uniforms(self._seed, part.number, self._batch_size, crops.draws)
        uniforms = uniforms[part.first : part.first + count].tolist()
        views = np.empty((count, crops.count, side, side, self._source.channels), np.uint8)
        images = part.images.copy()
        bad: list[tuple[int, str]] = []

        def cut(places: range) -> None:
            for place in places:
                images[place], of_image = self._views(int(images[place]), uniforms[place], bad)
                for number, view in enumerate(of_image):
                    views[place, number] = view

        # Each thread works through its share in a few runs: single images would cost up to a tenth more.
        run = max(1, count // (4 * self._threads))
        for _ in self._pool.map(cut, [range(count)[first : first + run] for first in range(0, count, run)]):
            pass
        part.images = images
        return part.finished({"views": views, _BAD: sorted(bad)}, self._indices)

    def _views(
        self, index: int, uniforms: list[float], bad: list[tuple[int, str]]
    ) -> tuple[int, tuple[np.ndarray, ...]]:
        """Returns the image used and its views; adds the unreadable ones before it, with the reasons, to `bad`."""
        from ifm_jax.data.images import UnreadableImageError

        errors: list[UnreadableImageError] = []
        for taken in (index, *(neighbors(index, self._size) if self._replace else ())):
            try:
                return taken, self._source.views(taken, uniforms)
            except UnreadableImageError as unreadable:
                bad.append((taken, unreadable.reason))
                errors.append(unreadable)
        raise errors[0]


def _processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
