"""Statistics of embeddings: alignment, uniformity, effective rank, and the similarities of pairs.

None of these needs labels; they reveal a collapse (rank and uniformity) and the distance between positives and
negatives. Pairs are processed in blocks, so that N examples need no (N, N) matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax.errors import RunError, UsageError


def diagnose(first: np.ndarray, second: np.ndarray, *, bins: int = 100, chunk: int = 1024) -> dict[str, Any]:
    """Returns all diagnostics of the embeddings of two views of the same images.

    Args:
      first: `(N, D)`, N > 1; need not be normalized.
      second: `(N, D)`; row i is a positive of row i of `first`.
      bins: number of bins in the histograms.
      chunk: number of rows in a block of pairs.

    Returns:
      Floats `alignment`, `uniformity` (the mean of the two views'), `effective_rank` (of the first view, not
      normalized), and the results of `similarity_histograms`.

    Raises:
      UsageError: if shapes do not fit together or there are fewer than two rows.
      RunError: if embeddings are not finite.
    """
    return {
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first, chunk=chunk) + uniformity(second, chunk=chunk)) / 2,
        "effective_rank": effective_rank(first),
        **similarity_histograms(first, second, bins=bins, chunk=chunk),
    }


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean squared distance of positives, E |x - y|^2, in [0, 4]: 0 if all pairs are equal.

    See Wang and Isola 2020, with alpha = 2. The embeddings are L2-normalized first.

    Args:
      first: `(N, D)`.
      second: `(N, D)`, row i the positive of row i.

    Raises:
      UsageError: if shapes do not fit together.
      RunError: if embeddings are not finite.
    """
    _check_pair(first, second)
    return float(np.mean(np.sum((_normalized(first) - _normalized(second)) ** 2, axis=1)))


def uniformity(embeddings: np.ndarray, t: float = 2.0, *, chunk: int = 1024) -> float:
    """Returns log E exp(-t |x - y|^2) over all distinct pairs, in [-4 t, 0]: 0 if all are the same, lower if spread.

    See Wang and Isola 2020. The embeddings are L2-normalized first.

    Args:
      embeddings: `(N, D)`, N > 1.
      t: parameter of the Gaussian potential.
      chunk: number of rows in a block of pairs.

    Raises:
      UsageError: if there are fewer than two rows.
      RunError: if embeddings are not finite.
    """
    _check_rows(embeddings)
    unit = _normalized(embeddings)
    count = len(unit)
    total = 0.0
    for i in range(0, count, chunk):
        for j in range(i, count, chunk):
            # A pair of blocks also counts for its mirror image.
            total += (1 if i == j else 2) * float(_potential(*_blocks(unit, unit, i, j, chunk), t))
    return float(np.log(total / (count * (count - 1))))


def effective_rank(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """Returns RankMe: the exponential of the entropy of the singular values, from 1 to min(N, D).

    Garrido et al. 2023: p_k = s_k / sum(s) + epsilon, exp(-sum p_k log p_k). The features are neither centered nor
    normalized.

    Args:
      features: `(N, D)`; the paper uses 25,600 rows. All zeros count as rank 1.
      epsilon: epsilon of the formula.

    Raises:
      RunError: if features are not finite.
    """
    _check_finite(features)
    values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    share = values / max(values.sum(), np.finfo(np.float64).tiny) + epsilon
    return float(np.exp(-np.sum(share * np.log(share))))


def similarity_histograms(
    first: np.ndarray, second: np.ndarray, *, bins: int = 100, chunk: int = 1024
) -> dict[str, Any]:
    """Counts cosine similarities of positives (row i with row i) and of negatives (row i with row j, j not i).

    Args:
      first: `(N, D)`, N > 1.
      second: `(N, D)`.
      bins: number of equal bins from -1 to 1; a similarity on an edge falls into the upper bin, 1 into the last.
      chunk: number of rows in a block of pairs.

    Returns:
      `edges` float64 `(bins + 1,)`; `positive_histogram` and `negative_histogram`, int64 `(bins,)`, N and N (N - 1)
      counts; floats `positive_mean` and `negative_mean`.

    Raises:
      UsageError: if shapes do not fit together or there are fewer than two rows.
      RunError: if embeddings are not finite.
    """
    _check_pair(first, second)
    _check_rows(first)
    first, second = _normalized(first), _normalized(second)
    count = len(first)
    negative, total = np.zeros(bins, np.int64), 0.0
    for i in range(0, count, chunk):
        for j in range(0, count, chunk):
            block, part = _similarities(*_blocks(first, second, i, j, chunk), bins)
            negative += np.asarray(block, np.int64)
            total += float(part)
    positive = np.sum(first * second, axis=1)
    return {
        "edges": np.linspace(-1.0, 1.0, bins + 1),
        "positive_histogram": np.bincount(np.asarray(_bin(jnp.asarray(positive), bins)), minlength=bins),
        "negative_histogram": negative,
        "positive_mean": float(np.mean(positive)),
        "negative_mean": total / (count * (count - 1)),
    }


@functools.partial(jax.jit, static_argnames="t")
def _potential(first: jax.Array, second: jax.Array, pairs: jax.Array, t: float) -> jax.Array:
    """Returns the sum of exp(-t |x - y|^2) over the pairs of a block."""
    # |x - y|^2 = 2 - 2 x.y; rounding must not make it negative.
    distance = jnp.maximum(2 - 2 * _products(first, second), 0)
    return jnp.sum(jnp.where(pairs, jnp.exp(-t * distance), jnp.zeros((), first.dtype)))


@functools.partial(jax.jit, static_argnames="bins")
def _similarities(first: jax.Array, second: jax.Array, pairs: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Returns the histogram of the similarities of the pairs of a block, and their sum."""
    products = _products(first, second)
    # Entries that are not pairs fall beyond the last bin.
    index = jnp.where(pairs, _bin(products, bins), bins)
    counts = jnp.bincount(index.ravel(), length=bins + 1)[:bins]
    return counts, jnp.sum(jnp.where(pairs, products, jnp.zeros((), products.dtype)))


def _products(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def _bin(similarity: jax.Array, bins: int) -> jax.Array:
    """Returns the bin of each similarity, int32."""
    return jnp.clip(jnp.floor((similarity + 1) * (bins / 2)), 0, bins - 1).astype(jnp.int32)


def _blocks(
    first: np.ndarray, second: np.ndarray, i: int, j: int, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns padded rows from i of `first` and from j of `second`, and a mask of distinct pairs without padding.

    Padding to `chunk` rows (or to all rows, if they are fewer) lets one program serve all blocks.
    """
    rows = min(chunk, len(first))
    row, column = i + np.arange(rows), j + np.arange(rows)
    last = len(first) - 1
    real = (row <= last)[:, None] & (column <= last) & (row[:, None] != column)
    return first[np.minimum(row, last)], second[np.minimum(column, last)], real


def _normalized(x: np.ndarray) -> np.ndarray:
    """Returns rows scaled to length 1, in float32 or the wider float type of x; a row of zeros stays."""
    _check_finite(x)
    x = np.asarray(x).astype(np.result_type(x.dtype, np.float32))
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length == 0, 1, length)


def _check_pair(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise UsageError(f"embeddings {first.shape} and {second.shape}: expected two views (N, D) of the same images")


def _check_rows(embeddings: np.ndarray) -> None:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise UsageError(f"embeddings {embeddings.shape}: expected (N, D) with at least two rows")


def _check_finite(x: np.ndarray) -> None:
    if not np.isfinite(np.asarray(x, np.float64)).all():
        raise RunError("embeddings are not finite: expected finite embeddings from the encoder; has the run diverged?")
