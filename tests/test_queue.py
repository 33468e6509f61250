"""The key queue: a ring of unit vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax import sharding
from ifm_jax.methods import queue


def test_starts_as_random_unit_vectors():
    made = queue.create(jax.random.key(0), 64, 16)
    assert made.shape == (64, 16)
    np.testing.assert_allclose(jnp.linalg.norm(made, axis=1), 1.0, rtol=1e-6)
    assert abs(float(jnp.mean(made @ made.T - jnp.eye(64)))) < 0.02  # directions without preference


def test_newest_keys_replace_the_oldest_and_wrap():
    ring, pointer = jnp.zeros((12, 2)), jnp.zeros((), jnp.int32)
    written = []
    for i in range(5):
        keys = jnp.full((4, 2), i + 1.0) + jnp.arange(4.0)[:, None] / 10
        ring, pointer = jax.jit(queue.enqueue)(ring, pointer, keys)
        written.append(np.asarray(keys))
    # Five batches into three places: the ring holds batches 3, 4 and 2, in the order of their places.
    np.testing.assert_array_equal(ring, np.concatenate([written[3], written[4], written[2]]))
    assert int(pointer) == 8


def test_keys_take_the_dtype_of_the_queue():
    ring, _ = queue.enqueue(jnp.zeros((4, 2)), jnp.zeros((), jnp.int32), jnp.ones((2, 2), jnp.bfloat16))
    assert ring.dtype == jnp.float32


def test_a_batch_that_does_not_divide_the_queue_is_refused():
    with pytest.raises(ValueError, match="queue size 10 must be a multiple of the number of keys 4"):
        queue.enqueue(jnp.zeros((10, 2)), jnp.zeros((), jnp.int32), jnp.ones((4, 2)))


@pytest.mark.parametrize("devices", [2, 8])
def test_a_split_queue_is_written_where_its_rows_are(devices):
    """By row it holds the same, and no device ever holds all of it."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    split, everywhere = sharding.split(mesh), sharding.replicated(mesh)

    def enqueue(ring, pointer, keys):
        return queue.enqueue(ring, pointer, keys, by_row=True)

    size, batch = 1024, 16
    compiled = (
        jax.jit(enqueue, in_shardings=(split, everywhere, everywhere), out_shardings=(split, everywhere))
        .lower(jnp.zeros((size, 4)), jnp.zeros((), jnp.int32), jnp.zeros((batch, 4)))
        .compile()
    )
    assert "all-gather" not in compiled.as_text()
    ring = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    for pointer in (0, 496, size - batch):
        keys = jnp.asarray(np.random.default_rng(pointer).normal(size=(batch, 4)), jnp.float32)
        expected, next_pointer = queue.enqueue(jnp.asarray(ring), jnp.asarray(pointer, jnp.int32), keys)
        placed = jax.device_put((ring, np.int32(pointer), keys), (split, everywhere, everywhere))
        found, found_pointer = compiled(*placed)
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(split, 2)
        assert int(found_pointer) == int(next_pointer)
