"""What a run takes of a device's memory: below what the compiler takes, and refused in time where it cannot fit."""

import time

import jax
import numpy as np
import pytest

import ifm_jax
from ifm_jax import assembly, recipes, sharding
from ifm_jax.data import on_device
from ifm_jax.errors import UsageError
from ifm_jax.models import onednn
from ifm_jax.runs import memory
from tests import small


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("library", ["xla", "onednn"])
def test_the_estimate_is_just_below_what_the_compiler_takes(mesh, library):
    if library == "onednn" and not onednn.is_available():
        pytest.skip("oneDNN is not installed")
    config = small.config(batch_size=64, moco__queue_size=512, model__cpu_convolutions=library)
    create = assembly.state_creator(config)
    images = jax.ShapeDtypeStruct((64, 1, 32, 32, 3), np.uint8)
    others = jax.eval_shape(lambda: (jax.random.key(0), np.zeros(8, np.float32)))
    step = assembly.make_step(config, mesh).jit()
    compiled = step.lower(jax.eval_shape(create), {"views": images}, *others).compile()
    found = compiled.memory_analysis()
    takes = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert 0.5 * takes < sum(memory.estimate(config, mesh)) <= takes


def test_what_an_image_takes_is_counted_by_hand(mesh):
    """resnet8 of width 4 with a stem of stride 2: maps of 16, 8 and 4 px."""
    config = small.config()
    # The image; the stem's output; of each block what its two convolutions read and write, and its shortcut's output.
    shapes = [(32, 3), (16, 4)] + [(16, 4)] * 4 + [(16, 4)] + [(8, 8)] * 4 + [(8, 8)] + [(4, 16)] * 4
    values = sum(side * side * channels for side, channels in shapes)
    _, images = memory.estimate(config, mesh)
    assert images == int(1.4 * 4 * values * config.batch_size)


@pytest.mark.parametrize("fields", [{"queue_sharded": True}, {}])
def test_devices_share_the_batch_and_a_queue_that_is_split(mesh, fields):
    config = small.config(moco__queue_size=4096, **{f"moco__{name}": value for name, value in fields.items()})
    alone = memory.estimate(config, mesh)
    shared = memory.estimate(config, sharding.make_mesh(jax.devices()[:4]))
    assert shared[1] == alone[1] // 4
    assert alone[0] - shared[0] == (4096 * 8 * 4 * 3 // 4 if fields else 0)


def test_the_default_is_refused_in_seconds_where_it_does_not_fit(mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "of_device", lambda mesh: 24 * 10**9)
    begun = time.monotonic()
    with pytest.raises(
        UsageError, match=r"a step of resnet50 needs at least [\d.]+ GB .* which has 24.0 GB: .*--config=trifeature"
    ):
        ifm_jax.train(ifm_jax.Config(), tmp_path / "run", devices=jax.devices()[:1])
    assert time.monotonic() - begun < 60  # it compiles for longer than that
    assert not (tmp_path / "run").exists()


def test_a_queue_that_does_not_fit_is_refused(mesh):
    config = small.config(moco__queue_size=16 * 10**8, moco__dim=65536)
    with pytest.raises(UsageError, match="for weights, optimizer and queue"):
        memory.check(config, mesh)


@pytest.mark.parametrize("name", ["trifeature", "ifm_cifar10"])
def test_what_fits_is_not_refused(mesh, monkeypatch, name):
    """On a machine with 8 GB."""
    monkeypatch.setattr(memory, "of_machine", lambda: 8 * 10**9)
    memory.check(assembly.resolve(recipes.load(name)), mesh)


def test_nothing_is_refused_where_the_memory_is_not_known(mesh, monkeypatch):
    monkeypatch.setattr(memory, "of_machine", lambda: None)
    assert memory.of_device(mesh) is None
    memory.check(small.config(batch_size=2**19, moco__queue_size=2**19, data__trifeature__train_size=10**9), mesh)
    memory.check_steps(small.config(), 2**20)
    on_device.check_memory(10**9, 256, memory.of_device(mesh))
    with pytest.raises(UsageError, match="are 4294967296 updates: expected at most 2147483647"):
        memory.check_steps(small.config(), 2**31)


def test_images_and_steps_that_this_machine_cannot_hold(mesh, tmp_path):
    with pytest.raises(UsageError, match=r"train_size=2147483647: images of 32 px need 6597 GB"):
        memory.check(small.config(data__trifeature__train_size=2**31 - 1), mesh)
    with pytest.raises(UsageError, match="epochs=1000000 of 4000 steps are 4000000000 updates: expected at most"):
        memory.check_steps(small.config(epochs=10**6), 4000)
    config = small.config(epochs=10**6, data__trifeature__train_size=2**16)
    with pytest.raises(UsageError, match="epochs=1000000 of 4096 steps are 4096000000 updates"):
        ifm_jax.train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert not (tmp_path / "run").exists()
