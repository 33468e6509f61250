"""The nearest images of some images: what an encoder takes to be alike, without labels."""

from typing import NamedTuple

import numpy as np

from ifm_jax.errors import RunError

QUERIES, NEIGHBORS = 8, 8  # in a picture


class Nearest(NamedTuple):
    """The most similar examples of a bank, the best first.

    Attributes:
      index: int `(Q, k)`, indices in the bank.
      similarity: `(Q, k)`, cosine similarities.
    """

    index: np.ndarray
    similarity: np.ndarray


def spread(size: int, count: int = QUERIES) -> np.ndarray:
    """Returns `count` numbers below `size`, evenly spaced (all of them if there are no more).

    A source sorted by class so gives images of several classes; the same source always gives the same ones.
    """
    count = min(count, size)
    return ((np.arange(count) + 0.5) * size / count).astype(int)


def nearest(queries: np.ndarray, bank: np.ndarray, k: int = NEIGHBORS) -> Nearest:
    """Finds the most similar examples of the bank for each query; of equally similar ones the earlier comes first.

    For a few queries; `knn.classify` serves many.

    Args:
      queries: features `(Q, D)`, not normalized.
      bank: features `(M, D)`, not normalized.
      k: number of neighbors; M if the bank holds fewer.

    Raises:
      RunError: if features are not finite.
    """
    similarity = _unit(queries) @ bank.T / np.maximum(np.linalg.norm(bank, axis=1), 1e-30)
    if not np.isfinite(similarity).all():
        raise RunError("features are not finite: expected finite features from the backbone; has the run diverged?")
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return Nearest(index, np.take_along_axis(similarity, index, axis=1))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
