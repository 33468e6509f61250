"""From a source to batches, with Grain: the same batches wherever and whenever they are read.

Batch i depends on the seed and on i alone: an epoch is a fresh permutation, its remainder dropped, and a restart needs
no more than the number of the next step. A host takes its piece of every global batch, so that the number of
hosts changes nothing either; nor does the number of threads.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator

import grain
import numpy as np

from ifm_jax.data.sources import Source, ViewSource
from ifm_jax.errors import UsageError

_ENDLESS = 2**62  # batches


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Returns how many whole batches `size` images make.

    Raises:
      UsageError: if they do not make one.
    """
    if size < batch_size:
        raise UsageError(f"batch_size={batch_size} is more than the {size} training images: take a smaller one")
    return size // batch_size


def training_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    size: int = 0,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of an endless training run, or this host's part of them.

    Args:
      source: of images, or of views cut on the host (`ViewSource`).
      batch_size: global.
      seed: of the order, and of the views cut on the host.
      start: the number of the first batch; a run resumed after step s starts at s.
      size: the first so many examples of the source only; 0: all.
      host: which host this is. It gets the rows `host * batch_size / hosts` and on of the global batch.
      hosts: how many there are; a divisor of `batch_size`.
      threads: that look up images, or cut views; 0: two of the former, one for each processor of the latter.

    Yields:
      `{"query": uint8 (batch_size / hosts, H, W, 3)}`: the images of which both views are made. From a `ViewSource`
      also `"key"`, likewise: two crops of each image, cut independently.

    Raises:
      RunError: if an image cannot be read.
    """
    size = min(size, len(source)) if size else len(source)
    local = batch_size // hosts
    whole = steps_per_epoch(size, batch_size) * batch_size
    cuts = isinstance(source, ViewSource)

    # The order decides what depends on what. Shuffled and repeated first, the place of an example in the endless stream
    # says which image it is; its random number comes after that, so that it depends on the place too, and before the
    # hosts take their pieces, so that they do not count.
    examples = grain.MapDataset.range(size).seed(seed).shuffle()[:whole].repeat()
    if cuts:
        examples = examples.random_map(lambda index, rng: (index, int(rng.integers(2**63))))

    def piece(number: int) -> list:
        # A host's part is a contiguous piece, as the placement over the devices has it.
        first = number * batch_size + host * local
        return [examples[place] for place in range(first, first + local)]

    if cuts:
        # All threads work on one batch, two of which are under way: as fast as a batch a thread, in less memory.
        load, readers, ahead = _cutter(source, threads or _processors()), 2, 3
    else:
        readers = threads or 2
        load, ahead = lambda indices: {"query": source.batch(np.asarray(indices))["image"]}, 2 * readers
    batches = grain.MapDataset.range(start, _ENDLESS).map(piece).map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=readers, prefetch_buffer_size=ahead)))


def _cutter(source: ViewSource, threads: int) -> Callable[[list[tuple[int, int]]], dict[str, np.ndarray]]:
    """Returns the function that cuts the views of a batch, an image a task, given image and random number of each."""
    pool = concurrent.futures.ThreadPoolExecutor(threads, "views")  # its threads end with the last reference to it

    def cut(examples: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        query, key = zip(*pool.map(source.views, *zip(*examples, strict=True)), strict=True)
        return {"query": np.stack(query), "key": np.stack(key)}

    return cut


def _processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
