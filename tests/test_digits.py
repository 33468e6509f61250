"""Handwritten digits over textures: reproducible, legible, with held-out handwriting, trained on like any source."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from sklearn.datasets import load_digits

from ifm_jax import assembly, drawing, recipes
from ifm_jax.config import DataConfig
from ifm_jax.data import digits, open_source
from ifm_jax.data.digits import Digits
from ifm_jax.data.sources import open_views
from ifm_jax.data.trifeature import Trifeature
from ifm_jax.evaluation import suppression
from ifm_jax.runs import training
from tests import small

# Labels, handwritten images and central pixels of the first four images of the default source, and a digest of the
# first 64.
GOLDEN_LABELS = [[4, 1, 2, 0], [5, 5, 0, 7], [4, 8, 4, 6]]
GOLDEN_HANDWRITTEN = [584, 1505, 1490, 1317]
GOLDEN_PIXELS = [[255, 255, 255], [255, 255, 255], [0, 0, 0], [233, 233, 233]]
GOLDEN_HASH = "0309b22240864507"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digits"


def test_drawing_is_that_of_its_version():
    """If this fails on purpose, raise DRAWING_VERSION: users have files drawn by the former code in their caches."""
    source = Digits("train", size=64, image_size=32, seed=0)
    batch = source.examples(np.arange(4))
    assert digits.DRAWING_VERSION == 1
    assert [batch[name].tolist() for name in source.label_names] == GOLDEN_LABELS
    assert source.handwritten(np.arange(4)).tolist() == GOLDEN_HANDWRITTEN
    assert batch["image"][:, 16, 16].tolist() == GOLDEN_PIXELS
    assert hashlib.sha256(source.images().tobytes()).hexdigest()[:16] == GOLDEN_HASH


@pytest.mark.slow
def test_drawing_needs_no_jax():
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['Digits'](size=2).images(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, digits.__file__], check=False).returncode == 0


def test_image_depends_on_its_index_only():
    indices = np.array([5, 901, 5, 33, 0])
    batch = Digits(size=1000).examples(indices)
    for source in (Digits(size=1000), Digits(size=902)):
        for place, index in enumerate(indices):
            np.testing.assert_array_equal(source[int(index)]["image"], batch["image"][place])
    np.testing.assert_array_equal(Digits(size=1000).images()[indices], batch["image"])


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_the_handwriting_of_the_test_split_is_unseen(seed):
    of = {split: Digits(split, size=20_000, seed=seed).handwritten(np.arange(20_000)) for split in ("train", "test")}
    train, test = np.unique(of["train"]), np.unique(of["test"])
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797  # all are drawn
    assert 0.17 < len(test) / 1797 < 0.23
    pixels, digit = load_digits(return_X_y=True)
    assert not {image.tobytes() for image in pixels[train]} & {image.tobytes() for image in pixels[test]}
    for split, numbers in of.items():
        np.testing.assert_array_equal(digit[numbers], Digits(split, size=20_000, seed=seed).labels()["digit"])
        for one in range(10):  # each equally often
            counts = np.unique(numbers[digit[numbers] == one], return_counts=True)[1]
            assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_seeds_split_the_handwriting_differently():
    first, second = (set(Digits("test", size=9000, seed=seed).handwritten(np.arange(9000))) for seed in (0, 1))
    assert 0.1 < len(first & second) / len(first) < 0.3  # by chance a fifth


def test_labels_are_uniform_and_independent():
    labels = Digits(size=50_000, seed=11).labels()
    for name, values in labels.items():
        assert values.dtype == np.int32
        assert scipy.stats.chisquare(np.bincount(values, minlength=10)).pvalue > 1e-4, name
    for first, second in (("digit", "texture"), ("digit", "color"), ("texture", "color")):
        table = np.zeros((10, 10))
        np.add.at(table, (labels[first], labels[second]), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-4, (first, second)


def test_fewer_classes_take_the_first_ones():
    source = Digits(size=3000, num_digits=6, num_textures=2, num_colors=3)
    assert {name: len(names) for name, names in source.label_names.items()} == {"digit": 6, "texture": 2, "color": 3}
    assert [int(labels.max()) for labels in source.labels().values()] == [5, 1, 2]


def test_texture_and_color_are_trifeatures():
    """The light of the texture times the color, where no digit is."""
    source = Digits(size=600, texture_rotation=0.0)
    images, labels = source.images(), source.labels()
    shifts = source._uniforms(np.arange(600))[-2:]
    place = (np.arange(32) + 0.5) / 32 - 0.5
    tile = drawing.texture_tile(32, 0.2)
    column, row = (np.floor((place / 0.8 + shift[:, None]) * 128 + 1e-4).astype(int) % 128 for shift in shifts)
    light = tile[labels["texture"][:, None, None], row[:, :, None], column[:, None, :]]
    expected = np.clip(light[..., None] * drawing.RGB[labels["color"]][:, None, None], 0, 255)
    same = np.abs(images - expected).max(-1) <= 1
    assert same[:, :2].mean() > 0.85  # the upper rows seldom show a digit
    assert (same.mean((1, 2)) > 0.3).all()
    assert source.label_names["color"] == Trifeature().label_names["color"]
    assert source.label_names["texture"] == Trifeature().label_names["texture"]


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [32, 75])
def test_the_digit_is_white_on_black_whatever_lies_beneath(image_size):
    """Against SciPy's interpolation of the handwritten images; on every texture and color both take enough pixels."""
    count = 150
    source = Digits(size=count, image_size=image_size)
    images = source.images()
    zoom, right, down = source._uniforms(np.arange(count))[4:7]
    pixels, _ = load_digits(return_X_y=True)
    place = (np.arange(image_size) + 0.5) / image_size
    shown = {name: {"white": [], "black": []} for name in ("texture", "color")}
    for index, number in enumerate(source.handwritten(np.arange(count))):
        ink = np.pad(pixels[number].reshape(8, 8) / 16, 2)
        spread = scipy.ndimage.maximum_filter(ink, footprint=[[0, 1, 0], [1, 1, 1], [0, 1, 0]])
        side = 0.55 + 0.2 * zoom[index]
        rows, columns = ((place - (1 - side) * at[index]) / side * 8 + 1.5 for at in (down, right))
        ink, spread = (
            scipy.ndimage.map_coordinates(table, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")
            for table in (ink, spread)
        )
        masks = {"white": ink > 0.58, "black": (spread > 0.63) & (ink < 0.32)}
        assert (images[index][masks["white"]] == 255).all()
        assert (images[index][masks["black"]] == 0).all()
        for name, values in shown.items():
            for level, mask in masks.items():
                values[level].append((source.labels()[name][index], mask.mean()))
    for values in shown.values():
        for level in values.values():
            of, share = np.array(level).T
            assert min(share[of == one].mean() for one in range(10)) > 0.05


def test_disk_cache_and_pickling(cache):
    source = Digits(size=300, seed=5)
    drawn = source.examples(np.arange(300))["image"]
    np.testing.assert_array_equal(source.images(), drawn)
    (file,) = cache.iterdir()
    assert np.load(file).shape == (300, 32, 32, 3)
    assert isinstance(Digits(size=300, seed=5).images(), np.memmap)
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data) == source
    np.testing.assert_array_equal(pickle.loads(data)[9]["image"], drawn[9])
    others = [Digits(size=300), Digits("test", size=300, seed=5), Trifeature(size=300, seed=5)]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "valid"),
        ("size", 0),
        ("image_size", 31),
        ("seed", 2**64),
        ("num_digits", 11),
        ("num_textures", 1),
        ("num_colors", 0),
        ("texture_rotation", 181.0),
        ("texture_period", 0.05),
        ("scale", (0.7, 0.6)),
        ("scale", (0.3, 0.7)),
    ],
)
def test_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*expected .*; .*$") as error:
        Digits(**{field: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="index is 20, expected 0 to 19"):
        Digits(size=20)[20]
    with pytest.raises(IndexError, match="index is -1, expected 0 to 19"):
        Digits(size=20).handwritten(np.array([-1]))


def test_the_config_describes_the_source():
    data = DataConfig(source="digits", augmentation="trifeature", image_size=40)
    data.digits.train_size, data.digits.test_size, data.digits.seed = 30, 20, 3
    data.digits.digits, data.digits.textures, data.digits.colors = 9, 8, 7
    data.digits.texture_rotation, data.digits.texture_period = 10.0, 0.3
    data.digits.scale_min, data.digits.scale_max = 0.5, 0.6
    expected = Digits("train", 30, 40, 3, 9, 8, 7, 10.0, 0.3, (0.5, 0.6))
    assert open_source(data, "train") == expected
    test = open_views(data, "test", count=2, least_area=0.2)  # MoCo's augmentations and evaluation crop on the host
    np.testing.assert_array_equal(
        test.examples(np.arange(20))["image"], dataclasses.replace(expected, split="test", size=20).images()
    )
    assert [view.shape for view in test.views(3, [0.5] * test.random_crops.draws)] == [(40, 40, 3)] * 2


def test_the_recipes_do_not_mirror_digits():
    for name in ("simclr_digits", "ifm_simclr_digits"):
        config = recipes.load(name)
        assert (config.data.source, config.data.augmentation, config.data.augment.flip) == ("digits", "trifeature", 0)
        assert assembly.make_augmentation(config).flip == 0


@pytest.mark.slow
def test_a_run_is_trained_and_read_out(tmp_path):
    config = small.config(data__source="digits", data__digits__train_size=96, data__digits__test_size=64, steps=4)
    with small.light():
        training.train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
        result = suppression.read_out_workdir(tmp_path / "run")
    assert list(result.accuracy) == ["digit", "texture", "color"]
    assert result.step == 4
    assert all(0 <= percent <= 100 for percent in result.accuracy.values())
