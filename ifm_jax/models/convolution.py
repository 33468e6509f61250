"""Two-dimensional convolution that is fast on CPUs too.

On CPUs XLA passes a convolution to a library if the library supports it, and runs a plain loop otherwise. That loop, up
to a hundred times slower, computes a 3x3 kernel on a 2x2 map, the input gradient of a strided convolution that ends in
one, and the kernel gradient of the 7x7 stem: a ResNet-18 on images of 64 px spends nine tenths of a step in it. Here
such a convolution is a sum of matrix products, one for each tap of the kernel (one of its k_h * k_w positions), only
over the output positions for which the tap lies within the map. On small maps that is also less work, since nothing is
multiplied with padding. The gradient of most kernels is one matrix product of shifted copies, which suits XLA better
than a convolution whose window is a whole map. A 1x1 kernel is one product, and the many small groups of a ResNeXt are
computed some at a time. docs/benchmarks.md has the figures.

The form of each of the three computations (the convolution and its two gradients) depends on its shape, as measured,
and on the platform for which the program is *compiled*: except on CPUs it is XLA's convolution, forward and backward.

With oneDNN (`onednn`) most convolutions take half to three quarters of the time; small maps stay matrix products.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import platforms
from ifm_jax.models import onednn

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_BLOCK = 32  # channels of groups that are computed together: the fastest of 32, 64, 128 (AVX-512)

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
      **options: options of `jax.lax.conv_general_dilated`; with dilations or anything but groups that changes the
        computation, XLA computes all of it.

    Returns:
      `(N, H', W', C_out)`, dtype of `x`.
    """
    return _convolve(x, kernel, window_strides, padding, options, with_onednn=False)


def conv_general_dilated_onednn(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """`conv_general_dilated` that calls oneDNN on a CPU, where `onednn.supports` it; for programs for one CPU device.

    On other platforms, in float64, or where oneDNN is not installed it is `conv_general_dilated`.
    """
    return _convolve(x, kernel, window_strides, padding, options, with_onednn=True)


ON_CPU = {"xla": conv_general_dilated, "onednn": conv_general_dilated_onednn}


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: dict[str, Any],
    *,
    with_onednn: bool,
) -> jax.Array:
    strides, padding = tuple(window_strides), tuple((low, high) for low, high in padding)
    if _is_plain(options):
        return _convolution(x, kernel, strides, padding, options.get("feature_group_count", 1), with_onednn)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether no option but the layout and the groups differs from its default."""
    ones = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
    free = ("dimension_numbers", "feature_group_count")
    return all(name in free or value is None or value == ones.get(name) for name, value in options.items())


_Saved = tuple[jax.Array, jax.Array]  # input and kernel
_Form = Literal["convolution", "onednn", "taps", "rows", "shifts", "blocks"]


class _Choice(NamedTuple):
    """The form of each of the three computations on a CPU; "convolution" is XLA's."""

    output: _Form
    input_gradient: _Form
    kernel_gradient: _Form


def _choose(x: Shape, kernel: Shape, strides: Shape, padding: Padding, groups: int, wide: bool) -> _Choice:
    """Chooses by shape: taps as measured with AVX2, the rest with AVX-512, in float32; `wide`: float64."""
    if groups > 1:  # XLA's kernel gradient takes seconds
        return _Choice("blocks", "blocks", "blocks")
    if kernel[:2] == (1, 1):
        # One matrix product: up to twice as fast, the kernel's gradient 2 to 10 times.
        return _Choice("taps", "taps", "taps")
    side, strided = max(_output_sizes(x, kernel, strides, padding)), max(strides) > 1
    if _is_tiny(side):
        return _Choice("taps", "taps", "convolution")  # 20 to 120 times faster; XLA's kernel gradient is good here
    # 1.5 to 3 times faster. On a 4x4 map the gain does not justify compiling nine products.
    taps = 5 <= side <= 7 and min(kernel[2:]) >= 128
    # In float64 the library has no input gradient of a strided convolution. 7 to 12 times faster (AVX-512).
    input_by_taps = taps or (wide and strided and kernel[2] > 4)
    return _Choice(
        "taps" if taps else "convolution",
        "taps" if input_by_taps else "convolution",
        _choose_kernel_gradient(kernel, taps, wide),
    )


def _is_tiny(side: int) -> bool:
    """Whether most of a 3x3 kernel lies beyond the map, so that its taps one by one are the least work."""
    return side <= 2


def _choose_kernel_gradient(kernel: Shape, taps: bool, wide: bool) -> _Form:
    """Chooses for a kernel of more than one tap on a map of more than 2x2; `taps`: whether the others are by taps."""
    if kernel[2] <= 3:  # of an image: 1.6 to 2 times faster but with a 5x5 kernel
        return "convolution" if kernel[0] == 5 else "rows"
    if wide and kernel[2] > 64:
        return "taps" if taps else "convolution"
    # As fast to 2.9 times faster: XLA's uses the output map as its window, which does not suit the library.
    return "shifts"


def _choose_with_onednn(x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding, groups: int) -> _Choice:
    """Chooses oneDNN where it has the computation, but for matrix products that are as fast or faster."""
    choice = _choose(x.shape, kernel.shape, strides, padding, groups, _is_wide(x))
    if choice.output == "taps" and kernel.shape[:2] != (1, 1):
        return choice
    better = ("kernel_gradient",) if choice.output == "taps" else onednn.COMPUTATIONS
    forms = choice._asdict()
    for computation in better:
        if onednn.supports(_problem(computation, x, kernel, strides, padding, groups)):
            forms[computation] = "onednn"
    return _Choice(**forms)


def _problem(
    computation: onednn.Computation,
    x: jax.Array,
    kernel: jax.Array,
    strides: Shape,
    padding: Padding,
    groups: int = 1,
) -> onednn.Problem:
    output = (x.shape[0], *_output_sizes(x.shape, kernel.shape, strides, padding), kernel.shape[3])
    return onednn.Problem(computation, x.dtype.name, x.shape, kernel.shape, output, strides, padding, groups)


def _is_wide(x: jax.Array) -> bool:
    return x.dtype == jnp.float64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _convolution(
    x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding, groups: int, with_onednn: bool
) -> jax.Array:
    """Computes the convolution, with each computation in the form that is chosen for it."""
    form = _forms(x, kernel, strides, padding, groups, with_onednn).output
    options = _options(strides, padding, groups)
    if form == "convolution":
        return _output(x, kernel, **options)
    return _on_cpu(_OUTPUTS[form], _output, x, kernel, **options)


def _forms(
    x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding, groups: int, with_onednn: bool
) -> _Choice:
    if with_onednn:
        return _choose_with_onednn(x, kernel, strides, padding, groups)
    return _choose(x.shape, kernel.shape, strides, padding, groups, _is_wide(x))


def _options(strides: Shape, padding: Padding, groups: int) -> dict[str, Any]:
    """Returns the options of a form; few of them know groups."""
    return {"strides": strides, "padding": padding} | ({"groups": groups} if groups > 1 else {})


def _forward(
    x: jax.Array, kernel: jax.Array, strides: Shape, padding: Padding, groups: int, with_onednn: bool
) -> tuple[jax.Array, _Saved]:
    return _convolution(x, kernel, strides, padding, groups, with_onednn), (x, kernel)


def _backward(
    strides: Shape, padding: Padding, groups: int, with_onednn: bool, saved: _Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    forms = _forms(x, kernel, strides, padding, groups, with_onednn)
    of_input, of_kernel = _INPUT_GRADIENTS[forms.input_gradient], _KERNEL_GRADIENTS[forms.kernel_gradient]
    options = _options(strides, padding, groups)
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


def _output(x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


def _input_gradient(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(lambda x: _output(x, kernel, **options), x)[1](gradient)[0]


def _kernel_gradient(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(lambda kernel: _output(x, kernel, **options), kernel)[1](gradient)[0]


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


def _output_by_blocks(x: jax.Array, kernel: jax.Array, *, strides: Shape, padding: Padding, groups: int) -> jax.Array:
    """Computes some groups together, as one convolution whose kernel is zero between different groups.

    A group of ResNeXt has 4 to 64 channels, which alone are too few for the processor.
    """
    per_group = max(kernel.shape[2], kernel.shape[3] // groups)
    together = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * per_group <= _BLOCK))
    blocks = groups // together
    k_h, k_w, c_in, c_out = kernel.shape
    parts = kernel.reshape(k_h, k_w, c_in, blocks, together, c_out // groups)
    same = jnp.eye(together, dtype=kernel.dtype)
    kernels = jnp.einsum("hwibgo,fg->bhwfigo", parts, same).reshape(blocks, k_h, k_w, together * c_in, c_out // blocks)
    images = jnp.moveaxis(x.reshape(*x.shape[:3], blocks, -1), 3, 0)
    found = jax.lax.map(lambda one: _convolution(*one, strides, padding, 1, False), (images, kernels))
    return jnp.moveaxis(found, 0, 3).reshape(*found.shape[1:4], c_out)


def _input_gradient_by_blocks(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(lambda x: _output_by_blocks(x, kernel, **options), x)[1](gradient)[0]


def _kernel_gradient_by_blocks(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(lambda kernel: _output_by_blocks(x, kernel, **options), kernel)[1](gradient)[0]


def _output_by_onednn(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return onednn.compute(_problem("output", x, kernel, **options), x, kernel)


def _input_gradient_by_onednn(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return onednn.compute(_problem("input_gradient", x, kernel, **options), gradient, kernel)


def _kernel_gradient_by_onednn(gradient: jax.Array, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return onednn.compute(_problem("kernel_gradient", x, kernel, **options), gradient, x)


_OUTPUTS = {"taps": _output_by_taps, "blocks": _output_by_blocks, "onednn": _output_by_onednn}
_INPUT_GRADIENTS = {
    "convolution": _input_gradient_in_order,
    "taps": _input_gradient_by_taps,
    "blocks": _input_gradient_by_blocks,
    "onednn": _input_gradient_by_onednn,
}
_KERNEL_GRADIENTS = {
    "convolution": _kernel_gradient_in_order,
    "taps": _kernel_gradient_by_taps,
    "rows": _kernel_gradient_by_rows,
    "shifts": _kernel_gradient_by_shifts,
    "blocks": _kernel_gradient_by_blocks,
    "onednn": _kernel_gradient_by_onednn,
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
