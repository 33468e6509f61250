"""Images in a NumPy file."""

import numpy as np
import pytest

from ifm_jax.config import DataConfig
from ifm_jax.data import ViewSource, open_source, training_batches
from ifm_jax.data.array import ArrayFile, open_array
from ifm_jax.errors import UsageError


def images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    np.savez(
        tmp_path / "set.npz",
        train_images=images(12, 32, 32, 3),
        train_labels=np.arange(12)[:, None] % 3,
        test_images=images(6, 32, 32, 3, seed=1),
        test_labels=np.arange(6, dtype=np.uint8) % 3,
        class_names=["cat", "ant", "bee"],
    )
    return str(tmp_path / "set.npz")


def test_a_config_opens_it(path):
    data = DataConfig(source=f"array:{path}", image_size=32, augmentation="moco_cifar")
    train, test = open_source(data, "train"), open_source(data, "test")
    assert isinstance(train, ViewSource)
    assert (len(train), len(test)) == (12, 6)
    assert train.label_names == test.label_names == {"class": ("cat", "ant", "bee")}
    np.testing.assert_array_equal(test.labels()["class"], [0, 1, 2, 0, 1, 2])
    # Images of the size of a view are evaluated whole.
    batch = test.examples(np.array([4, 0]))
    np.testing.assert_array_equal(batch["image"], images(6, 32, 32, 3, seed=1)[[4, 0]])
    np.testing.assert_array_equal(batch["class"], [1, 0])
    views = next(training_batches(train, 8, seed=0))
    assert views["views"].shape == (8, 2, 32, 32, 3)
    assert train.fingerprint != test.fingerprint
    assert train.fingerprint == open_source(data, "train").fingerprint


def test_names_of_classes_alone_are_no_labels():
    found = ArrayFile(images(3, 32, 32, 3), 32, ("cat", "ant"))
    assert (found.label_names, found.labels()) == ({}, {})
    assert found.fingerprint == ArrayFile(images(3, 32, 32, 3), 32).fingerprint


def test_chosen_classes_are_numbered_anew(path, tmp_path):
    (tmp_path / "names").write_text("cat\nbee\n")
    chosen = open_array(path, "train", image_size=32, classes=str(tmp_path / "names"))
    assert chosen.label_names == {"class": ("bee", "cat")}
    np.testing.assert_array_equal(chosen.labels()["class"], [1, 0] * 4)
    np.testing.assert_array_equal(chosen.pixels(1), images(12, 32, 32, 3)[2])


def test_keras_names_and_grey_images(tmp_path):
    np.savez(tmp_path / "gray.npz", x_train=images(5, 28, 28), y_train=np.array([0, 1, 2, 3, 1]))
    gray = open_array(str(tmp_path / "gray.npz"), "train", image_size=28)
    assert gray.label_names == {"class": ("0", "1", "2", "3")}
    np.testing.assert_array_equal(gray.pixels(2), np.repeat(images(5, 28, 28)[2][..., None], 3, 2))
    assert gray.views(0, [0.5] * 44)[1].shape == (28, 28, 3)
    np.savez(tmp_path / "bare.npz", images=images(5, 8, 8, 3))
    assert open_array(str(tmp_path / "bare.npz"), "train", image_size=8).label_names == {}


@pytest.mark.parametrize(
    ("arrays", "split", "message"),
    [
        (None, "train", "set.npz does not exist; expected a .npz file with train_images"),
        (b"text", "train", "set.npz cannot be read"),
        ({"pictures": images(2, 8, 8, 3)}, "train", "no training images: expected an array train_images or x_train"),
        ({"images": images(2, 8, 8, 3)}, "test", "no held-out images: expected an array test_images or x_test"),
        ({"images": np.zeros((2, 8, 8, 3))}, "train", r"images are float64 of shape \(2, 8, 8, 3\); expected uint8"),
        ({"images": images(2, 8, 8, 4)}, "train", r"uint8 of shape \(2, 8, 8, 4\); expected uint8 of shape \(N, H, W"),
        (
            {"images": images(2, 8, 8, 3), "labels": np.arange(3)},
            "train",
            r"of shape \(3,\); expected 2 integers",
        ),
        (
            {"images": images(2, 8, 8), "labels": np.array([0, 2]), "class_names": ["a"]},
            "train",
            "2; expected 0 to 0",
        ),
        (
            {"y_train": np.arange(2), "x_test": images(1, 8, 8), "y_test": np.array([2])},
            "test",
            "a test label is 2; expected 0 to 1, the training labels",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, arrays, split, message):
    path = tmp_path / "set.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        open_array(str(path), split, image_size=8)
    assert "\n" not in str(caught.value)
