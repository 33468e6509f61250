"""Estimates the least device memory that a training run needs, before anything is compiled.

The estimate is a lower bound, so that a run that fits is never refused: the state, the gradient, and for each image on
the device the data that the backward pass reads, the inputs and outputs of all convolutions, in the compute dtype.
According to XLA (`compiled.memory_analysis()`, arguments and temporaries, one CPU device, float32) a step takes more:

    network, stem             image  batch      K   estimate      XLA   ratio   with oneDNN
    resnet8, small_stride2       32     64   2048      18 MB    30 MB    0.59          0.69
    resnet8, small_stride2       32    512   2048     123 MB   212 MB    0.58          0.68
    resnet18, small_stride2      64     32   4096     397 MB   555 MB    0.72          0.94
    resnet18, small_stride2      64    128   4096    1029 MB  1626 MB    0.63          0.83
    resnet18, small              32    128   4096    1022 MB  1629 MB    0.63          0.83
    resnet50, imagenet           64     32  65536     777 MB   908 MB    0.86          0.87
    resnet50, imagenet          128     32   4096    1630 MB  2023 MB    0.81          0.82
    resnext50_32x4d, imagenet    64     32   4096     833 MB   906 MB    0.92          0.94

(In float64 with more than 64 channels, where kernel gradients need no shifted copies, the ratio is 0.8 to 0.9.)
On an accelerator XLA recomputes values that would not fit, so the estimate counts fewer there (`_HELD_ELSEWHERE`): 1.7
GiB a chip for the recipe for 64 TPU chips, where the compiler plans 4.2 (docs/pods.md).
"""

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core  # for the types of traced programs, which nothing stable gives

from ifm_jax import assembly
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.models import Encoder

# The least share of the convolutions' inputs and outputs that a step holds. The CPU compiler keeps all of them, and as
# much again of the values between, fewer with oneDNN, which needs no shifted copies; an accelerator's may keep one of
# the two and recompute the other.
_HELD_ON_CPU = {"xla": 1.4, "onednn": 1.2}
_HELD_ELSEWHERE = 0.5
# The table of learning rates while it is computed: a few float64 arrays with one number per step.
_RATES_BYTES = 48
_INT32 = 2**31 - 1


def of_machine() -> int | None:
    """Returns the bytes of this machine's memory, or None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # another kind of system
        return None


def of_device(mesh: jax.sharding.Mesh) -> int | None:
    """Returns the bytes of memory of a local device in the mesh; for a CPU, its share of the machine's memory.

    Returns:
      None if it is unknown.
    """
    devices = mesh.local_mesh.devices.flat
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu" and (machine := of_machine()) is not None:
        return machine // len(devices)
    return limit


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Checks all that can be checked before the images are opened, above all that a run can fit in its devices' memory.

    Args:
      config: validated and resolved config.
      mesh: mesh of the devices.

    Raises:
      UsageError: if the least memory it needs is more than there is.
    """
    size, source, machine = config.data.image_size, configs.random_bits(config.data)[1], of_machine()
    if drawn := configs.drawn_source(config.data):  # their number is known before they are drawn
        needs = drawn.train_size * size * size * 3
        if machine is not None and needs > machine:
            raise UsageError(
                f"data.{source}.train_size={drawn.train_size}: images of {size} px need {needs / 1e9:.0f} GB, and "
                f"this machine has {machine / 1e9:.1f} GB: expected fewer images"
            )
        check_steps(config, min(config.data.limit or drawn.train_size, drawn.train_size) // config.batch_size)
    has = of_device(mesh)
    if has is None:
        return
    state, images = estimate(config, mesh)
    if state + images > has:
        raise UsageError(
            f"batch_size={config.batch_size}, data.image_size={size}: a step of {config.model.arch} needs at least "
            f"{(state + images) / 1e9:.1f} GB on each device ({state / 1e9:.1f} for weights, optimizer and queue, "
            f"{images / 1e9:.1f} for {config.batch_size // mesh.size} images), which has {has / 1e9:.1f} GB: use a "
            "smaller batch_size, data.image_size or network, or a smaller recipe: --config=trifeature"
        )


def check_steps(config: Config, epoch_steps: int) -> None:
    """Checks that the steps of a run can be counted and that their learning rates fit in memory.

    Args:
      config: validated config.
      epoch_steps: updates in an epoch.

    Raises:
      UsageError: if there are too many steps.
    """
    steps, machine = config.epochs * epoch_steps, of_machine()
    most = _INT32 if machine is None else min(_INT32, machine // _RATES_BYTES)
    if steps > most:
        raise UsageError(
            f"epochs={config.epochs} of {epoch_steps} steps are {steps} updates: expected at most {most}; use "
            "fewer epochs, or a larger batch_size"
        )


def estimate(config: Config, mesh: jax.sharding.Mesh, held: float | None = None) -> tuple[int, int]:
    """Returns the least bytes that a step needs on one device: for state and gradient, and for its images.

    Args:
      config: validated and resolved config.
      mesh: mesh of the devices.
      held: share of the convolutions' inputs and outputs that a step holds; None: the least on these devices.
    """
    encoder = assembly.make_encoder(config)
    params, batch_stats = _variables(encoder)
    opt_state = jax.eval_shape(assembly.make_optimizer(config).init, params)
    method = assembly.make_method(config, mesh)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    memory = jax.eval_shape(method.start, rng, params, batch_stats)
    carried = jax.tree.map(
        lambda placement, part: sum(
            math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)
        ),
        method.placements(mesh),
        memory,
    )
    # The network, its gradient, and the method's memory.
    state = 2 * _bytes(params) + _bytes(batch_stats) + _bytes(opt_state) + sum(carried)
    if held is None:
        cpu = mesh.devices.flat[0].platform == "cpu"
        held = _HELD_ON_CPU[config.model.cpu_convolutions] if cpu else _HELD_ELSEWHERE
    images = held * _bytes_per_image(encoder, config.data.image_size) * (config.batch_size // mesh.size)
    images *= method.trained_views
    return state, int(images)


@functools.cache
def _variables(encoder: Encoder):
    """Returns the shapes of the encoder's parameters and statistics."""
    return jax.eval_shape(encoder.init, jax.eval_shape(lambda: jax.random.key(0)))


@functools.cache
def _bytes_per_image(encoder: Encoder, size: int) -> float:
    """Returns the bytes of the inputs and outputs of all convolutions, each counted once, for one image."""
    batch = 2 * encoder.bn_groups
    images = jax.ShapeDtypeStruct((batch, size, size, encoder.in_channels), jnp.dtype(encoder.param_dtype))
    traced = jax.make_jaxpr(lambda *args: encoder(*args, train=True)[0])(*_variables(encoder), images)
    held = {id(var): var.aval for var in _convolved(traced.jaxpr)}
    return sum(aval.size * aval.dtype.itemsize for aval in held.values()) / batch


def _convolved(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Yields the input and the output of each convolution."""
    for equation in jaxpr.eqns:
        if _has_convolution(equation):
            yield equation.invars[0]
            yield equation.outvars[0]


def _has_convolution(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a convolution, in any form (`models.convolution`)."""
    if equation.primitive.name == "conv_general_dilated":
        return True
    inner = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)
    )
    inner = [getattr(each, "jaxpr", each) for each in inner if isinstance(each, core.ClosedJaxpr | core.Jaxpr)]
    return any(_has_convolution(each) for jaxpr in inner for each in jaxpr.eqns)


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
