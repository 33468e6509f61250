"""Shuffled BatchNorm: keys are computed in another order of the batch than queries (He et al. 2020, section 3.3).

The original splits a batch over GPUs, one BatchNorm each. If a key shared its group with the same images as its query,
the groups' statistics would tell it from the negatives. An `Order` says which image stands where while keys are
computed: a uniform one, as the original draws it, or a *balanced* one, in which every BatchNorm group sends equally
many of its images to each group. Which images go where is random in both.

A balanced order exists for the devices' sake. Any image may go to any device in a uniform one, so that the compiler
gathers the images of the whole batch on every device. In a balanced one each device sends each other equally many, a
single all-to-all: each receives as many images as it computes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ifm_jax import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """An order of the images of a batch.

    Attributes:
      index: int32 `(N,)`; place i holds image `index[i]`.
    """

    index: jax.Array

    def take(self, images: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
        """Returns `images[index]`, split over the devices.

        Args:
          images: `(N, ...)` in sample order, split over the devices.
          mesh: mesh of the devices; None: arrays stay where they are.
        """
        return sharding.split_rows(images[self.index], mesh)

    def undo(self, rows: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
        """Returns rows in sample order, on every device.

        Args:
          rows: `(N, ...)` in this order, split over the devices.
          mesh: mesh of the devices; None: arrays stay where they are.
        """
        # The devices exchange the rows once, before each of them puts all in order; ordered first, twice.
        return sharding.on_every_device(sharding.on_every_device(rows, mesh)[jnp.argsort(self.index)], mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class BalancedOrder(Order):
    """An order in which every group sends N / G^2 images to each group.

    Attributes:
      groups: G, the number of BatchNorm groups. Within a group, the images stand by the group that they come from.
    """

    groups: int

    def take(self, images: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
        """Returns `images[index]`, split over the devices; by an all-to-all if their number divides G."""
        devices = 1 if mesh is None else mesh.size
        if mesh is None or devices == 1 or self.groups % devices:
            return super().take(images, mesh)
        own = images.shape[0] // devices

        def exchange(images: jax.Array, index: jax.Array) -> jax.Array:
            # From the images of this device (own, ...) and the index of all places that they go to, by group,
            # (G, 1, own / G): its images by group and by device that they go to.
            rows = index.reshape(devices, self.groups // devices, own // self.groups).swapaxes(0, 1)
            rows = rows - jax.lax.axis_index(sharding.AXIS) * own
            sent = images.at[rows].get(mode="promise_in_bounds")
            received = jax.lax.all_to_all(sent, sharding.AXIS, split_axis=1, concat_axis=1, tiled=True)
            return received.reshape(images.shape)

        split = jax.sharding.PartitionSpec(sharding.AXIS)
        by_source = jax.sharding.PartitionSpec(None, sharding.AXIS)
        index = self.index.reshape(self.groups, devices, own // self.groups)
        return jax.shard_map(exchange, mesh=mesh, in_specs=(split, by_source), out_specs=split)(images, index)


def uniform_order(rng: jax.Array, count: int, mesh: jax.sharding.Mesh | None = None) -> Order:
    """Returns one of all orders of `count` images, each equally likely; drawn by every device of the mesh."""
    # Drawn in parts, as the compiler likes to, it would have to be exchanged.
    return Order(sharding.on_every_device(jax.random.permutation(rng, jnp.arange(count, dtype=jnp.int32)), mesh))


def balanced_order(rng: jax.Array, count: int, groups: int, mesh: jax.sharding.Mesh | None = None) -> BalancedOrder:
    """Returns a random balanced order, the same for any number of devices.

    Which of a group's images go to which group is uniform, and independent of the other groups. Within a group the
    images are not shuffled, since BatchNorm's statistics do not depend on their order.

    Args:
      rng: a JAX random key.
      count: N, the number of images.
      groups: G, the number of BatchNorm groups.
      mesh: mesh of the devices, each of which draws the whole order; None: arrays stay where they are.

    Raises:
      ValueError: if N is not a multiple of G^2.
    """
    if count % groups**2:
        raise ValueError(f"a balanced order of {count} images in {groups} groups: expected a multiple of {groups**2}")
    images = jnp.arange(count, dtype=jnp.int32).reshape(groups, count // groups)
    by_source = jax.random.permutation(rng, images, axis=1, independent=True)
    by_goal = by_source.reshape(groups, groups, count // groups**2).swapaxes(0, 1)
    return BalancedOrder(sharding.on_every_device(by_goal.reshape(count), mesh), groups)
