"""Random draws on the host, from the seed and the position alone: the order of the images and their crops."""

import numpy as np

ORDER, CROPS = 0, 1  # uses of random numbers, the first part of `where`


def random_numbers(seed: int, *where: int) -> np.random.Generator:
    """Returns a generator that depends only on `seed` and `where`, the numbers that identify the draw."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *where))))


class EpochOrder:
    """The order of the images: a fresh permutation in every epoch, independent of the epochs before.

    Args:
      size: number of images.
      seed: seed of the run.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._known: tuple[int, np.ndarray] | None = None  # an epoch and its permutation

    def __call__(self, epoch: int) -> np.ndarray:
        """Returns the order of the images in an epoch, int64 `(size,)`."""
        known = self._known
        if known is None or known[0] != epoch:
            self._known = known = epoch, random_numbers(self._seed, ORDER, epoch).permutation(self._size)
        return known[1]


def crop_uniforms(seed: int, number: int, batch_size: int, draws: int) -> np.ndarray:
    """Returns the random numbers that place the crops of a global batch.

    Args:
      seed: seed of the run.
      number: number of the batch.
      batch_size: number of images in a global batch.
      draws: random numbers for the crops of an image.

    Returns:
      `(batch_size, draws)` in [0, 1).
    """
    return random_numbers(seed, CROPS, number).random((batch_size, draws))
