"""The key queue: a ring of the latest K keys, the negatives of every query (He et al. 2020, section 3.2)."""

import jax
import jax.numpy as jnp


def create(rng: jax.Array, size: int, dim: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns a queue of random unit vectors, `(size, dim)`, like the original's initial queue.

    A row is a key; PyTorch's `queue` buffer is the transpose, `(dim, K)`.

    Args:
      rng: a JAX random key.
      size: K, the number of negatives.
      dim: length of an embedding.
      dtype: dtype of the queue.
    """
    queue = jax.random.normal(rng, (size, dim), dtype)
    return queue / jnp.linalg.norm(queue, axis=1, keepdims=True)


def enqueue(
    queue: jax.Array, pointer: jax.Array, keys: jax.Array, *, by_row: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Overwrites the oldest keys with the newest.

    Args:
      queue: `(K, dim)`.
      pointer: int32 scalar, the row of the oldest key; a multiple of N.
      keys: `(N, dim)` in global sample order; N divides K.
      by_row: select the new value row by row. For a queue whose rows are split over devices: to write a slice, the
        compiler would first gather all of them on each device.

    Returns:
      The queue with rows `pointer ... pointer + N - 1` replaced, and the next pointer `(pointer + N) mod K`.

    Raises:
      ValueError: if K is not a multiple of N: a batch would have to be split at the end of the queue.
    """
    size, batch = queue.shape[0], keys.shape[0]
    if size % batch:
        raise ValueError(f"the queue size {size} must be a multiple of the number of keys {batch}")
    keys = keys.astype(queue.dtype)
    if by_row:
        place = jnp.arange(size, dtype=jnp.int32) - pointer
        newest = ((place >= 0) & (place < batch))[:, None]
        queue = jnp.where(newest, keys[place % batch], queue)
    else:
        queue = jax.lax.dynamic_update_slice_in_dim(queue, keys, pointer, axis=0)
    return queue, (pointer + batch) % size
