"""Random views: equal to torchvision, OpenCV and SciPy where these do the same, and independent of the machine."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from ifm_jax import augment
from ifm_jax.augment import (
    MoCoCIFARAugmentation,
    MoCoV1Augmentation,
    MoCoV2Augmentation,
    ProbeAugmentation,
    TrifeatureAugmentation,
    example_rngs,
)
from references.torchvision_peer import torchvision

# Compiled: one operation at a time takes longer, for every operation compiles by itself.
crop_boxes = jax.jit(augment.random_resized_crop_boxes, static_argnums=(1, 2, 3))
crop_matrices = jax.jit(augment.crop_matrices, static_argnums=(3, 4))
affine_warp = jax.jit(augment.affine_warp)

IDENTITY = {"crop_scale": (1.0, 1.0), "rotation": 0.0, "flip": 0.0, "brightness": 0.0, "contrast": 0.0}


def random_images(count=4, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def smooth_images(count=4, height=32, width=32):
    images = random_images(count, height, width).astype(np.float32)
    return np.stack([cv2.GaussianBlur(image, (0, 0), 2) for image in images]).astype(np.uint8)


def keys(count, seed=0):
    return example_rngs(jax.random.key(seed), jnp.arange(count))


def normalized(images):
    return (images / 255.0 - np.array(augment.IMAGENET_MEAN)) / np.array(augment.IMAGENET_STD)


def warped_by_scipy(images, matrices):
    """Bilinear resampling in float64."""
    count, height, width, _ = images.shape
    y, x = np.mgrid[:height, :width]
    result = np.empty(images.shape)
    for n in range(count):
        source_x, source_y = (row[0] * x + row[1] * y + row[2] for row in np.asarray(matrices[n], np.float64))
        for channel in range(3):
            result[n, ..., channel] = scipy.ndimage.map_coordinates(
                images[n, ..., channel].astype(np.float64), [source_y, source_x], order=1, mode="nearest"
            )
    return result


# Whole augmentation.


def test_no_strength_gives_the_normalized_image():
    images = random_images()
    views = jax.jit(TrifeatureAugmentation(**IDENTITY))(keys(4), images)
    assert views.dtype == jnp.float32
    np.testing.assert_allclose(views, normalized(images), rtol=1e-6, atol=1e-6)


def test_views_are_what_their_parts_make():
    """One draw of 26 numbers: the crop's, then flip, rotation, brightness and contrast."""
    images = random_images(16)
    views = jax.jit(TrifeatureAugmentation())(keys(16), images)
    uniforms = jax.vmap(lambda rng: jax.random.uniform(rng, (26,)))(keys(16))
    boxes = crop_boxes(uniforms[:, :22], 32, 32, (0.36, 1.0))
    turn, brightness, contrast = (2 * uniforms[:, 23:] - 1).T
    matrices = crop_matrices(boxes, turn * np.float32(np.pi / 20), uniforms[:, 22] < 0.5, 32, 32)
    expected = warped_by_scipy(images, matrices) / 255
    expected = np.clip(expected * (1 + 0.3 * np.asarray(brightness, np.float64)[:, None, None, None]), 0, 1)
    gray = (expected @ np.array([0.2989, 0.587, 0.114])).mean((1, 2))[:, None, None, None]
    factor = 1 + 0.3 * np.asarray(contrast, np.float64)[:, None, None, None]
    expected = np.clip(factor * expected + (1 - factor) * gray, 0, 1) * 255
    np.testing.assert_allclose(views, normalized(expected), rtol=0, atol=1e-4)
    assert len(np.unique(np.asarray(uniforms))) == 16 * 26


def test_a_view_depends_on_key_and_image_only():
    """The same example elsewhere in the batch, in a batch of another size: the same view."""
    images = random_images(16)
    augmentation = jax.jit(TrifeatureAugmentation())
    rng = jax.random.key(7)
    views = augmentation(example_rngs(rng, jnp.arange(16)), images)
    for order in (np.roll(np.arange(16), 5), np.array([5, 0, 11])):
        some = augmentation(example_rngs(rng, jnp.asarray(order)), images[order])
        np.testing.assert_allclose(some, views[order], rtol=0, atol=1e-5)
    other = augmentation(example_rngs(jax.random.key(8), jnp.arange(16)), images)
    assert (np.abs(np.asarray(other - views)).max((1, 2, 3)) > 0.1).all()


def test_eight_devices_make_the_same_views_without_talking():
    images = random_images(16)
    augmentation = jax.jit(
        lambda rng, indices, images: TrifeatureAugmentation(noise=0.1)(example_rngs(rng, indices), images)
    )
    expected = augmentation(jax.random.key(3), jnp.arange(16), images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arguments = (jax.random.key(3), jax.device_put(jnp.arange(16), sharding), jax.device_put(images, sharding))
    views = augmentation(*arguments)
    assert views.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(views, expected, rtol=0, atol=1e-5)
    compiled = augmentation.lower(*arguments).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled


def test_float64_sees_the_same_draws(x64):
    images = random_images(8)
    single, double = (
        jax.jit(TrifeatureAugmentation(noise=0.05, dtype=dtype))(keys(8), images)
        for dtype in (jnp.float32, jnp.float64)
    )
    assert single.dtype == jnp.float32
    assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-4)


def test_x64_mode_changes_nothing():
    images = random_images(8)
    views = jax.jit(TrifeatureAugmentation())(keys(8), images)
    with jax.enable_x64(True):
        again = jax.jit(TrifeatureAugmentation())(keys(8), images)
        assert again.dtype == jnp.float32
        np.testing.assert_allclose(again, views, rtol=0, atol=1e-5)


def test_strengths_change_nothing_else():
    """Noise draws from a key of its own, so what else happens to an image stays the same."""
    images = random_images(8)
    quiet, noisy = (jax.jit(TrifeatureAugmentation(noise=noise))(keys(8), images) for noise in (0.0, 0.01))
    difference = np.asarray(noisy - quiet) * np.array(augment.IMAGENET_STD)
    assert 0.007 < difference.std() < 0.011


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.5)),
        ("rotation", -1.0),
        ("flip", 1.5),
        ("brightness", 2.0),
        ("contrast", -0.1),
        ("noise", -1.0),
    ],
)
def test_bad_strength_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*expected .*; "):
        TrifeatureAugmentation(**{field: value})


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 1), np.uint8)])
def test_images_must_be_bytes_with_three_channels(images):
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        TrifeatureAugmentation()(keys(2), images)


# Crop boxes.


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [(40, 60), (48, 48), (30, 90)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    """In the last case, three times as wide as high, one in seven finds none that fits."""
    count, scale = 6000, (0.2, 1.0)
    uniforms = jax.random.uniform(jax.random.key(0), (count, augment.CROP_DRAWS))
    ours = np.asarray(crop_boxes(uniforms, height, width, scale), np.float64).T
    for start, length, whole in ((ours[0], ours[2], height), (ours[1], ours[3], width)):
        assert start.min() >= 0
        assert (start + length).max() <= whole + 1e-4
    area, aspect = ours[2] * ours[3] / (height * width), ours[3] / ours[2]
    assert 0.1999 <= area.min() < area.max() <= 1.0001
    assert 0.7499 <= aspect.min() < aspect.max() <= 1.3334
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)], float).T
    for our, their in zip(ours, theirs, strict=True):
        # Five standard errors, and half a pixel that torchvision rounds away at most.
        error = 5 * their.std() * (2 / count) ** 0.5
        assert our.mean() == pytest.approx(their.mean(), abs=error + 0.5)
        assert our.std() == pytest.approx(their.std(), abs=error + 0.5)


def test_crop_that_never_fits_is_central():
    uniforms = jax.random.uniform(jax.random.key(0), (10, augment.CROP_DRAWS))
    for height, width, box in ((32, 32, (0, 0, 32, 32)), (30, 60, (0, 10, 30, 40)), (60, 30, (10, 0, 40, 30))):
        boxes = crop_boxes(uniforms, height, width, (1.0, 1.0))
        np.testing.assert_allclose(boxes, np.tile(np.float32(box), (10, 1)), rtol=1e-6)


# Geometry.


def test_crop_equals_the_crop_resized():
    """A box of whole pixels is cut out and stretched, as OpenCV's bilinear resize does it."""
    images = random_images(1)
    matrices = crop_matrices(jnp.asarray([[4.0, 6.0, 16.0, 24.0]]), jnp.zeros(1), jnp.zeros(1, bool), 32, 32)
    view = np.asarray(affine_warp(images, matrices))[0]
    crop = images[0, 4:20, 6:30].astype(np.float32)
    expected = cv2.resize(crop, (32, 32), interpolation=cv2.INTER_LINEAR)
    # Near the edge of the box the resize repeats the edge, where the warp sees the image beyond it.
    np.testing.assert_allclose(view[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=0, atol=1e-3)


def test_flip_is_exact():
    images = random_images(2)
    boxes = jnp.tile(jnp.asarray([[0.0, 0.0, 32.0, 32.0]]), (2, 1))
    matrices = crop_matrices(boxes, jnp.zeros(2), jnp.asarray([True, False]), 32, 32)
    views = np.asarray(affine_warp(images, matrices))
    np.testing.assert_array_equal(views, np.stack([images[0, :, ::-1], images[1]]).astype(np.float32))


@pytest.mark.parametrize("degrees", [9.0, -30.0])
def test_rotation_turns_as_opencv(degrees):
    images = smooth_images(1)
    boxes = jnp.asarray([[0.0, 0.0, 32.0, 32.0]])
    matrices = crop_matrices(boxes, jnp.full((1,), np.deg2rad(degrees), jnp.float32), jnp.zeros(1, bool), 32, 32)
    view = np.asarray(affine_warp(images, matrices))[0]
    peer = cv2.warpAffine(
        images[0].astype(np.float32),
        cv2.getRotationMatrix2D((15.5, 15.5), degrees, 1.0),
        (32, 32),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    # OpenCV may round places to 1/32 of a pixel.
    np.testing.assert_allclose(view, peer, rtol=0, atol=1.0)


def test_flip_comes_after_crop_and_rotation():
    images = random_images(1, 24, 40)
    box, angle = jnp.asarray([[3.0, 5.0, 15.0, 20.0]]), jnp.full((1,), 0.2, jnp.float32)
    plain, flipped = (
        affine_warp(images, crop_matrices(box, angle, jnp.full((1,), flip), 24, 40)) for flip in (False, True)
    )
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3])
def test_warp_is_bilinear_and_repeats_the_border(x64, channels):
    images = random_images(6, 20, 28)
    matrices = np.random.default_rng(1).normal(0, 0.7, (6, 2, 3)) + np.array([[[1, 0, 3], [0, 1, -4]]])
    views = affine_warp(images[..., :channels], jnp.asarray(matrices))
    assert views.dtype == jnp.float64
    np.testing.assert_allclose(views, warped_by_scipy(images, matrices)[..., :channels], rtol=0, atol=1e-9)


# Color.


def factors():
    return np.array([0.0, 0.4, 1.0, 1.6], np.float32)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_adjustment_equals_torchvisions(name):
    images = random_images().astype(np.float32) / 255
    ours = getattr(augment, f"adjust_{name}")(jnp.asarray(images), jnp.asarray(factors()))
    peer = getattr(torchvision.transforms.functional, f"adjust_{name}")
    theirs = [
        peer(torch.from_numpy(image).permute(2, 0, 1), float(factor)).permute(1, 2, 0).numpy()
        for image, factor in zip(images, factors(), strict=True)
    ]
    np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=1e-6)


@pytest.mark.torch
def test_normalization_equals_torchvisions():
    images = random_images().astype(np.float32) / 255
    ours = augment.normalize(jnp.asarray(images))
    theirs = torchvision.transforms.functional.normalize(
        torch.from_numpy(images).permute(0, 3, 1, 2), augment.IMAGENET_MEAN, augment.IMAGENET_STD
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=1e-6, atol=1e-6)


def test_noise_is_normal_and_each_examples_own():
    images = jnp.full((8, 32, 32, 3), 0.5, jnp.float32)
    noise = np.asarray(augment.add_noise(keys(8), images, 0.05)) - 0.5
    assert noise.mean() == pytest.approx(0, abs=0.002)
    assert noise.std() == pytest.approx(0.05, rel=0.03)
    assert np.abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < 0.08


# MoCo's views: torchvision on photographs, as PIL images where the original has them so.

FUNCTIONAL = torchvision.transforms.functional
JITTER = ("brightness", "contrast", "saturation", "hue")

adjust_hue = jax.jit(augment.adjust_hue)
color_jitter = jax.jit(augment.color_jitter)
gaussian_blur = jax.jit(lambda images, sigmas: augment.gaussian_blur(images, augment.blur_weights(sigmas, 2.0)))
luma = jax.jit(augment.luma)


@pytest.fixture(scope="module")
def photographs():
    """Eight crops of two photographs, uint8 `(8, 96, 96, 3)`."""
    crops = [
        cv2.resize(photograph[top : top + 200, left : left + 200], (96, 96), interpolation=cv2.INTER_AREA)
        for photograph in load_sample_images().images
        for top, left in ((0, 0), (200, 50), (100, 300), (220, 430))
    ]
    return np.stack(crops)


def jitter_factors(count=8, seed=0):
    """As drawn for MoCo, the ends included: brightness, contrast, saturation and hue, float32 `(count, 4)`."""
    factors = np.random.default_rng(seed).uniform([0.6, 0.6, 0.6, -0.4], [1.4, 1.4, 1.4, 0.4], (count, 4))
    factors[0], factors[1] = (0.6, 0.6, 0.6, -0.4), (1.4, 1.4, 1.4, 0.4)
    return factors.astype(np.float32)


def assert_near(ours, theirs, mean=2.0, percentile=4.0):
    """Asserts that images in [0, 1] are near uint8 ones, in levels of 255."""
    error = np.abs(255 * np.asarray(ours, np.float64) - np.stack(theirs).astype(np.float64))
    assert error.mean() < mean
    assert np.percentile(error, 99) <= percentile


@pytest.mark.torch
@pytest.mark.parametrize("name", JITTER)
def test_jitter_operations_equal_torchvisions(photographs, name):
    values = jitter_factors()[:, JITTER.index(name)]
    images = photographs.astype(np.float32) / 255
    peer = getattr(FUNCTIONAL, f"adjust_{name}")
    ours = np.asarray(jax.jit(getattr(augment, f"adjust_{name}"))(images, values))
    as_tensors = [
        peer(torch.from_numpy(image).permute(2, 0, 1), float(value)).permute(1, 2, 0).numpy()
        for image, value in zip(images, values, strict=True)
    ]
    # In float32 a hue of almost no chroma is lost in rounding; nothing else is.
    np.testing.assert_allclose(ours, np.stack(as_tensors), rtol=0, atol=1e-4 if name == "hue" else 1e-5)
    as_pil = [
        np.asarray(peer(Image.fromarray(image), float(value))) for image, value in zip(photographs, values, strict=True)
    ]
    assert_near(ours, as_pil)


@pytest.mark.torch
def test_hue_of_pure_colors():
    """Gray, black, white, the primaries and the ties between two channels."""
    colors = np.array(np.meshgrid([0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1]), np.float32).reshape(3, -1).T[None, :, None]
    for shift in (-0.5, -0.1, 0.0, 0.25, 0.5):
        theirs = FUNCTIONAL.adjust_hue(torch.from_numpy(colors).permute(0, 3, 1, 2), shift).permute(0, 2, 3, 1)
        np.testing.assert_allclose(adjust_hue(colors, np.full((1,), shift, np.float32)), theirs, rtol=0, atol=1e-6)


@pytest.mark.torch
def test_greyscale_equals_torchvisions(photographs):
    ours = np.broadcast_to(luma(photographs.astype(np.float32) / 255), photographs.shape)
    gray = [np.asarray(FUNCTIONAL.to_grayscale(Image.fromarray(image), 3)) for image in photographs]
    assert_near(ours, gray, mean=1.0, percentile=1.0)


@pytest.mark.torch
def test_jitter_in_all_orders_equals_torchvisions(photographs):
    """All 24 orders in one batch, against torchvision one image after the other."""
    orders = np.array(augment._ORDERS, np.int32)
    assert sorted(map(tuple, orders)) == sorted(set(map(tuple, orders)))
    assert len(orders) == 24
    images, factors = np.tile(photographs, (3, 1, 1, 1)), jitter_factors(24)
    ours = np.asarray(color_jitter(images.astype(np.float32) / 255, orders, factors))
    as_tensors, as_pil = [], []
    for image, order, values in zip(images, orders, factors, strict=True):
        tensor, pil = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1), Image.fromarray(image)
        for operation in order:
            peer = getattr(FUNCTIONAL, f"adjust_{JITTER[operation]}")
            tensor, pil = peer(tensor, float(values[operation])), peer(pil, float(values[operation]))
        as_tensors.append(tensor.permute(1, 2, 0).numpy())
        as_pil.append(np.asarray(pil))
    np.testing.assert_allclose(ours, np.stack(as_tensors), rtol=0, atol=1e-3)
    # PIL rounds to whole levels after each of the four; the tolerance at the 99th percentile is for one.
    assert_near(ours, as_pil, percentile=2 * 4.0)


def test_neutral_factors_change_nothing(photographs):
    images = photographs.astype(np.float32) / 255
    neutral = np.tile(np.float32([1, 1, 1, 0]), (8, 1))
    ours = color_jitter(images, np.array(augment._ORDERS, np.int32)[::3], neutral)
    np.testing.assert_allclose(ours, images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8, 1.2, 1.6, 2.0])
def test_blur_equals_pils(photographs, sigma):
    """In every pixel, those of the border too."""
    ours = gaussian_blur(photographs.astype(np.float32) / 255, np.full((8,), sigma, np.float32))
    theirs = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) for image in photographs]
    # Far within the 3 levels asked for: the same weights, which PIL applies to bytes, rounded six times.
    assert_near(ours, theirs, mean=0.6, percentile=2.0)
    assert np.abs(255 * np.asarray(ours, np.float64) - np.stack(theirs)).max() <= 4


@pytest.mark.slow
def test_blur_weights(x64):
    """They sum to 1, are symmetric and have a third of the variance; those of no blur leave the image alone."""
    for largest, taps in ((0.5, 3), (1.0, 3), (2.0, 5), (5.0, 11)):
        sigmas = jnp.linspace(0.0, largest, 21)
        weights = np.asarray(augment.blur_weights(sigmas, largest))
        assert weights.shape == (21, taps)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
        np.testing.assert_allclose(weights, weights[:, ::-1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(weights @ (np.arange(taps) - taps // 2) ** 2, sigmas**2 / 3, rtol=0, atol=1e-9)
    images = random_images() / 255.0
    np.testing.assert_array_equal(gaussian_blur(images, np.zeros(4)), images)
    none = augment.blur_weights(jnp.zeros(4), 2.0)
    np.testing.assert_array_equal(jax.jit(augment._blur_by_products)(images, none), images)


@pytest.mark.parametrize("shape", [(32, 32), (5, 20), (13, 1)])
def test_blur_is_three_averages_each_of_which_repeats_the_border(x64, shape):
    """As sums and as products, for images of any size: their border may be all there is of them."""
    images, sigmas = random_images()[:, : shape[0], : shape[1]] / 255.0, np.array([0.3, 0.9, 1.5, 2.0])
    weights = augment.blur_weights(sigmas, 2.0)
    for blur in (augment.gaussian_blur, augment._blur_by_products):
        ours = jax.jit(blur)(images, weights)
        assert ours.dtype == jnp.float64
        for our, peer, of_image in zip(ours, images, np.asarray(weights), strict=True):
            for axis in (0, 0, 0, 1, 1, 1):
                peer = scipy.ndimage.correlate1d(peer, of_image, axis=axis, mode="nearest")
            np.testing.assert_allclose(our, peer, rtol=0, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("augmentation", "order"),
    [
        (MoCoV1Augmentation(), ("gray", "jitter", "flip")),
        (MoCoV2Augmentation(), ("jitter", "gray", "blur", "flip")),
        (MoCoCIFARAugmentation(), ("flip", "jitter", "gray")),
    ],
    ids=["moco_v1", "moco_v2", "moco_cifar"],
)
def test_moco_views_equal_torchvisions(photographs, augmentation, order):
    """The whole, with the parameters drawn, against PIL images taken through the original's transforms one by one."""
    images = np.tile(photographs, (4, 1, 1, 1))
    views = np.asarray(jax.jit(augmentation)(keys(32), images))
    drawn = {name: np.asarray(value) for name, value in jax.jit(augmentation.parameters)(keys(32)).items()}

    def gray(image, i):
        return FUNCTIONAL.to_grayscale(image, 3) if drawn["grayscale"][i] else image

    def jitter(image, i):
        for operation in drawn["order"][i]:
            image = getattr(FUNCTIONAL, f"adjust_{JITTER[operation]}")(image, float(drawn["factors"][i, operation]))
        return image

    def blur(image, i):
        return image.filter(ImageFilter.GaussianBlur(float(drawn["sigma"][i]))) if drawn["sigma"][i] else image

    def flip(image, i):
        return FUNCTIONAL.hflip(image) if drawn["flip"][i] else image

    theirs = []
    for i, image in enumerate(map(Image.fromarray, images)):
        for operation in order:
            image = {"gray": gray, "jitter": jitter, "blur": blur, "flip": flip}[operation](image, i)
        theirs.append(np.asarray(image))
    # Six operations at most, each of which PIL rounds to whole levels; the tolerance at the 99th percentile is for one.
    assert_near(views * np.array(augment.IMAGENET_STD) + np.array(augment.IMAGENET_MEAN), theirs, percentile=2 * 4.0)
    assert 4 < drawn["flip"].sum() < 28
    assert 0 < drawn["grayscale"].sum() < 16


def test_cifars_parameters_are_those_of_version_2_without_blur():
    """So that what is shown of the distributions of version 2 holds for them."""
    cifar, v2 = (jax.jit(a.parameters)(keys(64)) for a in (MoCoCIFARAugmentation(), MoCoV2Augmentation()))
    np.testing.assert_array_equal(cifar.pop("sigma"), np.zeros(64))
    assert v2.pop("sigma").any()
    jax.tree.map(np.testing.assert_array_equal, cifar, v2)


@pytest.mark.torch
def test_probe_views_equal_torchvisions(photographs, x64):
    """Each is the image, normalized, or its mirror image; half of them are."""
    for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.float64, 1e-12)):
        views = jax.jit(ProbeAugmentation(dtype=dtype))(keys(8), photographs)
        assert views.dtype == dtype
        pixels = torch.from_numpy(photographs).permute(0, 3, 1, 2).double() / 255
        plain = FUNCTIONAL.normalize(pixels, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
        either = [image.permute(0, 2, 3, 1).numpy() for image in (plain, FUNCTIONAL.hflip(plain))]
        errors = [np.abs(np.asarray(views) - image).max((1, 2, 3)) for image in either]
        assert np.minimum(*errors).max() < tolerance
        assert {int(flipped) for flipped in errors[0] > errors[1]} == {0, 1}
    halves = np.tile(np.uint8([0, 255])[None, None, :, None], (20_000, 1, 1, 3))
    flipped = np.asarray(jax.jit(ProbeAugmentation())(keys(20_000), halves))[:, 0, 0, 0] > 0
    assert scipy.stats.binomtest(int(flipped.sum()), 20_000, 0.5).pvalue > 0.001
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        ProbeAugmentation()(keys(2), np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="flip is 2, expected 0 to 1"):
        ProbeAugmentation(flip=2)


@pytest.mark.torch
def test_moco_parameters_are_distributed_as_torchvisions():
    count = 20_000
    torch.manual_seed(0)
    v1, v2 = (
        {name: np.asarray(value) for name, value in jax.jit(augmentation.parameters)(keys(count, seed=5)).items()}
        for augmentation in (MoCoV1Augmentation(), MoCoV2Augmentation())
    )
    jittered = v2["jitter"]
    assert (v2["factors"][~jittered] == [1, 1, 1, 0]).all()
    for drawn, where, hue in ((v1, np.ones(count, bool), 0.4), (v2, jittered, 0.1)):
        transform = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4, hue)
        ranges = [getattr(transform, name) for name in JITTER]
        draws = [transform.get_params(*ranges) for _ in range(count)]
        orders, theirs = np.array([draw[0].numpy() for draw in draws]), np.array([draw[1:] for draw in draws])
        for place, name in enumerate(JITTER):
            assert scipy.stats.ks_2samp(drawn["factors"][where, place], theirs[:, place]).pvalue > 0.001, name
        powers = np.array([64, 16, 4, 1])
        table = [np.unique(order @ powers, return_counts=True)[1] for order in (drawn["order"], orders)]
        assert scipy.stats.chi2_contingency(table).pvalue > 0.001
        # One parameter tells nothing about another.
        parts = [*drawn["factors"][where].T, (drawn["order"] @ powers)[where], drawn["flip"][where]]
        correlation = np.corrcoef(np.stack([*parts, drawn["grayscale"][where]]))
        assert np.abs(correlation - np.eye(7)).max() < 5 / count**0.5 / 0.8
    blurred = v2["sigma"] > 0
    assert scipy.stats.kstest(v2["sigma"][blurred], scipy.stats.uniform(0.1, 1.9).cdf).pvalue > 0.001
    chances = {"jitter": (jittered, 0.8), "blur": (blurred, 0.5), "flip": (v2["flip"], 0.5)}
    chances |= {"grayscale": (v2["grayscale"], 0.2), "v1 grayscale": (v1["grayscale"], 0.2), "v1": (v1["flip"], 0.5)}
    for name, (happened, chance) in chances.items():
        assert scipy.stats.binomtest(int(happened.sum()), count, chance).pvalue > 0.001, name


def test_moco_views_depend_on_key_and_image_only(photographs):
    """Elsewhere in the batch, in another batch, on eight devices: the same view, and nothing said between them."""
    images = np.tile(photographs[:, :32, :32], (2, 1, 1, 1))
    augmentation = jax.jit(lambda rng, place, images: MoCoV2Augmentation()(example_rngs(rng, place), images))
    place, rng = jnp.arange(16), jax.random.key(7)
    views = augmentation(rng, place, images)
    some = augmentation(rng, jnp.asarray([5, 0, 11]), images[[5, 0, 11]])
    np.testing.assert_allclose(some, views[jnp.asarray([5, 0, 11])], rtol=0, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arguments = (rng, jax.device_put(place, sharding), jax.device_put(images, sharding))
    np.testing.assert_allclose(augmentation(*arguments), views, rtol=0, atol=1e-5)
    compiled = augmentation.lower(*arguments).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled


def test_moco_in_float64_sees_the_same_draws(photographs, x64):
    images = photographs[:, :32, :32]
    for augmentation in (MoCoV1Augmentation, MoCoV2Augmentation):
        single, double = (jax.jit(augmentation(dtype=dtype))(keys(8), images) for dtype in (jnp.float32, jnp.float64))
        assert (single.dtype, double.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(single, double, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("jitter", 1.5), ("hue", 0.6), ("grayscale", -0.1), ("blur_sigma", (0.0, 2.0)), ("blur_sigma", (2.0, 1.0))],
)
def test_bad_strength_of_moco_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*expected .*; "):
        MoCoV2Augmentation(**{field: value})
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        MoCoV1Augmentation()(keys(2), np.zeros((2, 8, 8, 1), np.uint8))
