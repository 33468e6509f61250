"""Max-pooling whose gradient on a GPU needs the place of each maximum only, not the map."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import platforms

_SIDE, _STRIDE, _PAD = 3, 2, 1  # of the window, as in ResNet's stem

_Saved = tuple[jax.Array, jax.Array]  # input and places; the platform uses one of them


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum over 3x3 windows with stride 2, padded by one on every side.

    The gradient of a window goes to the first of its maxima, row by row, as in PyTorch. On a GPU the forward pass keeps
    the number of this first maximum, one byte for a window; elsewhere the backward pass searches the map again (see
    `platforms`). Forward-mode differentiation is not defined.

    Args:
      x: `(N, H, W, C)` floats.

    Returns:
      `(N, ceil(H / 2), ceil(W / 2), C)`, dtype of `x`.
    """
    return _maxima(x)


def _maxima(x: jax.Array) -> jax.Array:
    low = np.asarray(-np.inf, x.dtype)  # of NumPy: JAX differentiates the maximum only if it sees the constant
    window, strides = (1, _SIDE, _SIDE, 1), (1, _STRIDE, _STRIDE, 1)
    return jax.lax.reduce_window(x, low, jax.lax.max, window, strides, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))


def _forward(x: jax.Array) -> tuple[jax.Array, _Saved]:
    # The part that a platform does not use is a constant there, which takes no memory in a compiled program.
    y, kept, places = platforms.select(x, gpu=_forward_by_place, default=_forward_by_search)
    return y, (kept, places)


def _backward(saved: _Saved, gradient: jax.Array) -> tuple[jax.Array]:
    return (platforms.select(*saved, gradient, gpu=_backward_by_place, default=_backward_by_search),)


max_pool.defvjp(_forward, _backward)


def _forward_by_search(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    y = _maxima(x)
    return y, x, jnp.zeros(y.shape, jnp.uint8)


def _backward_by_search(x: jax.Array, places: jax.Array, gradient: jax.Array) -> jax.Array:
    return jax.vjp(_maxima, x)[1](gradient)[0]


def _forward_by_place(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the maxima, zeros in place of the input, and which tap of its window each maximum is, 0 to 8."""
    height, width = ((size - 1) // _STRIDE + 1 for size in x.shape[1:3])
    around = ((0, 0, 0), (_PAD, _PAD, 0), (_PAD, _PAD, 0), (0, 0, 0))
    padded = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), around)
    y = places = None
    for number, (i, j) in _taps():
        rows, columns = (slice(tap, tap + (size - 1) * _STRIDE + 1, _STRIDE) for tap, size in ((i, height), (j, width)))
        value = padded[:, rows, columns]
        if y is None or places is None:
            y, places = value, jnp.zeros(value.shape, jnp.uint8)
            continue
        places = jnp.where(value > y, jnp.uint8(number), places)
        y = jnp.maximum(y, value)
    assert y is not None
    assert places is not None
    return y, jnp.zeros_like(x), places


def _backward_by_place(zeros: jax.Array, places: jax.Array, gradient: jax.Array) -> jax.Array:
    """Sums over the taps: each window's gradient, spread to the place in the map of its first maximum."""
    dtype = np.promote_types(gradient.dtype, jnp.float32)
    gradient, zero = gradient.astype(dtype), jnp.zeros((), dtype)
    total = zero
    for number, tap in _taps():
        chosen = jnp.where(places == number, gradient, zero)
        around = [
            (at - _PAD, size + _PAD - at - ((outputs - 1) * _STRIDE + 1), _STRIDE - 1)
            for at, size, outputs in zip(tap, zeros.shape[1:3], places.shape[1:3], strict=True)
        ]
        total = total + jax.lax.pad(chosen, zero, [(0, 0, 0), *around, (0, 0, 0)])
    return total.astype(zeros.dtype)


def _taps() -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields the number and the row and column of every place in a window."""
    return enumerate(itertools.product(range(_SIDE), range(_SIDE)))
