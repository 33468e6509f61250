"""A run small enough for tests: a recipe, and what compares two of them."""

import jax
import numpy as np

from ifm_jax.config import Config


def config(**fields) -> Config:
    """Returns the recipe, 8 steps of 16 images, with fields like `ifm__epsilon` changed."""
    made = Config()
    made.model.arch, made.model.stem, made.model.width = "resnet8", "small_stride2", 4
    made.model.bn_groups = 2
    made.model.compute_dtype = "float32"
    made.moco.queue_size, made.moco.dim, made.moco.momentum = 64, 8, 0.9
    made.data.image_size = 32
    made.data.augmentation = "trifeature"
    made.data.trifeature.train_size, made.data.trifeature.test_size = 64, 32
    made.batch_size, made.epochs, made.log_every, made.checkpoint_every = 16, 2, 1, 3
    for name, value in fields.items():
        *holders, field = name.split("__")
        target = made
        for holder in holders:
            target = getattr(target, holder)
        assert hasattr(target, field), name
        setattr(target, field, value)
    return made


def without_speed(records: list[dict]) -> list[dict]:
    """Returns records without what the clock says."""
    clock = ("images_per_sec", "data_wait")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def assert_same(a, b) -> None:
    """Asserts that two trees of arrays agree bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
