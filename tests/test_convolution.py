"""The convolution and its gradients against XLA's own and PyTorch's, on the shapes that are computed otherwise."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from ifm_jax.models import convolution

LAYOUT = ("NHWC", "HWIO", "NHWC")
N = 8
# (height, width), input and output channels, kernel, stride, and groups if there are some: one for each choice, and the
# edges of the small maps.
SHAPES = [
    ((1, 1), 6, 5, 3, 1),
    ((2, 2), 6, 5, 3, 1),
    ((2, 2), 6, 5, 3, 2),
    ((4, 3), 6, 5, 3, 2),
    ((5, 7), 128, 129, 3, 1),
    ((13, 14), 128, 129, 3, 2),
    ((6, 5), 8, 9, 1, 2),
    ((18, 21), 3, 6, 7, 2),
    ((9, 8), 6, 5, 3, 1),
    ((9, 8), 6, 5, 3, 2),
    ((8, 9), 3, 5, 5, 2),
    ((9, 8), 3, 5, 3, 1),
    ((3, 7), 6, 5, 7, 1),
    ((11, 8), 6, 5, 5, 3),
    ((13, 10), 6, 5, 3, 4),
    ((9, 9), 70, 5, 3, 2),
    ((9, 8), 6, 5, 1, 1),
    ((9, 8), 12, 24, 3, 1, 3),
    ((9, 8), 96, 48, 3, 2, 12),
    ((2, 2), 80, 40, 3, 1, 2),
]


def arguments(shape, dtype):
    """Input, kernel and gradient of the output; the options of `conv_general_dilated`."""
    (height, width), features, out_features, kernel, stride, *rest = shape
    groups = rest[0] if rest else 1
    random = np.random.default_rng(0)
    x = random.normal(size=(N, height, width, features))
    weights = random.normal(size=(kernel, kernel, features // groups, out_features))
    pad = (kernel - 1) // 2
    sizes = [(size + 2 * pad - kernel) // stride + 1 for size in (height, width)]
    gradient = random.normal(size=(N, *sizes, out_features))
    options = {"window_strides": (stride, stride), "padding": ((pad, pad), (pad, pad)), "dimension_numbers": LAYOUT}
    return [jnp.asarray(v, dtype) for v in (x, weights, gradient)], options | {"feature_group_count": groups}


def all_three(function, options):
    """Output, input gradient and kernel gradient of a convolution."""

    def run(x, kernel, gradient):
        y, pull = jax.vjp(lambda x, k: function(x, k, **options), x, kernel)
        return y, *pull(gradient)

    return run


def exact(shape, dtype):
    """What `all_three` should find: XLA's in float64 on the values as `dtype` has them, then rounded to it."""
    values, options = arguments(shape, dtype)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(v, np.float64)) for v in values]
        found = jax.jit(all_three(jax.lax.conv_general_dilated, options))(*wide)
        return [v.astype(dtype) for v in found]


def assert_equal(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_xla_and_torch_in_float64(shape):
    with jax.enable_x64(True):
        (x, kernel, gradient), options = arguments(shape, jnp.float64)
        ours = jax.jit(all_three(convolution.conv_general_dilated, options))(x, kernel, gradient)
        assert_equal(ours, exact(shape, jnp.float64), 1e-13)

        images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), requires_grad=True)
        weights = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1), requires_grad=True)
        stride, pad, groups = options["window_strides"], options["padding"][0][0], options["feature_group_count"]
        y = torch.nn.functional.conv2d(images, weights, stride=stride, padding=pad, groups=groups)
        y.backward(torch.tensor(np.asarray(gradient).transpose(0, 3, 1, 2)))
        theirs = (
            y.detach().numpy().transpose(0, 2, 3, 1),
            images.grad.numpy().transpose(0, 2, 3, 1),
            weights.grad.numpy().transpose(2, 3, 1, 0),
        )
        assert_equal(ours, theirs, 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_sums_are_rounded_once(dtype, tolerance):
    """Against float64 on the same values: no more than the rounding of the result, half a unit in bfloat16."""
    values, options = arguments(SHAPES[4], dtype)
    ours = jax.jit(all_three(convolution.conv_general_dilated, options))(*values)
    assert_equal(ours, exact(SHAPES[4], dtype), tolerance)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 5, 7, 8, 9, 16, 17)], ids=str)
def test_each_device_convolves_its_own_images(shape):
    (x, kernel, gradient), options = arguments(shape, jnp.float32)
    mesh = jax.make_mesh((8,), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(
        all_three(convolution.conv_general_dilated, options),
        in_shardings=(split, whole, split),
        out_shardings=(split, split, whole),
    )
    program = run.lower(x, kernel, gradient).compile().as_text()
    assert "all-reduce" in program
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in program


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (8, 9, 10, 17, 18)], ids=str)
def test_axes_are_in_the_order_of_the_library(shape):
    """XLA reorders the axes of a gradient only outside of loops; in another order it is computed by a plain loop."""
    (x, kernel, gradient), options = arguments(shape, jnp.float32)
    run = jax.jit(all_three(convolution.conv_general_dilated, options))
    text = run.lower(x, kernel, gradient).as_text()
    orders = set(re.findall(r"dim_numbers = (.*?), window", text))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_platforms_get_xlas_convolutions(shape):
    """Lowered for a TPU, here, where there is none, the program is that of `jax.lax.conv_general_dilated`."""
    (x, kernel, gradient), options = arguments(shape, jnp.float32)
    counts = []
    for function in (convolution.conv_general_dilated, jax.lax.conv_general_dilated):
        run = jax.jit(all_three(function, options))
        text = run.trace(x, kernel, gradient).lower(lowering_platforms=("tpu",)).as_text()
        counts.append([text.count(f"stablehlo.{name}") for name in ("convolution(", "dot_general", "slice", "pad")])
    assert counts[0] == counts[1]
    assert counts[0][0] == 3


def test_dilations_are_xlas():
    (x, kernel, _), options = arguments(((2, 2), 6, 4, 3, 1), jnp.float32)
    options |= {"rhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}
    ours = convolution.conv_general_dilated(x, kernel, **options)
    np.testing.assert_array_equal(ours, jax.lax.conv_general_dilated(x, kernel, **options))
