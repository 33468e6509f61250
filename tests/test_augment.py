"""Random views: equal to torchvision, OpenCV and SciPy where these do the same, and independent of the machine."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ifm_jax import augment
from ifm_jax.augment import TrifeatureAugmentation, example_rngs
from tests.torchvision_peer import torchvision

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


def test_no_strength_gives_the_normalised_image():
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
    grey = (expected @ np.array([0.2989, 0.587, 0.114])).mean((1, 2))[:, None, None, None]
    factor = 1 + 0.3 * np.asarray(contrast, np.float64)[:, None, None, None]
    expected = np.clip(factor * expected + (1 - factor) * grey, 0, 1) * 255
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


# Colour.


def factors():
    return np.array([0.0, 0.4, 1.0, 1.6], np.float32)


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


def test_normalisation_equals_torchvisions():
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
