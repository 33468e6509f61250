"""From a source to batches, with Grain: the same batches wherever and whenever they are read.

Batch i depends on the seed and on i alone: an epoch is a fresh permutation, its remainder dropped, and a restart needs
no more than the number of the next step. A host takes its piece of every global batch, so that the number of
hosts changes nothing either.
"""

from collections.abc import Iterator

import grain
import numpy as np

from ifm_jax.data.sources import Source
from ifm_jax.errors import UsageError


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
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of an endless training run, or this host's part of them.

    Args:
      source: of images.
      batch_size: global.
      seed: of the order.
      start: the number of the first batch; a run resumed after step s starts at s.
      size: the first so many examples of the source only; 0: all.
      host: which host this is. It gets the rows `host * batch_size / hosts` and on of the global batch.
      hosts: how many there are; a divisor of `batch_size`.
      threads: that read ahead.

    Yields:
      `{"query": uint8 (batch_size / hosts, H, W, 3)}`: the images of which both views are made.
    """
    size = min(size, len(source)) if size else len(source)
    local = batch_size // hosts
    whole = steps_per_epoch(size, batch_size) * batch_size
    indices = grain.MapDataset.range(size).seed(seed).shuffle()[:whole].repeat().batch(batch_size)
    # A host's part is a contiguous piece, as the placement over the devices has it.
    batches = indices.map(lambda batch: {"query": source.batch(batch[host * local : (host + 1) * local])["image"]})
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches[start:].to_iter_dataset(options))
