"""RandBit: random bits of an image as channels, the same in both views, from the source to the readouts."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifm_jax
from ifm_jax import assembly
from ifm_jax import config as configs
from ifm_jax.augment import BitsSpared, MoCoV2Augmentation, TrifeatureAugmentation, example_rngs, normalize
from ifm_jax.config import DataConfig
from ifm_jax.data import Digits, Trifeature, ViewSource, on_device, open_source, training_batches
from ifm_jax.data.random_bits import ViewsWithRandomBits, WithRandomBits
from ifm_jax.data.sources import open_views, subset
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate, pretrained, suppression
from ifm_jax.evaluation.pretrained import labeled
from ifm_jax.runs import metrics_log, training
from ifm_jax.torch_interop import writing
from tests import small

BITS = 5


def section(source: str, augmentation: str = "trifeature") -> DataConfig:
    """The data section of a small run on a source."""
    data = small.config(data__source=source, data__augmentation=augmentation).data
    data.digits.train_size, data.digits.test_size = 64, 32
    return data


def run_config(**fields):
    return small.config(data__source=f"randbit:{BITS}:trifeature", batch_size=16, steps=4, epochs=1, **fields)


def light_but_real(patch: pytest.MonkeyPatch):
    """The augmentation of a light run, still wrapped as the config says."""
    patch.setattr(
        assembly,
        "make_augmentation",
        lambda config: assembly.sparing_bits(small.noise, configs.channels(config.data) - 3),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, evaluated at its end."""
    path = tmp_path_factory.mktemp("randbit") / "run"
    with small.light(), pytest.MonkeyPatch.context() as patch:
        light_but_real(patch)
        training.train(run_config(eval__every=1), path, devices=jax.devices()[:1], quiet=True)
        yield path


@pytest.mark.parametrize("name", ["trifeature", "digits"])
def test_images_labels_and_bits(name):
    plain, with_bits = (open_source(section(source), "train") for source in (name, f"randbit:{BITS}:{name}"))
    indices = np.array([3, 60, 3])
    images, of_plain = with_bits.examples(indices), plain.examples(indices)
    assert images["image"].shape == (3, 32, 32, 3 + BITS)
    np.testing.assert_array_equal(images["image"][..., :3], of_plain["image"])
    assert set(np.unique(images["image"][..., 3:])) <= {0, 255}
    assert np.ptp(images["image"][..., 3:], axis=(1, 2)).max() == 0  # constant over an image
    np.testing.assert_array_equal(images["image"][0], images["image"][2])
    for label, values in plain.labels().items():
        np.testing.assert_array_equal(with_bits.labels()[label], values)
        np.testing.assert_array_equal(images[label], of_plain[label])
    assert (with_bits.label_names, len(with_bits)) == (plain.label_names, len(plain))
    again = pickle.loads(pickle.dumps(with_bits))
    np.testing.assert_array_equal(again.examples(indices)["image"], images["image"])


@pytest.mark.parametrize("name", ["trifeature", "digits"])
@pytest.mark.parametrize("augmentation", ["trifeature", "moco_v2"])
def test_no_bits_is_the_plain_source(name, augmentation):
    plain, none = (open_source(section(source, augmentation), "train") for source in (name, f"randbit:0:{name}"))
    assert type(none) is type(plain)
    assert none.fingerprint == plain.fingerprint
    plain, none = (
        small.config(data__source=source, data__augmentation=augmentation) for source in (name, f"randbit:0:{name}")
    )
    assert assembly.make_augmentation(none) == assembly.make_augmentation(plain)
    assert assembly.make_encoder(none) == assembly.make_encoder(plain)


def test_bits_are_fair_and_independent():
    source = Trifeature(size=4000)
    train, test = (WithRandomBits(source, 16, split).bits for split in ("train", "test"))
    for bits in (train, test):
        assert np.abs(bits.mean(0) - 0.5).max() < 0.04
        assert np.abs(np.corrcoef(bits.T) - np.eye(16)).max() < 0.07
    assert (train == test).mean() == pytest.approx(0.5, abs=0.02)
    labels = source.labels()
    for values in labels.values():
        assert max(abs(np.corrcoef(values, bit)[0, 1]) for bit in train.T) < 0.07
    # More bits go on where fewer end.
    np.testing.assert_array_equal(WithRandomBits(source, 4, "train").bits, train[:, :4])


def test_the_fingerprint_knows_the_bits():
    source = Digits(size=100)
    sources = [
        source,
        *(WithRandomBits(source, bits, "train") for bits in (1, 4, 5)),
        WithRandomBits(source, 4, "test"),
    ]
    assert len({each.fingerprint for each in sources}) == 5


def test_views_cut_on_the_host_have_the_bits():
    source = open_views(section(f"randbit:{BITS}:digits", "moco_v2"), "train", count=2, least_area=0.2)
    assert isinstance(source, ViewSource)
    assert isinstance(source, ViewsWithRandomBits)
    for of in (source, subset(source, np.arange(40))):
        batch = next(training_batches(of, 16, seed=0, indices=True, threads=1))
        assert batch["views"].shape == (16, 2, 32, 32, 3 + BITS)
        expected = 255 * source.bits[batch["index"]]
        np.testing.assert_array_equal(
            batch["views"][..., 3:], np.broadcast_to(expected[:, None, None, None], (16, 2, 32, 32, BITS))
        )
        plain = source.source.views(int(batch["index"][0]), [0.3] * source.random_crops.draws)
        views = of.views(int(batch["index"][0]), [0.3] * source.random_crops.draws)
        np.testing.assert_array_equal(views[1][..., :3], plain[1])
    copies, _ = on_device.read_all(source, 20, 36)
    assert copies.shape == (20, 36, 36, 3 + BITS)
    assert (copies[..., 3:] == 255 * source.bits[:20][:, None, None]).all()


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [TrifeatureAugmentation(), MoCoV2Augmentation()])
def test_the_augmentation_leaves_the_bits_alone(augmentation):
    images = open_source(section(f"randbit:{BITS}:trifeature"), "train").examples(np.arange(8))["image"]
    first, second = (example_rngs(jax.random.key(seed), jnp.arange(8)) for seed in (0, 1))
    spared = jax.jit(BitsSpared(augmentation))
    views = spared(first, images), spared(second, images)
    np.testing.assert_array_equal(views[0][..., :3], jax.jit(augmentation)(first, images[..., :3]))
    assert np.abs(views[0][..., :3] - views[1][..., :3]).max() > 0.1
    for view in views:
        assert view.dtype == jnp.float32
        np.testing.assert_array_equal(view[..., 3:], images[..., 3:] / 127.5 - 1)
    # As the evaluation normalizes them.
    np.testing.assert_array_equal(
        normalize(jnp.asarray(images, jnp.float32) / 255)[..., 3:], images[..., 3:] / 127.5 - 1
    )


def test_the_network_takes_the_channels():
    config = assembly.resolve(run_config())
    params, _ = jax.eval_shape(assembly.make_encoder(config).init, jax.random.key(0))
    assert params["conv1"]["kernel"].shape[2] == 3 + BITS
    assert isinstance(assembly.make_augmentation(config), BitsSpared)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_read_out(run, tmp_path):
    records = metrics_log.read(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"knn/shape", "linear/shape"} <= set(records[-1])
    assert list(suppression.read_out_workdir(run).accuracy) == ["shape", "texture", "color"]
    of = pretrained.load(run)
    assert evaluate.diagnose(of, jax.devices()[:1])["images"] == 32
    model = ifm_jax.load(run)
    images = labeled(of.config, "test").examples(np.arange(4))["image"]
    features = model(normalize(jnp.asarray(images, jnp.float32) / 255))
    np.testing.assert_allclose(features, of.frozen(jax.devices()[:1])(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_mistake_is_named(run, tmp_path):
    with pytest.raises(UsageError, match=r"network takes 8 channels: expected a run on images of three"):
        writing.to_torch(run, tmp_path / "file.pth", target="torchvision")
    with pytest.raises(UsageError, match=r"data.source='trifeature' has 3 channels, but the network takes 8"):
        pretrained.load(run, small.config())
    with pytest.raises(UsageError, match=r"data.source='trifeature' has 3 channels, but the network takes 8"):
        training.train(small.config(init_from=str(run)), tmp_path / "run", devices=jax.devices()[:1], quiet=True)


@pytest.mark.slow
def test_the_bits_held_on_the_device_are_the_same(run, tmp_path):
    training.train(
        run_config(eval__every=1, data__cache="device"), tmp_path / "run", devices=jax.devices()[:1], quiet=True
    )
    fields = ("loss", "acc1", "grad_norm")
    for here, there in zip(
        *(metrics_log.read(each / "metrics.jsonl") for each in (run, tmp_path / "run")), strict=True
    ):
        assert [here[name] for name in fields] == [there[name] for name in fields]
