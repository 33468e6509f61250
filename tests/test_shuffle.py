"""The orders in which MoCo computes keys: balanced ones, and how the devices exchange images for them."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import collectives
from ifm_jax import sharding
from ifm_jax.methods import MoCo, MoCoMemory, Objective, Views, shuffle


@pytest.mark.parametrize(("count", "groups"), [(16, 2), (16, 4), (27, 3), (12, 1)])
def test_every_group_sends_equally_many_to_each(count, groups):
    drawn = [np.asarray(shuffle.balanced_order(jax.random.key(seed), count, groups).index) for seed in (0, 0, 1)]
    assert drawn[0].dtype == np.int32
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    for index in drawn:
        assert sorted(index) == list(range(count))
        sent = collections.Counter(zip(index // (count // groups), np.arange(count) // (count // groups), strict=True))
        assert len(sent) == groups**2
        assert set(sent.values()) == {count // groups**2}


def test_each_image_is_as_likely_at_each_of_its_places():
    """Chi-squared of 8 images at 8 places, in each of two groups, and of two images' places together."""
    groups, own, draws = 2, 8, 4096
    index = jax.vmap(lambda rng: shuffle.balanced_order(rng, groups * own, groups).index)(
        jax.random.split(jax.random.key(0), draws)
    )
    places = np.argsort(np.asarray(index), axis=1)

    def chi_squared(table):
        expected = draws / table.shape[1]
        return np.sum((table - expected) ** 2 / expected)

    possible = np.asarray([[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]])
    for group in range(groups):
        of_group = places[:, group * own : (group + 1) * own]
        table = np.asarray([[np.sum(of_group[:, i] == place) for place in possible[group]] for i in range(own)])
        assert (table.sum(axis=1) == draws).all()
        assert chi_squared(table) < 49 + 4 * np.sqrt(2 * 49)  # (8 - 1)^2 degrees of freedom, four standard deviations
    # Where an image goes tells nothing of another group's.
    together = np.asarray(
        [[np.sum((places[:, 0] == a) & (places[:, own] == b)) for b in possible[1]] for a in possible[0]]
    )
    assert chi_squared(together.reshape(1, -1)) < 63 + 4 * np.sqrt(2 * 63)


def test_a_batch_that_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="24 images in 4 groups: expected a multiple of 16"):
        shuffle.balanced_order(jax.random.key(0), 24, 4)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_exchange_equals_the_index_on_any_number_of_devices(groups):
    """Images of bytes and of floats, in one program, bit for bit; by an all-to-all wherever that is possible."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (128, 3, 2, 3), np.uint8), random.normal(size=(128, 5)).astype(np.float32)
    index = shuffle.balanced_order(jax.random.key(3), 128, groups).index

    def there_and_back(images, index, mesh):
        order = shuffle.BalancedOrder(index, groups)
        taken = [order.take(each, mesh) for each in images]
        return taken, [order.undo(each, mesh) for each in taken]

    for devices in (1, 2, 4, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        split, whole = sharding.split(mesh), sharding.replicated(mesh)
        program = jax.jit(there_and_back, static_argnums=2, in_shardings=(split, whole), out_shardings=None)
        compiled = program.lower(images, index, mesh).compile()
        for given, taken, back in zip(images, *compiled(images, index), strict=True):
            np.testing.assert_array_equal(taken, given[np.asarray(index)])
            np.testing.assert_array_equal(back, given)
            assert taken.sharding.is_equivalent_to(split, given.ndim)
        found = {(one.kind, one.dtype) for one in collectives.read(compiled.as_text(), devices)}
        if devices == 1:
            assert not found
        elif groups % devices:
            assert ("all-to-all", "u8") not in found
        else:  # the images; and gathered, since they are wanted everywhere, what comes back
            assert found == {(kind, dtype) for kind in ("all-to-all", "all-gather") for dtype in ("u8", "f32")}


def test_the_draw_does_not_depend_on_the_devices():
    mesh = sharding.make_mesh()

    @jax.jit
    def drawn(rng):
        return sharding.split_rows(shuffle.balanced_order(rng, 64, 4).index, mesh)

    np.testing.assert_array_equal(drawn(jax.random.key(3)), shuffle.balanced_order(jax.random.key(3), 64, 4).index)


class Pixels:
    """An encoder that sees its groups: the first pixels of an image, less their sum in the group. Exact in integers."""

    dim = 4
    param_dtype = "float32"

    def __init__(self, groups):
        self.bn_groups = groups

    def __call__(self, params, batch_stats, images, *, train):
        rows = images[:, 0, 0].reshape(self.bn_groups, -1, self.dim)
        return (rows - rows.sum(axis=1, keepdims=True)).reshape(-1, self.dim) * params[None], batch_stats


def queue_after_a_step(shuffled, groups=4, permutation=None, devices=1):
    """The queue after one step of 16 images, which then holds their keys alone; and what the devices exchange."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 2, 2, 4)), jnp.float32)
    method = MoCo(Pixels(groups), Objective(), 16, shuffle=shuffled, mesh=mesh)
    memory = MoCoMemory(jnp.ones(4), {}, jnp.ones((16, 4)), jnp.zeros((), jnp.int32))

    def step(images, rng):
        views = Views((images, images), (rng, rng), lambda _, images: images, permutation, mesh)
        return method.loss(jnp.ones(4), {}, memory, views, rng)[1].memory.queue

    split, whole = sharding.split(mesh), sharding.replicated(mesh)
    given = images, jax.random.key(5)
    compiled = jax.jit(step, in_shardings=(split, whole), out_shardings=whole).lower(*given).compile()
    return np.asarray(compiled(*given)), collectives.read(compiled.as_text(), devices)


@pytest.mark.slow
def test_keys_are_computed_in_the_order_and_come_back():
    """Balanced, as with the same order given; a given one counts for more; one group has nothing to exchange."""
    order = shuffle.balanced_order(jax.random.key(5), 16, 4).index
    (found, exchanged), (unshuffled, _) = queue_after_a_step("balanced"), queue_after_a_step(False)
    assert not exchanged
    np.testing.assert_array_equal(found, queue_after_a_step(True, permutation=order)[0])
    assert (found != unshuffled).any()
    given = jnp.arange(16, dtype=jnp.int32)
    np.testing.assert_array_equal(queue_after_a_step("balanced", permutation=given)[0], unshuffled)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 2, 2, 4))[:, 0, 0]
    np.testing.assert_array_equal(queue_after_a_step("balanced", groups=1)[0], pixels - pixels.sum(axis=0))

    # On several devices images are exchanged once and keys once, and nothing else.
    many, exchanged = queue_after_a_step("balanced", devices=4)
    np.testing.assert_array_equal(many, found)
    assert {(one.kind, one.dtype, one.count) for one in exchanged} == {
        ("all-to-all", "f32", 1),
        ("all-gather", "f32", 1),
    }
