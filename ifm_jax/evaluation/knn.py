"""Weighted k-nearest-neighbor classification of features (Wu et al. 2018, section 3.4): exact, in bounded memory.

A query's k most similar examples of the bank vote for their class, each with weight exp(cosine similarity / T).

The queries are split over the devices; the bank is processed in chunks, and each query keeps the k best so far. So a
device holds one chunk of each and their similarities, however large the bank. The host counts the votes, k numbers per
query, in double precision, in the order of the neighbors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from ifm_jax import sharding
from ifm_jax.errors import RunError, UsageError


class Votes(NamedTuple):
    """The classes with the most votes, best first; among equal ones the lower class first.

    Attributes:
      classes: int32 `(N, min(5, C))`; -1, which equals no label, where fewer classes have votes.
      scores: float64 `(N, min(5, C))`, the share of the votes in [0, 1]; 0 for the class -1.
    """

    classes: np.ndarray
    scores: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The class with the most votes, int32 `(N,)`."""
        return self.classes[:, 0]


def classify(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
    query_chunk: int = 4096,
    bank_chunk: int = 8192,
) -> Votes:
    """Classifies queries by their neighbors in the bank.

    Similarities are computed in float32 (float64 for float64 features where 64-bit types are enabled) at the highest
    matmul precision; of equally similar examples the earlier one in the bank is the nearer. On several hosts every
    process passes the same arrays and gets the whole result.

    Args:
      bank: features `(M, D)` on the host, not normalized.
      bank_labels: int `(M,)` in [0, C).
      queries: features `(N, D)` on the host, not normalized.
      num_classes: number of classes, C.
      k: number of neighbors that vote; the whole bank if it holds fewer.
      temperature: T > 0.
      mesh: mesh of the devices; None: the default one.
      query_chunk: number of queries at a time on each device.
      bank_chunk: number of bank examples at a time; a device holds `(query_chunk, bank_chunk)` similarities.

    Returns:
      The `Votes`: predicted classes and the best five.

    Raises:
      UsageError: if shapes do not fit together, the bank or the queries are empty, a label is not in [0, C), or a
        number is out of its range.
      RunError: if features are not finite.
    """
    _check(bank, bank_labels, queries, num_classes, k, temperature, query_chunk, bank_chunk)
    dtype = jax.dtypes.canonicalize_dtype(np.result_type(bank.dtype, queries.dtype, np.float32))
    k, bank_chunk = min(k, len(bank)), _even(len(bank), bank_chunk)
    one = split = SingleDeviceSharding(jax.local_devices()[0])
    devices = 1
    if mesh is not None:
        one, split, devices = sharding.replicated(mesh), sharding.split(mesh), mesh.size
    rows = devices * _even(-(-len(queries) // devices), query_chunk)
    step, gather = _programs(one, split)

    parts = []
    for begin in range(0, len(queries), rows):
        wanted = queries[begin : begin + rows]
        chunk = _put(_filled(wanted, rows, dtype), split)
        # Labels stay on the host: a neighbor is stored as its index in the bank.
        best = _put(np.full((rows, k), -np.inf, dtype), split), _put(np.zeros((rows, k), np.int32), split)
        for start in range(0, len(bank), bank_chunk):
            examples = bank[start : start + bank_chunk]
            previous = best[0]
            best = step(
                *best,
                chunk,
                _put(_filled(examples, bank_chunk, dtype), one),
                _put(np.asarray(start, np.int32), one),
                _put(np.asarray(len(examples), np.int32), one),
            )
            # Computation is asynchronous: without a limit, the whole bank would be sent to the device ahead of it.
            previous.block_until_ready()
        similarity, place = jax.device_get(gather(*best))
        similarity, place = similarity[: len(wanted)], place[: len(wanted)]
        if not np.isfinite(similarity).all():
            raise RunError("features are not finite: expected finite features from the backbone; has the run diverged?")
        parts.append(_vote(similarity.astype(np.float64), bank_labels[place], num_classes, temperature))
    return Votes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def merge(
    similarity: jax.Array, place: jax.Array, queries: jax.Array, examples: jax.Array, start: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the k best so far with one more chunk of the bank and returns the k best, best first; see `classify`.

    Args:
      similarity: `(Q, k)` cosine similarities of the best so far, descending.
      place: int32 `(Q, k)`, their indices in the bank.
      queries: `(Q, D)`.
      examples: examples of the bank, `(B, D)`.
      start: int32 scalar, the index of the first example.
      count: int32 scalar, the number of examples; the rest of the chunk is padding.

    Returns:
      `similarity` and `place` of the k best, in the same form.
    """
    new = jnp.matmul(_normalized(queries), _normalized(examples).T, precision=jax.lax.Precision.HIGHEST)
    index = jnp.arange(examples.shape[0], dtype=jnp.int32)[None]
    # NaN must come first, where the host detects it: top_k sorts it first or last by its sign.
    new = jnp.where(jnp.isnan(new), jnp.full((), jnp.inf, new.dtype), new)
    new = jnp.where(index < count, new, jnp.full((), -jnp.inf, new.dtype))
    # top_k prefers the first of equals: the ones kept so far come from earlier in the bank.
    k = similarity.shape[1]
    similarity, order = jax.lax.top_k(jnp.concatenate([similarity, new], axis=1), k)
    kept = jnp.take_along_axis(place, jnp.minimum(order, k - 1), axis=1)
    return similarity, jnp.where(order < k, kept, start + order - k)


@functools.cache
def _programs(one: Sharding, split: Sharding):
    """Returns `merge` compiled for a placement, and a function that gathers its result on every host.

    Queries and their neighbors are split over the devices; every device holds the chunk of the bank.
    """
    step = jax.jit(merge, in_shardings=(split, split, split, one, one, one), out_shardings=split)
    return step, jax.jit(lambda *best: best, out_shardings=one)


def _normalized(x: jax.Array) -> jax.Array:
    """Returns rows scaled to length 1; a row of zeros stays."""
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(length == 0, jnp.ones((), x.dtype), length)


def _even(size: int, chunk: int) -> int:
    """Returns the length of the fewest chunks of at most `chunk` rows and about equal length."""
    return -(-size // -(-size // chunk))


def _filled(x: np.ndarray, rows: int, dtype: np.dtype) -> np.ndarray:
    """Returns `x` padded with zeros to `rows` rows, so that one program serves all chunks."""
    return np.pad(x.astype(dtype, copy=False), ((0, rows - len(x)), (0, 0)))


def _put(x: np.ndarray, placement: Sharding) -> jax.Array:
    """Returns a global array from data that every process has in full."""
    return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])


def _vote(similarity: np.ndarray, labels: np.ndarray, num_classes: int, temperature: float) -> Votes:
    """Returns the best classes of each query from its neighbors' similarities and labels, both `(N, k)`."""
    # Relative to the nearest neighbor: the shares are the same, and no temperature overflows.
    weight = np.exp((similarity - similarity[:, :1]) / temperature)
    cell = np.arange(len(labels))[:, None] * num_classes + labels
    votes = np.bincount(cell.ravel(), weight.ravel(), minlength=len(labels) * num_classes).reshape(-1, num_classes)
    share = votes / votes.sum(axis=1, keepdims=True)
    classes: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    for _ in range(min(5, num_classes)):
        best = np.argmax(share, axis=1)
        score = np.take_along_axis(share, best[:, None], axis=1)[:, 0]
        classes.append(np.where(score > 0, best, -1))
        scores.append(np.maximum(score, 0))
        np.put_along_axis(share, best[:, None], -1, axis=1)
    return Votes(np.stack(classes, axis=1).astype(np.int32), np.stack(scores, axis=1))


def _check(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
    query_chunk: int,
    bank_chunk: int,
) -> None:
    """Raises the UsageErrors that `classify` documents."""
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise UsageError(f"bank {bank.shape} and queries {queries.shape}: expected features (M, D) and (N, D)")
    if not len(bank) or not len(queries):
        raise UsageError(f"{len(bank)} examples in the bank and {len(queries)} queries: expected at least one of each")
    if bank_labels.shape != bank.shape[:1]:
        raise UsageError(f"bank_labels {bank_labels.shape}: expected one label for each of {len(bank)} examples")
    if bank_labels.min() < 0 or bank_labels.max() >= num_classes:
        raise UsageError(
            f"bank_labels from {bank_labels.min()} to {bank_labels.max()}: expected 0 to {num_classes - 1} "
            f"for {num_classes} classes"
        )
    for name, value in {"k": k, "query_chunk": query_chunk, "bank_chunk": bank_chunk}.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1")
    if not temperature > 0:
        raise UsageError(f"temperature={temperature}: expected a positive number; Wu et al. use 0.07")
