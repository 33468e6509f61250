"""Convolution and linear layer, for gradients that are summed over the devices in the parameters' dtype.

A step is written for one device. Split over several, each of them has a part of a parameter's gradient, and the
compiler sums the parts where they arise, before the gradient is converted from the compute dtype: in bfloat16 if the
network computes in bfloat16. A layer with a mesh (`reduce_over`) instead gives each device a copy of its parameters and
its own rows. The sum over the devices is then the gradient of copying, and the copies are converted, not the
parameters: what each device computes is the same, in the compute dtype, and the sum is in the parameters' dtype.
"""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

Layer = TypeVar("Layer", "Conv", "Linear")


class Conv(nnx.Conv):
    """`nnx.Conv` on a batch.

    Args:
      *arguments: of `nnx.Conv`.
      reduce_over: mesh whose devices share a batch, split along its leading axis; None: the compiler decides.
      **options: of `nnx.Conv`.
    """

    def __init__(self, *arguments: Any, reduce_over: Mesh | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.reduce_over = reduce_over

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `(N, ..., in)`."""
        return super().__call__(inputs) if self.reduce_over is None else _by_device(self, inputs, self.reduce_over)


class Linear(nnx.Linear):
    """`nnx.Linear` on a batch; arguments as for `Conv`."""

    def __init__(self, *arguments: Any, reduce_over: Mesh | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.reduce_over = reduce_over

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `(N, in)` to `(N, out)`."""
        return super().__call__(inputs) if self.reduce_over is None else _by_device(self, inputs, self.reduce_over)


def _by_device(layer: Layer, inputs: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns the outputs of a layer, of which each device computes its own rows with its own copy of the layer."""
    graphdef, parameters = nnx.split(layer)
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def compute(parameters: nnx.State[Any, Any], inputs: jax.Array) -> jax.Array:
        copies = jax.tree.map(lambda p: jax.lax.pcast(p, mesh.axis_names, to="varying"), parameters)
        own = nnx.merge(graphdef, copies)
        own.reduce_over = None
        return own(inputs)

    return jax.shard_map(compute, mesh=mesh, in_specs=(whole, rows), out_specs=rows)(parameters, inputs)
