"""Two-dimensional convolution that is fast on CPUs too.

On CPUs XLA passes a convolution to a library if the library supports it, and runs a plain loop otherwise. That loop, up
to a hundred times slower, computes a 3x3 kernel on a 2x2 map, the input gradient of a strided convolution that ends in
one, and the kernel gradient of the 7x7 stem: a ResNet-18 on images of 64 px spends nine tenths of a step in it. Here
such a convolution is a sum of matrix products, one for each tap of the kernel (one of its k_h * k_w positions), only
over the output positions for which the tap lies within the map. On small maps that is also less work, since nothing is
multiplied with padding. The gradient of most kernels is one matrix product of shifted copies, which suits XLA better
than a convolution whose window is a whole map. docs/benchmarks.md has the figures.

The form of each of the three computations (the convolution and its two gradients) depends on its shape, as measured,
and on the platform for which the program is *compiled*: except on CPUs it is XLA's convolution, forward and backward.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import platforms

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for `nnx.Conv`, which passes NHWC images and HWIO kernels.

    Forward-mode differentiation is not defined.

    Args:
      x: `(N, H, W, C_in)`.
      kernel: `(k_h, k_w, C_in / groups, C_out)`, dtype of `x`.
      window_strides: strides along height and width.
      padding: zeros before and after, for height and width.
      **options: options of `jax.lax.conv_general_dilated`; with groups, dilations or anything else that changes the
        computation, XLA computes all of it.

    Returns:
      `(N, H', W', C_out)`, dtype of `x`.
    """
    strides, padding = tuple(window_strides), tuple((low, high) for low, high in padding)
    if _is_plain(options):
        return _convolution(x, kernel, strides, padding)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether no option but the layout differs from its default."""
    ones = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    return all(
        name == "dimension_numbers" or value is None or value == ones.get(name) for name, value in options.items()
    )


_Saved = tuple[jax.Array, jax.Array]  # input and kernel


class _Choice(NamedTuple):
    """Tells which of the three computations are matrix products on a CPU instead of XLA's convolution."""

    output: bool
    input_gradient: bool
    kernel_gradient: Literal["convolution", "taps", "rows", "shifts"]


def _choose(x: Shape, kernel: Shape, strides: Shape, padding: Padding, wide: bool) -> _Choice:
    """Chooses by shape: taps as measured with AVX2, kernel gradients with AVX-512, in float32; `wide`: float64."""
    side, strided = max(_output_sizes(x, kernel, strides, padding)), max(strides) > 1
    if kernel[:2] == (1, 1):
        # A plain matrix product except for the stride, which slows only the kernel's gradient: 3 to 7 times.
        return _Choice(False, wide and strided, "taps" if strided else "convolution")
    if side <= 2:
        return _Choice(True, True, "convolution")  # 20 to 120 times faster; XLA's kernel gradient is good here
    # 1.5 to 3 times faster. On a 4x4 map the gain does not justify compiling nine products.
    taps = 5 <= side <= 7 and min(kernel[2:]) >= 128
    # In float64 the library has no input gradient of a strided convolution. 7 to 12 times faster (AVX-512).
    input_gradient = taps or (wide and strided and kernel[2] > 4)
    return _Choice(taps, input_gradient, _choose_kernel_gradient(kernel, taps, wide))


def _choose_kernel_gradient(kernel: Shape, taps: bool, wide: bool) -> Literal["convolution", "taps", "rows", "shifts"]:
    """Chooses for a kernel of more than one tap on a map of more than 2x2; `taps`: whether the others are by taps."""
    if kernel[2] <= 3:  # of an image: 1.6 to 2 times faster but with a 5x5 kernel
        return "convolution" if kernel[0] == 5 else "rows"
    if wide and kernel[2] > 64:
        return "taps" if taps else "convolution"
    # As fast to 2.9 times faster: XLA's uses the output map as its window, which does not suit the library.
    return "shifts"


def _is_wide(x: jax.Array) -> bool:
    return x.dtype == jnp.float64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding) -> jax.Array:
    """Computes the convolution, with each computation in the form that `_choose` picks."""
    if not _choose(x.shape, kernel.shape, strides, padding, _is_wide(x)).output:
        return _output(x, kernel, strides=strides, padding=padding)
    return _on_cpu(_output_by_taps, _output, x, kernel, strides=strides, padding=padding)


def _forward(x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding) -> tuple[jax.Array, _Saved]:
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides: Shape, padding: Padding, saved: _Saved, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    choice = _choose(x.shape, kernel.shape, strides, padding, _is_wide(x))
    of_input = _input_gradient_by_taps if choice.input_gradient else _input_gradient_in_order
    of_kernel = _KERNEL_GRADIENTS[choice.kernel_gradient]
    options = {"strides": strides, "padding": padding}
    return (
        _on_cpu(of_input, _input_gradient, gradient, x, kernel, **options),
        _on_cpu(of_kernel, _kernel_gradient, gradient, x, kernel, **options),
    )


_convolution.defvjp(_forward, _backward)


def _on_cpu(
    special: Callable[..., jax.Array], general: Callable[..., jax.Array], *operands: jax.Array, **options: Any
) -> jax.Array:
    """Returns `special`'s result if the program is compiled for a CPU, else `general`'s."""
    return platforms.select(
        *operands, cpu=functools.partial(special, **options), default=functools.partial(general, **options)
    )


def _output(x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _input_gradient(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    return jax.vjp(lambda x: _output(x, kernel, strides=strides, padding=padding), x)[1](gradient)[0]


def _kernel_gradient(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    return jax.vjp(lambda kernel: _output(x, kernel, strides=strides, padding=padding), kernel)[1](gradient)[0]


def _input_gradient_in_order(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    """Convolves the gradient, with zeros between its values if there is a stride, with the flipped kernel."""
    around = []
    for axis in range(2):
        before = kernel.shape[axis] - 1 - padding[axis][0]
        dilated = (gradient.shape[1 + axis] - 1) * strides[axis] + 1
        around.append((before, x.shape[1 + axis] + kernel.shape[axis] - 1 - dilated - before))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return jax.lax.conv_general_dilated(
        gradient, turned, (1, 1), around, lhs_dilation=strides, dimension_numbers=_LAYOUT
    )


def _kernel_gradient_in_order(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    """Convolves the input with the gradient, with channels and images swapped."""
    around = []
    for axis in range(2):
        dilated = (gradient.shape[1 + axis] - 1) * strides[axis] + 1
        before = padding[axis][0]
        around.append((before, kernel.shape[axis] - 1 + dilated - x.shape[1 + axis] - before))
    found = jax.lax.conv_general_dilated(
        *(x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), (1, 1), around),
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
    )
    return found.transpose(1, 2, 0, 3)


def _output_by_taps(x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding) -> jax.Array:
    height, width = _output_sizes(x.shape, kernel.shape, strides, padding)
    total = jnp.zeros((), _sum_dtype(x))
    for i, rows in _taps(x.shape[1], height, kernel.shape[0], strides[0], padding[0][0]):
        for j, columns in _taps(x.shape[2], width, kernel.shape[1], strides[1], padding[1][0]):
            product = _contract(x[:, rows.inputs, columns.inputs], kernel[i, j], ((3,), (0,)))
            total = total + _place(product, (rows.outputs, columns.outputs), (height, width))
    return total.astype(x.dtype)


def _input_gradient_by_taps(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    total = jnp.zeros((), _sum_dtype(x))
    for i, rows in _taps(x.shape[1], gradient.shape[1], kernel.shape[0], strides[0], padding[0][0]):
        for j, columns in _taps(x.shape[2], gradient.shape[2], kernel.shape[1], strides[1], padding[1][0]):
            product = _contract(gradient[:, rows.outputs, columns.outputs], kernel[i, j], ((3,), (1,)))
            total = total + _place(product, (rows.inputs, columns.inputs), x.shape[1:3])
    return total.astype(x.dtype)


def _kernel_gradient_by_taps(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    # A tap that never lies within the map has no gradient.
    taps = [[jnp.zeros(kernel.shape[2:], _sum_dtype(x))] * kernel.shape[1] for _ in range(kernel.shape[0])]
    for i, rows in _taps(x.shape[1], gradient.shape[1], kernel.shape[0], strides[0], padding[0][0]):
        for j, columns in _taps(x.shape[2], gradient.shape[2], kernel.shape[1], strides[1], padding[1][0]):
            inputs = x[:, rows.inputs, columns.inputs]
            taps[i][j] = _contract(inputs, gradient[:, rows.outputs, columns.outputs], ((0, 1, 2), (0, 1, 2)))
    return jnp.stack([jnp.stack(row) for row in taps]).astype(kernel.dtype)


def _kernel_gradient_by_rows(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    """Computes the taps of a kernel's row as one matrix product: with few channels, one tap's would be too narrow."""
    columns = _columns(x, kernel.shape[1], gradient.shape[2], strides[1], padding[1])
    columns = jnp.pad(columns, ((0, 0), padding[0], (0, 0), (0, 0)))
    last = (gradient.shape[1] - 1) * strides[0]
    rows = [_product(columns[:, i : i + last + 1 : strides[0]], gradient) for i in range(kernel.shape[0])]
    return jnp.stack(rows).reshape(kernel.shape).astype(kernel.dtype)


def _kernel_gradient_by_shifts(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding
) -> jax.Array:
    """Computes all taps as one matrix product, or with a stride one for each phase of it.

    Its left side is the input, shifted along the width once for each column of the kernel; its right side the gradient,
    shifted along the height once for each row. So k_w + k_h copies are made instead of the k_h * k_w of im2col.
    """
    height, features = gradient.shape[1], kernel.shape[3]
    stride, before = strides[0], padding[0][0]
    columns = _columns(x, kernel.shape[1], gradient.shape[2], strides[1], padding[1])
    zero = jnp.zeros((), gradient.dtype)
    rows = [jnp.zeros((columns.shape[-1], features), _sum_dtype(x))] * kernel.shape[0]  # of a tap that meets nothing
    for phase in range(min(stride, kernel.shape[0])):
        # Tap phase + stride * m of output row o meets row phase + stride * (o + m) - before, if the input has that row.
        taps = range(phase, kernel.shape[0], stride)
        first = max(0, -((phase - before) // stride))
        last = min(height + len(taps) - 2, (x.shape[1] - 1 + before - phase) // stride)
        if last < first:
            continue
        start, end = (phase + stride * place - before for place in (first, last))
        shifted = [
            jax.lax.pad(gradient, zero, [(0, 0, 0), (m - first, last + 1 - m - height, 0), (0, 0, 0), (0, 0, 0)])
            for m in range(len(taps))
        ]
        product = _product(columns[:, start : end + 1 : stride], jnp.concatenate(shifted, axis=-1))
        for m, tap in enumerate(taps):
            rows[tap] = product[:, m * features : (m + 1) * features]
    return jnp.stack(rows).reshape(kernel.shape).astype(kernel.dtype)


_KERNEL_GRADIENTS = {
    "convolution": _kernel_gradient_in_order,
    "taps": _kernel_gradient_by_taps,
    "rows": _kernel_gradient_by_rows,
    "shifts": _kernel_gradient_by_shifts,
}


def _columns(x: jax.Array, taps: int, width: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Returns what each column of a kernel sees: `(N, H, W', taps * C)`; rows as they are, not padded."""
    padded = jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0)))
    last = (width - 1) * stride
    return jnp.concatenate([padded[:, :, j : j + last + 1 : stride] for j in range(taps)], axis=-1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the products of `(N, H, W, C_a)` and `(N, H, W, C_b)`, summed over images and positions: `(C_a, C_b)`."""
    return _contract(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), ((0,), (0,)))


class _Overlap(NamedTuple):
    """For one tap and axis: the output positions for which the tap lies in the input, and the inputs it reads."""

    outputs: slice
    inputs: slice


def _taps(size: int, outputs: int, kernel: int, stride: int, before: int) -> Iterator[tuple[int, _Overlap]]:
    """Yields the taps of an axis that reach the input: output o reads input o * stride + tap - before."""
    for tap in range(kernel):
        offset = tap - before
        first = max(0, -(offset // stride))
        last = min(outputs - 1, (size - 1 - offset) // stride)
        if first <= last:
            met = slice(first * stride + offset, last * stride + offset + 1, stride)
            yield tap, _Overlap(slice(first, last + 1, 1), met)


def _place(product: jax.Array, places: tuple[slice, slice], sizes: Sequence[int]) -> jax.Array:
    """Returns zeros `(N, *sizes, C)` with `product` at these positions."""
    between = [(place.start, size - place.stop, place.step - 1) for place, size in zip(places, sizes, strict=True)]
    return jax.lax.pad(product, jnp.zeros((), product.dtype), [(0, 0, 0), *between, (0, 0, 0)])


def _contract(a: jax.Array, b: jax.Array, axes: tuple[Shape, Shape]) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=_sum_dtype(a))


def _sum_dtype(x: jax.Array) -> np.dtype:
    """Returns the dtype of sums, which are rounded to bfloat16 once, at the end, as in a convolution."""
    return np.promote_types(x.dtype, jnp.float32)


def _output_sizes(x: Shape, kernel: Shape, strides: Shape, padding: Padding) -> tuple[int, int]:
    """Returns the height and width of the convolution's result."""
    height, width = (
        (size + sum(pad) - taps) // stride + 1
        for size, pad, taps, stride in zip(x[1:3], padding, kernel[:2], strides, strict=True)
    )
    return height, width
