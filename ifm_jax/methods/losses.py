"""InfoNCE, IFM, hard negatives, and contrast accuracy: pure functions of embeddings, for any source of negatives.

Notation (Robinson et al. 2021b, section 4): q the query, k+ its key, n_j its K negatives (of MoCo's queue, or the other
images of SimCLR's batch), tau the temperature, x_j = q.n_j / tau. With

    s+ = q.k+ / tau,    L- = logsumexp_j(x_j),    z = L- - s+   (the *margin*)

InfoNCE is -log(e^s+ / (e^s+ + e^L-)) = softplus(z).

**IFM** lowers the positive similarity by epsilon and raises every negative one by epsilon before the temperature is
applied, which moves z by 2 epsilon / tau and does nothing else:

    IFM = softplus(z + 2 epsilon / tau)

so that the negatives are read once and IFM costs one scalar a query. The original builds two (N, 1 + K) matrices of
logits; the values and gradients are the same.

**Hard negatives** (Robinson et al. 2021a, "Contrastive learning with hard negative samples") weigh negative j by
e^(beta x_j), over the mean of these weights. The sum of the weighted negatives is again two sums over them:

    L- = logsumexp_j((1 + beta) x_j) - logsumexp_j(beta x_j) + log K

**Debiasing** (Chuang et al. 2020) takes out the share tau+ of the negatives that are of the query's own class,

    N_g = max((e^L- - tau+ K e^s+) / (1 - tau+), K e^(-1/tau)),    z = log N_g - s+

where the floor is the smallest value that the exact N_g can have. IFM, under either of them, lowers s+ and raises L-;
the weights of the negatives and the floor stay as they are. All of it is computed in logarithms, so that it holds at
any temperature. Code released with the two papers: https://github.com/joshr17/IFM and https://github.com/joshr17/HCL.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Epsilon = float | tuple[float, float]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("positive", "negatives", "rank"), meta_fields=("count",)
)
@dataclasses.dataclass(frozen=True)
class Contrast:
    """The comparison of queries with their keys and negatives: a few scalars per query, for every objective.

    Attributes:
      positive: s+ = q.k+ / tau, of each query; float32 or better.
      negatives: L-, the logarithm of the (reweighted) sum over the negatives; likewise.
      rank: int32, the number of negatives more similar to the query than its key (0: the key comes first); from
        unperturbed similarities, no gradient.
      count: K, the number of negatives per query; a Python number.
    """

    positive: jax.Array
    negatives: jax.Array
    rank: jax.Array
    count: int

    @property
    def margin(self) -> jax.Array:
        """The margin z = L- - s+: InfoNCE is softplus(z)."""
        return self.negatives - self.positive


def contrast(query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float, beta: float = 0.0) -> Contrast:
    """Compares each query with its key and with all negatives of a queue, in one pass over it.

    Similarities are computed in float32 (float64 for float64 input) at the highest matmul precision: they are divided
    by a small temperature, and cost nothing beside the encoders.

    Args:
      query: `(N, dim)` L2-normalized embeddings; the gradient flows through these.
      key: `(N, dim)` L2-normalized embeddings of the positives.
      queue: `(K, dim)` L2-normalized negatives, shared by all queries.
      temperature: tau > 0.
      beta: concentration on hard negatives, a Python number >= 0; 0: all count alike.

    Returns:
      A `Contrast` of `(N,)` arrays.

    Raises:
      ValueError: if the shapes do not fit together, or `beta` is negative.
    """
    if query.ndim != 2 or query.shape != key.shape or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must both be (N, dim) and queue {queue.shape} (K, dim)"
        )
    dtype = np.promote_types(query.dtype, jnp.float32)
    query, key, queue = query.astype(dtype), key.astype(dtype), queue.astype(dtype)
    positive = jnp.sum(query * key, axis=-1)
    negatives = jnp.matmul(query, queue.T, precision=jax.lax.Precision.HIGHEST)
    return Contrast(
        positive=positive / temperature,
        negatives=_log_sum(negatives / temperature, beta, count=len(queue), axis=-1),
        rank=jnp.sum(negatives > positive[:, None], axis=-1, dtype=jnp.int32),
        count=len(queue),
    )


def contrast_in_batch(
    views: jax.Array,
    temperature: float,
    beta: float = 0.0,
    gather: Callable[[jax.Array], jax.Array] = lambda views: views,
) -> Contrast:
    """Compares each view of a batch with the other view of its image and with all views of the other images.

    Each of the 2N views is a query (Chen et al. 2020, section 2.1): its positive is the other view of the same image,
    its negatives are the 2N - 2 views of the other images. Gradients flow through a view as a query, as a positive and
    as a negative.

    Where `views` is split over devices along N, each device compares its own queries with the views that `gather`
    returns, and holds a 1/devices part of the `(2N, 2N)` similarities.

    Args:
      views: `(N, 2, dim)` L2-normalized embeddings of both views of N >= 2 images.
      temperature: tau > 0.
      beta: see `contrast`.
      gather: returns `views` with all rows on every device, by a sharding constraint; the gradient comes back through
        it.

    Returns:
      A `Contrast` of `(N, 2)` arrays.

    Raises:
      ValueError: if `views` has another shape, or `beta` is negative.
    """
    if views.ndim != 3 or views.shape[1] != 2 or len(views) < 2:
        raise ValueError(f"views {views.shape} must be (N, 2, dim), both views of at least 2 images")
    n = len(views)
    views = views.astype(np.promote_types(views.dtype, jnp.float32))
    positive = jnp.sum(views[:, 0] * views[:, 1], axis=-1)[:, None]
    similarities = jnp.einsum("nvd,mwd->nvmw", views, gather(views), precision=jax.lax.Precision.HIGHEST)
    # Leave out the query itself and its positive. The mask compares numbers, so it is never stored.
    one, other = (jax.lax.broadcasted_iota(jnp.int32, (n, 1, n, 1), axis) for axis in (0, 2))
    negatives = jnp.where(one == other, -jnp.inf, similarities)
    logits = positive / temperature
    return Contrast(
        positive=jnp.broadcast_to(logits, (n, 2)),
        negatives=_log_sum(negatives / temperature, beta, count=2 * n - 2, axis=(2, 3)),
        rank=jnp.sum(negatives > positive[:, :, None, None], axis=(2, 3), dtype=jnp.int32),
        count=2 * n - 2,
    )


def _log_sum(logits: jax.Array, beta: float, *, count: int, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns the log of the sum over the negatives, each weighted by e^(beta x) over the mean of these weights."""
    if beta == 0:
        return jax.nn.logsumexp(logits, axis=axis)
    if beta < 0:
        raise ValueError(f"beta is {beta}: expected 0 (all negatives alike) or more")
    # Both sums share the same maximum, which cancels except once: no large numbers are subtracted from each other.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
    below = logits - largest
    hard = jnp.log(jnp.sum(jnp.exp((1 + beta) * below), axis=axis))
    weight = jnp.log(jnp.sum(jnp.exp(beta * below), axis=axis))
    return jnp.squeeze(largest, axis) + (hard - weight) + math.log(count)


def margin_shift(temperature: float, epsilon: Epsilon) -> float:
    """Returns IFM's shift of the margin: `(epsilon_positive + epsilon_negative) / temperature`.

    Args:
      temperature: tau > 0.
      epsilon: the perturbation budget, one number for both (the original's), or a pair
        `(epsilon_positive, epsilon_negative)`; only their sum matters.
    """
    positive, negative = _pair(epsilon)
    return (positive + negative) / temperature


def _pair(epsilon: Epsilon) -> tuple[float, float]:
    return epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)


def margins(
    found: Contrast, temperature: float, epsilon: Epsilon, tau_plus: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns the margins z without and with IFM's shift: the loss of a query is softplus of either.

    Without debiasing they are `found.margin` and `found.margin` plus `margin_shift`. With debiasing the second depends
    on the shifts of the positive and of the negatives separately, since both enter N_g.

    Args:
      found: result of `contrast` or `contrast_in_batch`.
      temperature: tau > 0, the one of `found`.
      epsilon: see `ifm_info_nce`.
      tau_plus: the share of the negatives that are really positives, a Python number in [0, 1); 0: no debiasing.

    Returns:
      `(clean, shifted)`, each with the shape of `found.positive`.

    Raises:
      ValueError: if `tau_plus` is not in [0, 1).
    """
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus is {tau_plus}: expected a share in [0, 1)")
    if tau_plus == 0:
        return found.margin, found.margin + margin_shift(temperature, epsilon)
    lower, raise_ = (shift / temperature for shift in _pair(epsilon))
    debias = functools.partial(_debiased, count=found.count, temperature=temperature, tau_plus=tau_plus)
    return debias(found.positive, found.negatives), debias(found.positive - lower, found.negatives + raise_)


def _debiased(
    positive: jax.Array, negatives: jax.Array, *, count: int, temperature: float, tau_plus: float
) -> jax.Array:
    """Returns the margin log N_g - s+."""
    floor = math.log(count) - 1 / temperature
    # log(R - P) = log R + log(1 - e^(-d)) with d = log R - log P, P = tau+ K e^s+; it does not exist for d <= 0,
    # where a substitute value keeps the gradient finite.
    d = negatives - positive - math.log(tau_plus * count)
    estimate = negatives + jax.nn.log1mexp(jnp.where(d > 0, d, 1.0)) - math.log1p(-tau_plus)
    return jnp.where((d > 0) & (estimate >= floor), estimate, floor) - positive


def info_nce(
    query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float, beta: float = 0.0, tau_plus: float = 0.0
) -> jax.Array:
    """Returns the InfoNCE loss of each query, `(N,)`.

    This is the cross entropy of picking the key among itself and the K negatives (van den Oord et al. 2018, eq. 4; He
    et al. 2020, eq. 1), as softplus(z):

        -log(e^s+ / (e^s+ + sum_j e^x_j))

    With `beta` and `tau_plus` the sum is N_g, the debiased one over hard negatives (Robinson et al. 2021a, eq. 4).

    Args:
      query: `(N, dim)` L2-normalized embeddings.
      key: `(N, dim)` L2-normalized embeddings of the positives.
      queue: `(K, dim)` L2-normalized negatives.
      temperature: tau > 0.
      beta: concentration on hard negatives, a Python number >= 0; 0: all count alike.
      tau_plus: the share of the negatives that are really positives, a Python number in [0, 1); 0: no debiasing.

    Returns:
      `(N,)`, float32 or better.

    Raises:
      ValueError: if the shapes do not fit together, or `beta` or `tau_plus` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from ifm_jax import losses
      >>> query = jnp.asarray([[1.0, 0.0]])
      >>> queue = jnp.asarray([[0.0, 1.0], [0.6, 0.8]])
      >>> losses.info_nce(query, query, queue, temperature=0.5).round(4)
      Array([0.4604], dtype=float32)
      >>> losses.info_nce(query, query, queue, temperature=0.5, beta=1.0).round(4)
      Array([0.5615], dtype=float32)
    """
    found = contrast(query, key, queue, temperature, beta)
    return jax.nn.softplus(margins(found, temperature, 0.0, tau_plus)[0])


def ifm_info_nce(
    query: jax.Array,
    key: jax.Array,
    queue: jax.Array,
    temperature: float,
    epsilon: Epsilon,
    alpha: float = 1.0,
    beta: float = 0.0,
    tau_plus: float = 0.0,
) -> jax.Array:
    """Returns the IFM objective of each query, `(N,)`: (InfoNCE + alpha IFM) / (1 + alpha).

        InfoNCE = softplus(z),    IFM = softplus(z + 2 epsilon / tau)

    See Robinson et al. 2021b, eq. 3 and 4, with the original code's weighting. `epsilon=0` is InfoNCE exactly. The
    shifted loss alone (`ifm_only`) is `softplus(margins(...)[1])`.

    Args:
      query: `(N, dim)` L2-normalized embeddings.
      key: `(N, dim)` L2-normalized embeddings of the positives.
      queue: `(K, dim)` L2-normalized negatives.
      temperature: tau > 0.
      epsilon: perturbation budget >= 0 in units of cosine similarity, subtracted from the positive and added to the
        negatives before the temperature; or a pair `(epsilon_positive, epsilon_negative)`.
      alpha: weight of the perturbed loss, >= 0.
      beta: concentration on hard negatives, a Python number >= 0; 0: all count alike.
      tau_plus: the share of the negatives that are really positives, a Python number in [0, 1); 0: no debiasing.

    Returns:
      `(N,)`, float32 or better.

    Raises:
      ValueError: see `info_nce`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ifm_jax import losses
      >>> query = jnp.asarray([[1.0, 0.0]])
      >>> queue = jnp.asarray([[0.0, 1.0], [0.6, 0.8]])
      >>> losses.ifm_info_nce(query, query, queue, temperature=0.5, epsilon=0.1).round(4)
      Array([0.5437], dtype=float32)
    """
    found = contrast(query, key, queue, temperature, beta)
    return _weighted(*margins(found, temperature, epsilon, tau_plus), alpha)


def nt_xent(
    first: jax.Array,
    second: jax.Array,
    temperature: float,
    epsilon: Epsilon = 0.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    tau_plus: float = 0.0,
) -> jax.Array:
    """Returns SimCLR's loss of each view, `(2N,)`, optionally with IFM and hard negatives.

    This is InfoNCE of each view against the other view of its image, with the 2N - 2 views of the other images as
    negatives (Chen et al. 2020, eq. 1, "NT-Xent"); their mean is the batch's loss. With `epsilon` it is (InfoNCE +
    alpha IFM) / (1 + alpha) as in `ifm_info_nce`, with `beta` and `tau_plus` the loss of "Contrastive learning with
    hard negative samples" (Robinson et al. 2021a, eq. 4, as in its code).

    Args:
      first: `(N, dim)` L2-normalized embeddings of one view of N >= 2 images.
      second: `(N, dim)` L2-normalized embeddings of the other; gradients flow through both.
      temperature: tau > 0.
      epsilon: IFM's perturbation budget, see `ifm_info_nce`; 0: InfoNCE.
      alpha: weight of the perturbed loss, >= 0.
      beta: concentration on hard negatives, a Python number >= 0; 0: all count alike.
      tau_plus: the share of the negatives that are really positives, a Python number in [0, 1); 0: no debiasing.

    Returns:
      `(2N,)`, float32 or better: the losses of the first views, then those of the second.

    Raises:
      ValueError: if the shapes do not fit together, or `beta` or `tau_plus` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from ifm_jax import losses
      >>> views = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> losses.nt_xent(views, views, temperature=0.5).round(4)
      Array([0.2395, 0.2395, 0.2395, 0.2395], dtype=float32)
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"first {first.shape} and second {second.shape} must both be (N, dim)")
    found = contrast_in_batch(jnp.stack([first, second], axis=1), temperature, beta)
    return _weighted(*margins(found, temperature, epsilon, tau_plus), alpha).T.reshape(-1)


def _weighted(clean: jax.Array, shifted: jax.Array, alpha: float) -> jax.Array:
    return (jax.nn.softplus(clean) + alpha * jax.nn.softplus(shifted)) / (1 + alpha)


def contrast_accuracy(rank: jax.Array, top: int) -> jax.Array:
    """Returns the share of queries, in percent, whose key is among the `top` most similar of key and negatives.

    Args:
      rank: int, the number of negatives above the positive of each query (`Contrast.rank`).
      top: 1 for `acc1`, 5 for `acc5`.

    Returns:
      A scalar, float32 (float64 when 64-bit types are enabled).
    """
    return 100.0 * jnp.mean(rank < top, dtype=float)
