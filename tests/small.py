"""A run small enough for tests: a recipe, what makes it light, and what compares two of them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax import assembly, optim, pretrain
from ifm_jax.config import Config
from ifm_jax.methods import MoCo, Objective
from ifm_jax.models import Encoder, resnet
from ifm_jax.runs import loop, memory, samples, snapshot


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


def noise(rngs: jax.Array, images: jax.Array) -> jax.Array:
    """An augmentation that compiles at once: noise, drawn for each image."""
    dtype = jnp.result_type(float)
    images = images.astype(dtype) / jnp.asarray(128, dtype) - jnp.asarray(1, dtype)
    drawn = jax.vmap(lambda rng: jax.random.normal(rng, images.shape[1:3], dtype))(rngs)
    return images + jnp.asarray(0.3, dtype) * drawn[..., None]


@contextlib.contextmanager
def light(curves: bool = False):
    """Within, a run is compiled in a third of the time: resnet8 is its first block alone, the augmentation is `noise`.

    For tests of what surrounds the step. Unless `curves`, none are drawn: a picture takes as long as eight steps.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.ARCHITECTURES, "resnet8", resnet.ARCHITECTURES["resnet8"]._replace(depths=(1,)))
        patch.setattr(assembly, "make_augmentation", lambda config: noise)
        if not curves:
            patch.setattr(loop.Recorder, "draw", lambda self: None)
            patch.setattr(samples, "draw", lambda *args: None)
        _forget_estimates()
        yield
    _forget_estimates()


def _forget_estimates() -> None:
    """What networks need is remembered under their names."""
    for remembered in (memory._variables, memory._bytes_per_image):
        remembered.cache_clear()


def write_run(directory, config, step=8):
    """Writes the workdir of a run of MoCo with weights and running averages as after some training, without any."""
    model = config.model
    encoder = Encoder(model.arch, dim=config.moco.dim, stem=model.stem, width=model.width)
    method = MoCo(encoder, Objective(), config.moco.queue_size)
    abstract = jax.eval_shape(lambda: pretrain.create(jax.random.key(0), method, optim.sgd()))
    random = np.random.default_rng(0)

    def value(path, x):
        drawn = random.standard_normal(x.shape).astype(x.dtype)
        if x.ndim == 4:
            return drawn * np.float32(np.sqrt(2 / (x.shape[0] * x.shape[1] * x.shape[3])))
        name = jax.tree_util.keystr(path)
        return 1 + 0.2 * np.abs(drawn) if "scale" in name or "var" in name else 0.1 * drawn

    state = jax.tree_util.tree_map_with_path(value, abstract)
    state = state._replace(step=np.int32(step), memory=state.memory._replace(queue_ptr=np.int32(0)))
    snapshot.write(snapshot.Snapshot(config, state), directory)


def without_speed(records: list[dict]) -> list[dict]:
    """Returns records without what the clock says."""
    clock = ("images_per_sec", "data_wait")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def assert_same(a, b) -> None:
    """Asserts that two trees of arrays agree bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
