"""Random views of images, on the device, inside the compiled step: `f(rngs, images) -> images`.

Each operation is a pure function of a batch and of one parameter per example; an augmentation draws the parameters and
combines the operations. An example's draws come from its own key, which derives from the key of the step and the
example's position in the global batch (`example_rngs`), and no operation looks at another example: the views do not
depend on how many devices or hosts share the batch.

Everything is computed in the given `dtype`, by default float32. Random numbers are always drawn in float32, so that
float64, for parity runs, gives the same views.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ifm_jax import platforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Random numbers for each crop: ten areas, ten aspect ratios, the place.
CROP_DRAWS = 22

# ITU-R 601-2 luma, with torchvision's digits.
_LUMA = (0.2989, 0.587, 0.114)


def example_rngs(rng: jax.Array, indices: jax.Array) -> jax.Array:
    """Derives one key per example.

    Args:
      rng: the key of this step and view.
      indices: integers `(N,)`, each example's position in the global batch.

    Returns:
      Typed keys `(N,)`.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, indices)


def random_resized_crop_boxes(
    uniforms: jax.Array,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """Chooses a crop per example, as torchvision's `RandomResizedCrop` does.

    The area and the logarithm of the aspect ratio are uniform. The function uses the first of ten such draws that fits
    in the image, at a uniform position. If none fits, it uses the largest central box whose aspect ratio is in range.
    The one difference: boxes are not rounded to whole pixels.

    Args:
      uniforms: `(N, CROP_DRAWS)` in [0, 1): the draws for ten areas, ten ratios, top and left.
      height: the image's height in pixels.
      width: the image's width in pixels.
      scale: least and greatest area, relative to the image's.
      ratio: least and greatest width over height.

    Returns:
      `(N, 4)` of the dtype of `uniforms`: top, left, height and width in pixels.
    """
    area = (scale[0] + (scale[1] - scale[0]) * uniforms[:, :10]) * (height * width)
    aspect = jnp.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * uniforms[:, 10:20])
    heights, widths = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
    fits = (heights <= height) & (widths <= width)
    first, found = jnp.argmax(fits, axis=1)[:, None], fits.any(axis=1)
    box_height = jnp.where(
        found, jnp.take_along_axis(heights, first, axis=1)[:, 0], jnp.asarray(min(height, width / ratio[0]), area.dtype)
    )
    box_width = jnp.where(
        found, jnp.take_along_axis(widths, first, axis=1)[:, 0], jnp.asarray(min(width, height * ratio[1]), area.dtype)
    )
    top = (height - box_height) * jnp.where(found, uniforms[:, 20], jnp.asarray(0.5, area.dtype))
    left = (width - box_width) * jnp.where(found, uniforms[:, 21], jnp.asarray(0.5, area.dtype))
    return jnp.stack([top, left, box_height, box_width], axis=1)


def crop_matrices(boxes: jax.Array, angles: jax.Array, flips: jax.Array, height: int, width: int) -> jax.Array:
    """Combines crop, rotation and flip into one affine map from the view's pixels to the image's.

    The image is turned about the center of the box, the box is cut out and stretched to `height` x `width`, and the
    result is mirrored. Pixel (0, 0) has its center at (0, 0), and a box of the whole image is the identity.

    Args:
      boxes: `(N, 4)`: top, left, height and width in pixels.
      angles: `(N,)` in radians; positive turns the picture counter-clockwise.
      flips: bool `(N,)`: mirror left and right.
      height: the view's height in pixels.
      width: the view's width in pixels.

    Returns:
      `(N, 2, 3)`: `matrix @ (x, y, 1)` is the position in the image that pixel (x, y) of the view shows.
    """
    top, left, box_height, box_width = boxes.T
    step_x = box_width / width * jnp.where(flips, -1, 1).astype(boxes.dtype)
    step_y = box_height / height
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    # A turn of the picture by +angle looks up each pixel at -angle; y points down.
    linear = jnp.stack([cosine * step_x, -sine * step_y, sine * step_x, cosine * step_y], axis=1).reshape(-1, 2, 2)
    source_center = jnp.stack([left + box_width / 2, top + box_height / 2], axis=1) - 0.5
    view_center = jnp.asarray([(width - 1) / 2, (height - 1) / 2], boxes.dtype)
    shift = source_center - (linear * view_center[None, None, :]).sum(axis=2)
    return jnp.concatenate([linear, shift[:, :, None]], axis=2)


def affine_warp(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Resamples each image under its own affine map: bilinear, with the border repeated outward.

    This is `cv2.warpAffine` with `WARP_INVERSE_MAP`, `INTER_LINEAR` and `BORDER_REPLICATE`, without its rounding.

    Args:
      images: `(N, H, W, C)` of any real type.
      matrices: `(N, 2, 3)`, the maps from the result's pixels (x, y) to the images', in pixels.

    Returns:
      `(N, H, W, C)` of the dtype of `matrices`, in the units of `images`.
    """
    _, height, width, _ = images.shape
    dtype = matrices.dtype
    x = jnp.arange(width, dtype=dtype)[None, None, :]
    y = jnp.arange(height, dtype=dtype)[None, :, None]
    a, b, c, d, e, f = (matrices[:, row, column, None, None] for row in range(2) for column in range(3))
    # Clipped to the outermost pixel centers, beyond which the border repeats.
    source_x = jnp.clip(a * x + b * y + c, 0, width - 1)
    source_y = jnp.clip(d * x + e * y + f, 0, height - 1)
    left, top = source_x.astype(jnp.int32), source_y.astype(jnp.int32)
    right, bottom = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)
    to_right = (source_x - left.astype(dtype))[..., None]
    to_bottom = (source_y - top.astype(dtype))[..., None]

    # Each example reads its own pixels only, so a sharded batch stays where it is.
    @jax.vmap
    def pixels(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return image.at[rows, columns].get(mode="promise_in_bounds").astype(dtype)

    upper = pixels(images, top, left) * (1 - to_right) + pixels(images, top, right) * to_right
    lower = pixels(images, bottom, left) * (1 - to_right) + pixels(images, bottom, right) * to_right
    return upper * (1 - to_bottom) + lower * to_bottom


def resized_crops(images: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Cuts a box out of each image and resizes it to a square, as PIL's `crop` and `resize(..., BILINEAR)` do.

    PIL's filter is a triangle, two pixels of the result wide if it shrinks the image. It runs across, then down, and
    rounds to whole values each time.

    Args:
      images: uint8 `(N, H, W, C)`.
      boxes: float32 `(N, 4)`: top, left, height and width in pixels; they need not be whole ones.
      size: side of the squares in pixels.

    Returns:
      uint8 `(N, size, size, C)`; within 1 of PIL's for boxes of whole pixels.
    """

    def weights(first: jax.Array, length: jax.Array, pixels: int) -> jax.Array:
        """Returns the weight of each image pixel in each pixel of the result, `(N, size, pixels)`."""
        place = jnp.arange(pixels, dtype=jnp.float32)[None, None, :] + 0.5
        first, length = first[:, None, None], length[:, None, None]
        shrink = length / size
        center = first + (jnp.arange(size, dtype=jnp.float32)[None, :, None] + 0.5) * shrink
        triangle = jnp.maximum(1 - jnp.abs(place - center) / jnp.maximum(shrink, 1), 0)
        inside = (place > first) & (place < first + length)  # exclude pixels outside the crop
        triangle = jnp.where(inside, triangle, 0)
        return triangle / jnp.maximum(triangle.sum(axis=2, keepdims=True), 1e-6)

    def product(pattern: str, weights: jax.Array, values: jax.Array) -> jax.Array:
        # Whole values of eight bits need more precision than bfloat16, in which some devices would multiply.
        total = jnp.einsum(pattern, weights, values.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jnp.clip(jnp.floor(total + 0.5), 0, 255)

    _, height, width, _ = images.shape
    top, left, box_height, box_width = boxes.T
    across = product("nvx,nyxc->nyvc", weights(left, box_width, width), images)
    return product("nuy,nyvc->nuvc", weights(top, box_height, height), across).astype(jnp.uint8)


def adjust_brightness(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies each image by its factor, as torchvision does on float images.

    Args:
      images: `(N, H, W, 3)` in [0, 1].
      factors: `(N,)`; 0 gives black, 1 the image.

    Returns:
      `(N, H, W, 3)`, clipped to [0, 1].
    """
    return jnp.clip(images * factors[:, None, None, None], 0, 1)


def adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends each image with the mean of its gray version, as torchvision does on float images.

    Args:
      images: `(N, H, W, 3)` in [0, 1].
      factors: `(N,)`; 0 gives plain gray, 1 the image, more than 1 a stronger contrast.

    Returns:
      `(N, H, W, 3)`, clipped to [0, 1].
    """
    channel_means = images.mean(axis=(1, 2))
    gray = (channel_means * jnp.asarray(_LUMA, images.dtype)[None, :]).sum(axis=1)
    factors, gray = factors[:, None, None, None], gray[:, None, None, None]
    return jnp.clip(factors * images + (1 - factors) * gray, 0, 1)


def adjust_saturation(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends each pixel with its gray, as torchvision does on float images.

    Args:
      images: `(N, H, W, 3)` in [0, 1].
      factors: `(N,)`; 0 gives the gray image, 1 the image, more than 1 stronger colors.

    Returns:
      `(N, H, W, 3)`, clipped to [0, 1].
    """
    factors = factors[:, None, None, None]
    return jnp.clip(factors * images + (1 - factors) * luma(images), 0, 1)


def adjust_hue(images: jax.Array, shifts: jax.Array) -> jax.Array:
    """Turns each pixel's hue in HSV space, as torchvision does on float images.

    Args:
      images: `(N, H, W, 3)` in [0, 1].
      shifts: `(N,)` in turns of the color circle, from -0.5 to 0.5; 0 gives the image.

    Returns:
      `(N, H, W, 3)` in [0, 1].
    """
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    value, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    chroma = value - low
    # Value and chroma stay; the hue, in sixths of a turn from red, moves.
    scale = 1 / jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = hue + 6 * shifts[:, None, None]
    # Each channel is at its maximum over a third of the circle, at zero over another third, and linear in between.
    channels = []
    for height in (0, 2, 4):
        distance = hue - height
        distance = jnp.abs(distance - 6 * jnp.round(distance / 6))
        channels.append(value - chroma * jnp.clip(distance - 1, 0, 1))
    return jnp.stack(channels, axis=-1)


def luma(images: jax.Array) -> jax.Array:
    """Returns the gray of each pixel, `(N, H, W, 1)`, of images `(N, H, W, 3)`."""
    red, green, blue = _LUMA
    return red * images[..., :1] + green * images[..., 1:2] + blue * images[..., 2:]


def color_jitter(images: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast, saturation and hue of each image in its own order, like `ColorJitter`.

    Their numbers are torchvision's: 0 brightness, 1 contrast, 2 saturation, 3 hue.

    Args:
      images: `(N, H, W, 3)` in [0, 1].
      order: integers `(N, 4)`, each row a permutation of 0 to 3, from the first operation to the last.
      factors: `(N, 4)`: factors of brightness, contrast and saturation, and the shift of the hue; (1, 1, 1, 0) changes
        nothing.

    Returns:
      `(N, H, W, 3)` in [0, 1].
    """
    # Every example goes through the same program, whatever its order: under `vmap`, a switch between operations
    # computes all of them and selects. The shift of the hue costs most and is computed once: before it, three rounds
    # for the operations that precede it, after it three for those that follow. The other three are one operation, a
    # blend with black, with the mean gray or with the pixel's gray; a round that an example does not need has a factor
    # of 1, which changes nothing. Four rounds of everything take 2.4 times as long.
    ordered = jnp.take_along_axis(factors, order, axis=1)
    hue_place = jnp.argmax(order == 3, axis=1)
    one, zero = jnp.ones((), images.dtype), jnp.zeros((), images.dtype)

    def blend(images: jax.Array, place: int, used: jax.Array) -> jax.Array:
        factor = jnp.where(used, ordered[:, place], one)[:, None, None, None]
        which = order[:, place, None, None, None]
        gray = luma(images)
        target = jnp.where(which == 2, gray, jnp.where(which == 1, gray.mean(axis=(1, 2, 3), keepdims=True), zero))
        return jnp.clip(factor * images + (1 - factor) * target, 0, 1)

    for place in (0, 1, 2):
        images = blend(images, place, place < hue_place)
    images = adjust_hue(images, factors[:, 3])
    for place in (1, 2, 3):
        images = blend(images, place, place > hue_place)
    return images


def blur_weights(sigmas: jax.Array, largest: float) -> jax.Array:
    """Returns the weights of one of the three successive averages in PIL's `GaussianBlur(radius=sigma)`.

    An average covers 2 l + 1 pixels and a fraction of the next on either side, so that the three together have the
    requested variance (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering").

    Args:
      sigmas: `(N,)` in pixels, up to `largest`; 0 means no blur.
      largest: greatest sigma; determines the number of weights: 5 for a sigma of 2.

    Returns:
      `(N, taps)`, `taps` odd; each row is symmetric and sums to 1.
    """
    half = int((math.sqrt(4 * largest**2 + 1) - 1) / 2) + 1
    variance = (sigmas * sigmas / 3)[:, None]
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = jnp.abs(jnp.arange(-half, half + 1, dtype=sigmas.dtype))[None, :]
    box = jnp.clip(whole + 1 - distance, 0, 1) + jnp.where(distance == whole + 1, fraction, jnp.zeros_like(fraction))
    return box / (2 * (whole + fraction) + 1)


def gaussian_blur(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Blurs each image with its own weights, as PIL does except for its rounding: three averages down, three across.

    Each average repeats the border of its input, so near the border the three are not the same as one average with a
    repeated border: there they differ by up to 22 levels of 255.

    Args:
      images: `(N, H, W, C)`.
      weights: weights of one average, `(N, taps)`; see `blur_weights`.

    Returns:
      `(N, H, W, C)`.
    """
    # Matrix products halve the cycles on a TPU; on a CPU they take two to four times as long, on a GPU the same time.
    return platforms.select(images, weights, tpu=_blur_by_products, default=_blur_by_sums)


def _blur_by_sums(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes `gaussian_blur` as weighted sums of shifted images, and the pixels near the border as products."""
    # A convolution would be separate for every example and channel; some back ends compute these one at a time.
    # Compute the input of the sums first: fused, it would be recomputed for every weight.
    count, height, width, channels = images.shape
    rows = jax.lax.optimization_barrier(images.reshape(count, height, width * channels))
    down = jax.lax.optimization_barrier(_blur_axis(rows, weights, 1, 1))
    return _blur_axis(down, weights, 2, channels).reshape(images.shape)


def _blur_axis(rows: jax.Array, weights: jax.Array, axis: int, step: int) -> jax.Array:
    """Blurs `(N, H, W * C)` along an axis on which adjacent pixels are `step` entries apart."""
    size = rows.shape[axis] // step
    inner, border = _three_averages(weights), _border_matrices(weights, size)
    radius = inner.shape[1] // 2

    def product(matrices: jax.Array, part: jax.Array) -> jax.Array:
        if axis == 1:
            return _batch_product("nab,nbc->nac", matrices, part)
        pixels = part.reshape(*part.shape[:2], -1, step)
        return _batch_product("nab,nhbc->nhac", matrices, pixels).reshape(*part.shape[:2], -1)

    if size <= 2 * radius:  # all of it is near the border
        return product(border, rows)
    reach, within = 2 * radius * step, rows.shape[axis] - 2 * radius * step
    first, last = (jax.lax.slice_in_dim(rows, begin, begin + reach, axis=axis) for begin in (0, within))
    parts = [jax.lax.slice_in_dim(rows, tap * step, tap * step + within, axis=axis) for tap in range(2 * radius + 1)]
    sums = inner[:, radius, None, None] * parts[radius]
    for tap in range(radius):
        sums = sums + inner[:, tap, None, None] * (parts[tap] + parts[2 * radius - tap])
    return jnp.concatenate([product(border, first), sums, product(border[:, ::-1, ::-1], last)], axis)


def _blur_by_products(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes `gaussian_blur` as two products of each image with banded matrices."""
    _, height, width, _ = images.shape
    down = _blur_matrices(weights, height)
    across = down if width == height else _blur_matrices(weights, width)
    # Three bfloat16 products instead of six: an error of 0.01 levels of 255, and none where nothing changes.
    precision = jax.lax.Precision.HIGH
    blurred = jnp.einsum("nab,nbwc->nawc", down, images, precision=precision)
    blurred = jnp.einsum("nab,nhbc->nhac", across, blurred, precision=precision)
    sharp = weights[:, weights.shape[1] // 2] == 1
    return jnp.where(sharp[:, None, None, None], images, blurred)


def _blur_matrices(weights: jax.Array, size: int) -> jax.Array:
    """Returns the weight of each pixel of a row in each pixel of the blurred row, `(N, size, size)`."""
    inner, border = _three_averages(weights), _border_matrices(weights, size)
    radius = inner.shape[1] // 2
    if size <= 2 * radius:
        return border
    place = jnp.arange(size)
    tap = place[None, :] - place[radius:-radius, None] + radius
    band = sum(jnp.where(tap[None] == each, inner[:, each, None, None], 0) for each in range(2 * radius + 1))
    beyond = size - 2 * radius
    first = jnp.pad(border, ((0, 0), (0, 0), (0, beyond)))
    last = jnp.pad(border[:, ::-1, ::-1], ((0, 0), (0, 0), (beyond, 0)))
    return jnp.concatenate([first, band, last], axis=1)


def _three_averages(weights: jax.Array) -> jax.Array:
    """Returns the combined weights of three averages, away from the border, `(N, 3 * taps - 2)`."""
    taps = weights.shape[1]
    result = weights
    for _ in range(2):
        shifted = (jnp.pad(result * weights[:, tap, None], ((0, 0), (tap, taps - 1 - tap))) for tap in range(taps))
        result = jnp.asarray(sum(shifted))
    return result


def _border_matrices(weights: jax.Array, size: int) -> jax.Array:
    """Returns the weights of pixels in the first pixels of a blurred row, those that the border affects.

    Args:
      weights: weights of one average, `(N, taps)`; three averages reach `radius = 3 * (taps // 2)` pixels to either
        side.
      size: number of pixels in a row.

    Returns:
      `(N, radius, 2 * radius)` for the first pixels; reversed, it is for the last ones. For a row of at most
      `2 * radius` pixels, `(N, size, size)` for all of them.
    """
    half = weights.shape[1] // 2
    radius = 3 * half
    whole = min(size, 2 * radius)
    place = jnp.arange(whole)
    shares = (
        jnp.where((jnp.clip(place + tap - half, 0, whole - 1)[:, None] == place[None, :])[None], weight, 0)
        for tap, weight in enumerate(weights.T[:, :, None, None])
    )
    average = jnp.asarray(sum(shares))
    thrice = _batch_product("nab,nbc->nac", average, _batch_product("nab,nbc->nac", average, average))
    # Drop the pixels that the end of these 2 * radius pixels affects: a longer row ends elsewhere.
    return thrice if size <= 2 * radius else thrice[:, :radius]


def _batch_product(pattern: str, matrices: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, matrices, values, precision=jax.lax.Precision.HIGHEST)


def add_noise(rngs: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Adds normal noise, drawn for each pixel and channel.

    Args:
      rngs: keys `(N,)`.
      images: `(N, H, W, 3)` in [0, 1].
      strength: the standard deviation of the noise.

    Returns:
      `(N, H, W, 3)`, clipped to [0, 1].
    """
    noise = jax.vmap(lambda rng: jax.random.normal(rng, images.shape[1:], jnp.float32))(rngs)
    return jnp.clip(images + strength * noise.astype(images.dtype), 0, 1)


def normalize(
    images: jax.Array, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation of each channel.

    Channels beyond those, random bits of 0 or 1 (`data.random_bits`), become -1 or 1.

    Args:
      images: `(N, H, W, C)` in [0, 1].
      mean: one number per channel.
      std: one number per channel.

    Returns:
      `(N, H, W, C)` of the same dtype.
    """
    further = images.shape[-1] - len(mean)
    mean, std = (*mean, *[0.5] * further), (*std, *[0.5] * further)
    means, stds = (jnp.asarray(values, images.dtype)[None, None, None, :] for values in (mean, std))
    return (images - means) / stds


# The 24 orders of four operations.
_ORDERS = tuple(itertools.permutations(range(4)))


def jitter_parameters(
    uniforms: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[jax.Array, jax.Array]:
    """Draws the parameters of `color_jitter`, as torchvision's `ColorJitter` does.

    Args:
      uniforms: `(N, 5)` in [0, 1), for the order and the four factors.
      brightness: the factor of the brightness is uniform in 1 - `brightness` to 1 + `brightness`.
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      hue: the shift is uniform in -`hue` to `hue`, in turns.

    Returns:
      order int32 `(N, 4)`, any of the 24 with the same probability, and factors `(N, 4)`.
    """
    order = jnp.asarray(_ORDERS, jnp.int32)[(uniforms[:, 0] * len(_ORDERS)).astype(jnp.int32)]
    strengths = jnp.asarray([brightness, contrast, saturation, hue], uniforms.dtype)[None, :]
    return order, jnp.asarray([1, 1, 1, 0], uniforms.dtype)[None, :] + strengths * (2 * uniforms[:, 1:] - 1)


@dataclasses.dataclass(frozen=True)
class TrifeatureAugmentation:
    """Random views of Trifeature images: crop, flip, small rotation, mild brightness and contrast, optional noise.

    The hue does not change: that would destroy color, one of the measured features. Brightness always comes before
    contrast, while torchvision's `ColorJitter` draws the order.

    Example:
        >>> augmentation = TrifeatureAugmentation()
        >>> rngs = example_rngs(jax.random.key(0), jnp.arange(2))
        >>> augmentation(rngs, jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
        (2, 32, 32, 3)

    Attributes:
      crop_scale: least and greatest area of the crop, relative to the image's; (1, 1) does not crop.
      rotation: greatest angle in degrees by which the image is turned to either side; the angle is uniform.
      flip: the probability of a left-right flip.
      brightness: the factor of the brightness is uniform in 1 - `brightness` to 1 + `brightness`.
      contrast: the same for the contrast.
      noise: standard deviation of normal noise, relative to the full range of a pixel; 0 draws none.
      mean: mean of each channel, for the normalization.
      std: standard deviation of each channel, for the normalization.
      dtype: dtype of the views and of the computation: float32, or float64 for parity runs.

    Raises:
      ValueError: if a strength is outside its range.
    """

    crop_scale: tuple[float, float] = (0.36, 1.0)
    rotation: float = 9.0
    flip: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    noise: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Any = jnp.float32

    def __post_init__(self):
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ValueError(
                f"crop_scale is {self.crop_scale}, expected (low, high) with 0 < low <= high <= 1; it is a share of "
                "the image's area"
            )
        _check_ranges(self, {"rotation": 180, "flip": 1, "brightness": 1, "contrast": 1, "noise": 1})

    def __call__(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
        """Makes one view of each image.

        Args:
          rngs: keys `(N,)`, one per example (`example_rngs`).
          images: uint8 `(N, H, W, 3)`.

        Returns:
          Normalized views, `(N, H, W, 3)` of `dtype`.

        Raises:
          ValueError: if `images` is not uint8 of shape `(N, H, W, 3)`.
        """
        _check_images(images)
        _, height, width, _ = images.shape
        # All parameters of an example in one draw; `noise` has its own key, so it changes none of them.
        uniforms = jax.vmap(lambda rng: jax.random.uniform(rng, (CROP_DRAWS + 4,), jnp.float32))(rngs)
        flips = uniforms[:, CROP_DRAWS] < self.flip
        uniforms = uniforms.astype(self.dtype)
        boxes = random_resized_crop_boxes(uniforms[:, :CROP_DRAWS], height, width, self.crop_scale)
        turn, brighter, stronger = (2 * uniforms[:, CROP_DRAWS + 1 :] - 1).T
        angles = math.radians(self.rotation) * turn

        views = affine_warp(images, crop_matrices(boxes, angles, flips, height, width)) / 255
        if self.brightness:
            views = adjust_brightness(views, 1 + self.brightness * brighter)
        if self.contrast:
            views = adjust_contrast(views, 1 + self.contrast * stronger)
        if self.noise:
            views = add_noise(jax.vmap(lambda rng: jax.random.fold_in(rng, 1))(rngs), views, self.noise)
        return normalize(views, self.mean, self.std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoStrengths:
    """The common parameters of MoCo's augmentations.

    Attributes:
      brightness: the factor of the brightness is uniform in 1 - `brightness` to 1 + `brightness`.
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      hue: greatest turn of the hue to either side, as a share of the color circle.
      grayscale: the probability of a view without color.
      flip: the probability of a left-right flip.
      mean: mean of each channel, for the normalization.
      std: standard deviation of each channel, for the normalization.
      dtype: dtype of the views and of the computation: float32, or float64 for parity runs.

    Raises:
      ValueError: if a strength is outside its range.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.4
    grayscale: float = 0.2
    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Any = jnp.float32

    def __post_init__(self):
        names = ("brightness", "contrast", "saturation", "grayscale", "flip")
        _check_ranges(self, dict.fromkeys(names, 1) | {"hue": 0.5})

    def _jitter_parameters(self, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jitter_parameters(uniforms.astype(self.dtype), self.brightness, self.contrast, self.saturation, self.hue)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV2Augmentation(MoCoStrengths):
    """MoCo-v2's views of images already cropped: color jitter, grayscale, Gaussian blur, flip, in this order.

    After Chen et al. 2020, "Improved baselines with momentum contrastive learning", and its code (--aug-plus). Sizes
    are in pixels of the view, for every view size: the original's are for 224.

    Example:
        >>> augmentation = MoCoV2Augmentation()
        >>> rngs = example_rngs(jax.random.key(0), jnp.arange(2))
        >>> augmentation(rngs, jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
        (2, 32, 32, 3)

    Attributes:
      jitter: the probability of color jitter.
      hue: greatest turn of the hue to either side, as a share of the color circle.
      blur: the probability of a blur.
      blur_sigma: least and greatest sigma of the blur in pixels.

    Raises:
      ValueError: if a strength is outside its range.
    """

    jitter: float = 0.8
    hue: float = 0.1
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self):
        if not (len(self.blur_sigma) == 2 and 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= 10):
            raise ValueError(
                f"blur_sigma is {self.blur_sigma}, expected (low, high) with 0 < low <= high <= 10 pixels; blur=0 "
                "turns it off"
            )
        _check_ranges(self, {"jitter": 1, "blur": 1})
        super().__post_init__()

    def parameters(self, rngs: jax.Array) -> dict[str, jax.Array]:
        """Draws the parameters of each example's view.

        Args:
          rngs: keys `(N,)`.

        Returns:
          `order` and `factors` of the jitter, `(N, 4)`; `sigma` of the blur, `(N,)`, 0 for none; bool `(N,)` `jitter`,
          `grayscale` and `flip`. Without jitter the factors change nothing.
        """
        uniforms = jax.vmap(lambda rng: jax.random.uniform(rng, (10,), jnp.float32))(rngs)
        jitter, grayscale, blur, flip = (
            uniforms[:, place] < chance
            for place, chance in enumerate((self.jitter, self.grayscale, self.blur, self.flip))
        )
        low, high = self.blur_sigma
        sigma = low + (high - low) * uniforms[:, 4].astype(self.dtype)
        order, factors = self._jitter_parameters(uniforms[:, 5:])
        return {
            "order": order,
            "factors": jnp.where(jitter[:, None], factors, jnp.asarray([1, 1, 1, 0], self.dtype)[None, :]),
            "sigma": jnp.where(blur, sigma, jnp.zeros((), self.dtype)),
            "jitter": jitter,
            "grayscale": grayscale,
            "flip": flip,
        }

    def __call__(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
        """Makes one view of each image.

        Args:
          rngs: keys `(N,)`, one per example (`example_rngs`).
          images: uint8 `(N, H, W, 3)`: crops.

        Returns:
          Normalized views, `(N, H, W, 3)` of `dtype`.

        Raises:
          ValueError: if `images` is not uint8 of shape `(N, H, W, 3)`.
        """
        _check_images(images)
        drawn = self.parameters(rngs)
        # The flip commutes with everything else: do it while the images are bytes.
        views = _flipped(images, drawn["flip"]).astype(self.dtype) / 255
        views = color_jitter(views, drawn["order"], drawn["factors"])
        views = jnp.where(drawn["grayscale"][:, None, None, None], luma(views), views)
        if self.blur:
            views = gaussian_blur(views, blur_weights(drawn["sigma"], self.blur_sigma[1]))
        return normalize(views, self.mean, self.std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoCIFARAugmentation(MoCoV2Augmentation):
    """MoCo's views of 32-pixel images already cropped: MoCo-v2's without the blur.

    After the CIFAR-10 demo of MoCo's code (colab/moco_cifar10_demo.ipynb in facebookresearch/moco): a crop of 0.08 to 1
    of the area, flip, color jitter, grayscale. There the flip comes first, which makes no difference. The demo
    normalizes with CIFAR-10's mean and standard deviation; here they are ImageNet's, as everywhere, so that evaluation
    and `ifm_jax.load` need not know an encoder's training data.
    """

    blur: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV1Augmentation(MoCoStrengths):
    """MoCo-v1's views of images already cropped: grayscale, color jitter, flip, in this order.

    After He et al. 2020, "Momentum contrast for unsupervised visual representation learning", and its code.
    """

    def parameters(self, rngs: jax.Array) -> dict[str, jax.Array]:
        """Draws the parameters of each example's view.

        Args:
          rngs: keys `(N,)`.

        Returns:
          `order` and `factors` of the jitter, `(N, 4)`; bool `(N,)` `grayscale` and `flip`.
        """
        uniforms = jax.vmap(lambda rng: jax.random.uniform(rng, (7,), jnp.float32))(rngs)
        order, factors = self._jitter_parameters(uniforms[:, 2:])
        grayscale, flip = uniforms[:, 0] < self.grayscale, uniforms[:, 1] < self.flip
        return {"order": order, "factors": factors, "grayscale": grayscale, "flip": flip}

    def __call__(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
        """Makes one view of each image; see `MoCoV2Augmentation`."""
        _check_images(images)
        drawn = self.parameters(rngs)
        views = _flipped(images, drawn["flip"]).astype(self.dtype) / 255
        views = jnp.where(drawn["grayscale"][:, None, None, None], luma(views), views)
        views = color_jitter(views, drawn["order"], drawn["factors"])
        return normalize(views, self.mean, self.std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeAugmentation:
    """The linear probe's training view of images already cropped (0.08 to 1 of the area): a flip, no change of color.

    This follows the original's main_lincls.py, like all training of classifiers on ImageNet.

    Attributes:
      flip: the probability of a left-right flip.
      mean: mean of each channel, for the normalization.
      std: standard deviation of each channel, for the normalization.
      dtype: dtype of the views and of the computation: float32, or float64 for parity runs.

    Raises:
      ValueError: if a strength is outside its range.
    """

    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Any = jnp.float32

    def __post_init__(self):
        _check_ranges(self, {"flip": 1})

    def __call__(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
        """Makes one view of each image; see `MoCoV2Augmentation`."""
        _check_images(images)
        flips = jax.vmap(lambda rng: jax.random.uniform(rng, (), jnp.float32))(rngs) < self.flip
        return normalize(_flipped(images, flips).astype(self.dtype) / 255, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class BitsSpared:
    """An augmentation of the first three channels; the others, random bits of 0 or 255, become -1 or 1 and no more.

    Attributes:
      augmentation: makes views of `(N, H, W, 3)`.
    """

    augmentation: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
        """Makes one view of each image, normalized `(N, h, w, C)`.

        Args:
          rngs: keys `(N,)`, one per example (`example_rngs`).
          images: uint8 `(N, H, W, C)`.
        """
        views = self.augmentation(rngs, images[..., :3])
        # One pixel tells, and the threshold forgives what resizing on a device may have rounded.
        bits = jnp.where(images[:, :1, :1, 3:] >= 128, 1, -1).astype(views.dtype)
        return jnp.concatenate([views, jnp.broadcast_to(bits, (*views.shape[:3], bits.shape[-1]))], axis=-1)


def sparing_bits(augmentation: Callable[[jax.Array, jax.Array], jax.Array], bits: int):
    """Returns an augmentation that leaves the last `bits` channels alone; without bits the given one itself."""
    return BitsSpared(augmentation) if bits else augmentation


def _flipped(images: jax.Array, flips: jax.Array) -> jax.Array:
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def _check_images(images: jax.Array) -> None:
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 of shape (N, H, W, 3); augment "
            "before normalizing"
        )


def _check_ranges(augmentation: Any, ranges: dict[str, float]) -> None:
    for name, high in ranges.items():
        if not 0 <= (value := getattr(augmentation, name)) <= high:
            raise ValueError(f"{name} is {value}, expected 0 to {high}; 0 turns it off")
