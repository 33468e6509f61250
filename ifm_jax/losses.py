"""InfoNCE, its implicitly modified form (IFM), and contrast accuracy: pure functions of embeddings.

Notation (Robinson et al. 2021, section 4): q the query, k+ its key, n_j the K negatives of the queue, tau the
temperature. With

    s+ = q.k+ / tau,    L- = logsumexp_j(q.n_j / tau),    z = L- - s+   (the *margin*)

InfoNCE is -log(e^s+ / (e^s+ + e^L-)) = softplus(z). IFM lowers the positive similarity by epsilon and raises every
negative one by epsilon before the temperature is applied, which moves z by 2 epsilon / tau and does nothing else:

    IFM = softplus(z + 2 epsilon / tau)

so that the queue is read once and IFM costs one scalar a query. The original builds two (N, 1 + K) matrices of logits;
the values and gradients are the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Contrast(NamedTuple):
    """How a query stands against its key and the queue.

    Attributes:
      margin: `(N,)` z = logsumexp of the negatives' logits minus the positive's logit.
      rank: `(N,)` int32, the number of negatives more similar to the query than its key (0: the key comes first);
        from unperturbed logits, no gradient.
    """

    margin: jax.Array
    rank: jax.Array


def contrast(query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float) -> Contrast:
    """Compares each query with its key and with all negatives, in one pass over the queue.

    Similarities are computed in float32 (float64 for float64 input) at the highest matmul precision: they are divided
    by a small temperature, and cost nothing beside the encoders.

    Args:
      query: `(N, dim)` L2-normalised embeddings; the gradient flows through these.
      key: `(N, dim)` L2-normalised embeddings of the positives.
      queue: `(K, dim)` L2-normalised negatives, shared by all queries.
      temperature: tau > 0.

    Returns:
      A `Contrast` of `(N,)` arrays.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    if query.ndim != 2 or query.shape != key.shape or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must both be (N, dim) and queue {queue.shape} (K, dim)"
        )
    dtype = np.promote_types(query.dtype, jnp.float32)
    query, key, queue = query.astype(dtype), key.astype(dtype), queue.astype(dtype)
    positive = jnp.sum(query * key, axis=-1)
    negatives = jnp.matmul(query, queue.T, precision=jax.lax.Precision.HIGHEST)
    margin = jax.nn.logsumexp(negatives / temperature, axis=-1) - positive / temperature
    rank = jnp.sum(negatives > positive[:, None], axis=-1, dtype=jnp.int32)
    return Contrast(margin, rank)


def margin_shift(temperature: float, epsilon: float | tuple[float, float]) -> float:
    """Returns what IFM adds to the margin: `(epsilon_positive + epsilon_negative) / temperature`.

    Args:
      temperature: tau > 0.
      epsilon: the perturbation budget, one number for both (the original's), or a pair
        `(epsilon_positive, epsilon_negative)`; only their sum matters.
    """
    positive, negative = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    return (positive + negative) / temperature


def info_nce(query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float) -> jax.Array:
    """Returns the InfoNCE loss of each query, `(N,)`.

    The cross entropy of picking the key among itself and the K negatives (van den Oord et al. 2018, eq. 4;
    He et al. 2020, eq. 1), as softplus(z).

    Args:
      query: `(N, dim)` L2-normalised embeddings.
      key: `(N, dim)` L2-normalised embeddings of the positives.
      queue: `(K, dim)` L2-normalised negatives.
      temperature: tau > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.asarray([[1.0, 0.0]])
      >>> info_nce(q, q, jnp.asarray([[0.0, 1.0]]), temperature=0.5).round(4)
      Array([0.1269], dtype=float32)
    """
    return jax.nn.softplus(contrast(query, key, queue, temperature).margin)


def ifm_info_nce(
    query: jax.Array,
    key: jax.Array,
    queue: jax.Array,
    temperature: float,
    epsilon: float | tuple[float, float],
    alpha: float = 1.0,
) -> jax.Array:
    """Returns the IFM objective of each query, `(N,)`: (InfoNCE + alpha IFM) / (1 + alpha).

    Robinson et al. 2021, eq. 3 and 4 with the original code's weighting. `epsilon=0` is InfoNCE exactly. The shifted
    loss alone (`ifm_only`) is `softplus(contrast(...).margin + margin_shift(...))`.

    Args:
      query: `(N, dim)` L2-normalised embeddings.
      key: `(N, dim)` L2-normalised embeddings of the positives.
      queue: `(K, dim)` L2-normalised negatives.
      temperature: tau > 0.
      epsilon: perturbation budget >= 0 in units of cosine similarity, subtracted from the positive and added to the
        negatives before the temperature; or a pair `(epsilon_positive, epsilon_negative)`.
      alpha: weight of the perturbed loss, >= 0.
    """
    margin = contrast(query, key, queue, temperature).margin
    clean = jax.nn.softplus(margin)
    shifted = jax.nn.softplus(margin + margin_shift(temperature, epsilon))
    return (clean + alpha * shifted) / (1 + alpha)


def contrast_accuracy(rank: jax.Array, top: int) -> jax.Array:
    """Returns the share of queries, in percent, whose key is among the `top` most similar of key and queue.

    Args:
      rank: `(N,)` int, the number of negatives above the positive (`Contrast.rank`).
      top: 1 for `acc1`, 5 for `acc5`.

    Returns:
      A scalar, float32 (float64 when 64-bit types are enabled).
    """
    return 100.0 * jnp.mean(rank < top, dtype=float)
