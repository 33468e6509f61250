"""The embedded images: reproducible, balanced, distinguishable, cached."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from ifm_jax import drawing
from ifm_jax.data import trifeature
from ifm_jax.data.trifeature import Trifeature

# Labels and central pixels of the first four images of the default source, and a digest of the first 64.
GOLDEN_LABELS = [[4, 1, 2, 0], [5, 5, 0, 7], [4, 8, 4, 6]]
GOLDEN_PIXELS = [[6, 23, 25], [126, 61, 207], [51, 209, 224], [35, 19, 4]]
GOLDEN_HASH = "409a6e27b3658369"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trifeature"


def test_example_has_image_and_labels():
    source = Trifeature("train", size=10, image_size=40)
    example = source[7]
    assert len(source) == 10
    assert example["image"].dtype == np.uint8
    assert example["image"].shape == (40, 40, 3)
    for name, names in source.label_names.items():
        assert type(example[name]) is int
        assert example[name] == source.labels()[name][7]
        assert len(names) == len(set(names)) == 10


def test_image_depends_on_its_index_only():
    indices = np.array([5, 901, 5, 33, 0])
    batch = Trifeature(size=1000).examples(indices)
    for source in (Trifeature(size=1000), Trifeature(size=902)):
        for place, index in enumerate(indices):
            alone = source[int(index)]
            np.testing.assert_array_equal(alone["image"], batch["image"][place])
            assert [alone[name] for name in source.label_names] == [batch[name][place] for name in source.label_names]
    # More images than one pass of the drawing loop takes.
    np.testing.assert_array_equal(Trifeature(size=1000).images()[indices], batch["image"])


@pytest.mark.slow
def test_drawing_is_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np; from ifm_jax.data.trifeature import Trifeature;"
        "images = Trifeature(seed=3, image_size=48).examples(np.arange(50))['image'];"
        "print(hashlib.sha256(images.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    images = Trifeature(seed=3, image_size=48).examples(np.arange(50))["image"]
    assert there == hashlib.sha256(images.tobytes()).hexdigest()


def test_drawing_is_that_of_its_version():
    """If this fails on purpose, raise DRAWING_VERSION: users have files drawn by the former code in their caches."""
    source = Trifeature("train", size=64, image_size=32, seed=0)
    batch = source.examples(np.arange(4))
    assert trifeature.DRAWING_VERSION == 1
    assert [batch[name].tolist() for name in source.label_names] == GOLDEN_LABELS
    assert batch["image"][:, 16, 16].tolist() == GOLDEN_PIXELS
    assert hashlib.sha256(source.images().tobytes()).hexdigest()[:16] == GOLDEN_HASH


def test_drawing_needs_no_jax():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, trifeature.__file__], check=False).returncode == 0


def test_splits_and_seeds_share_nothing():
    sources = [Trifeature("train", size=2000), Trifeature("test", size=2000), Trifeature("train", size=2000, seed=1)]
    draws = [source._uniforms(np.arange(2000)) for source in sources]
    assert len(np.unique(np.concatenate(draws, axis=1))) == 3 * draws[0].size
    digests = {image.tobytes() for source in sources for image in source.examples(np.arange(2000))["image"]}
    assert len(digests) == 6000


def test_labels_are_uniform_and_independent():
    labels = Trifeature(size=50_000, seed=11).labels()
    for name, values in labels.items():
        assert values.dtype == np.int32
        assert scipy.stats.chisquare(np.bincount(values, minlength=10)).pvalue > 1e-4, name
    for first, second in (("shape", "texture"), ("shape", "color"), ("texture", "color")):
        table = np.zeros((10, 10))
        np.add.at(table, (labels[first], labels[second]), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-4, (first, second)


def test_fewer_classes_take_the_first_ones():
    source = Trifeature(size=3000, num_shapes=6, num_textures=2, num_colors=3)
    assert {name: len(names) for name, names in source.label_names.items()} == {"shape": 6, "texture": 2, "color": 3}
    assert [int(labels.max()) for labels in source.labels().values()] == [5, 1, 2]
    assert source.label_names["shape"] == trifeature.SHAPES[:6]


def test_draws_look_independent_and_uniform():
    uniforms = Trifeature()._uniforms(np.arange(20_000))
    for draws in uniforms:
        assert scipy.stats.kstest(draws, "uniform").pvalue > 1e-5
    np.testing.assert_array_less(np.abs(np.corrcoef(uniforms) - np.eye(len(uniforms))), 0.04)
    np.testing.assert_array_less(np.abs([np.corrcoef(d[:-1], d[1:])[0, 1] for d in uniforms]), 0.04)


@pytest.mark.parametrize("image_size", [32, 224])
def test_the_shape_is_whole_and_the_background_is_grey(image_size):
    source = Trifeature(size=400, image_size=image_size, noise=0.0, scale=(0.8, 0.8))
    images = source.examples(np.flatnonzero(source.labels()["shape"] == trifeature.SHAPES.index("circle")))["image"]
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert np.ptp(corners, axis=(1, 2)).max() == 0
    assert corners.min() >= 90
    assert corners.max() <= 140
    area = (np.abs(images - corners[:, :1, None]) > 4).any(-1).sum((1, 2))
    circle = np.pi * (0.86 * 0.4 * image_size) ** 2
    outline = 2 * np.pi * 0.86 * 0.4 * image_size
    assert np.abs(area - circle).max() < outline


def test_noise_is_grey_and_as_strong_as_asked():
    quiet, noisy = (Trifeature(size=50, noise=noise).images().astype(int) for noise in (0.0, 0.1))
    difference = (noisy - quiet)[:, :2]  # near the upper border it is mostly background
    assert np.abs(difference).max() <= 26
    assert difference.std() == pytest.approx(0.1 * 255 / 3**0.5, rel=0.1)
    assert np.abs(np.diff(difference, axis=-1)).mean() < 0.1


def test_rotation_is_bounded():
    """A square that is never turned has upright edges; one that is turned by up to 45 degrees has not."""
    tables = {}
    for rotation in (0.0, 45.0):
        source = Trifeature(size=2000, image_size=64, rotation=rotation, noise=0.0, scale=(0.8, 0.8))
        chosen = source.examples(np.flatnonzero(source.labels()["shape"] == trifeature.SHAPES.index("square"))[:50])
        images = chosen["image"].astype(int)
        mask = (np.abs(images - images[:, :1, :1]) > 4).any(-1)
        tables[rotation] = mask.any(1).sum(1)  # the width of the square
    side = 0.8 * 64 * 0.7
    assert np.abs(tables[0.0] - side).max() <= 2
    assert tables[45.0].min() >= side - 2
    assert tables[45.0].max() > 1.3 * side


@pytest.mark.parametrize("image_size", [32, 224])
def test_textures_have_equal_light_and_differ(image_size):
    tile = drawing.texture_tile(image_size, 0.2).astype(float)
    np.testing.assert_allclose(tile.mean((1, 2)), 0.55, rtol=1e-5)
    np.testing.assert_allclose(tile.std((1, 2)), 0.42, rtol=1e-5)
    # Dark is all but black and light is the color: what a pixel cannot show is a fiftieth of the range below.
    assert -0.03 < tile.min() < 0.1
    assert tile.max() < 1.16
    # No shift makes one pattern another: the greatest correlation over all shifts stays well below one.
    spectra = np.fft.rfft2((tile - 0.55) / 0.42 / tile.shape[1])
    correlations = [np.abs(np.fft.irfft2(a * b.conj())).max() for i, a in enumerate(spectra) for b in spectra[:i]]
    assert max(correlations) < 0.9


@pytest.mark.parametrize("image_size", [32, 224])
def test_textures_have_no_seam(image_size):
    """Across the edge of the tile the pattern goes on as it does inside: no more and no fewer light-dark steps."""
    tile = drawing.texture_tile(image_size, 0.2)
    for axis in (1, 2):
        steps = np.abs(tile - np.roll(tile, 1, axis)).mean(axis=3 - axis)
        assert (steps[:, 0] <= steps.max(axis=1) * (1 + 1e-6)).all()
        assert (steps[:, 0] <= np.partition(steps, -4, axis=1)[:, -4] + 1e-6).all()


def test_shapes_fill_different_pixels():
    inside = trifeature._shape_table(32) < 0
    place = (np.arange(inside.shape[1]) + 0.5) / inside.shape[1] * 2.5 - 1.25
    radius = np.hypot(*np.meshgrid(place, place))
    assert not inside[:, radius > 1.02].any()
    overlaps = [(a & b).sum() / (a | b).sum() for i, a in enumerate(inside) for b in inside[:i]]
    assert max(overlaps) < 0.85


def test_signed_distances_have_unit_slope():
    """Otherwise the outline would be blurred or jagged."""
    table = trifeature._shape_table(224)
    slopes = np.hypot(*np.gradient(table, 2.5 / table.shape[1], axis=(1, 2)))
    near = np.abs(table) < 0.03
    assert np.median(slopes[near]) == pytest.approx(1, abs=0.01)
    assert (np.abs(slopes[near] - 1) < 0.1).mean() > 0.9


def test_colors_can_be_told_by_hue():
    source = Trifeature(size=4000)
    images, color = source.images()[:, 8:24, 8:24].astype(float), source.labels()["color"]
    chroma = images / np.maximum(images.sum(-1, keepdims=True), 1)
    strongest = (chroma.std(-1)).reshape(4000, -1).argsort(1)[:, -40:]
    features = np.take_along_axis(chroma.reshape(4000, -1, 3), strongest[..., None], 1).mean(1)
    centers = np.stack([features[:2000][color[:2000] == c].mean(0) for c in range(10)])
    guess = np.linalg.norm(features[2000:, None] - centers, axis=2).argmin(1)
    assert (guess == color[2000:]).mean() > 0.95


def test_disk_cache_round_trip(cache):
    source = Trifeature(size=300, seed=5)
    drawn = source.examples(np.arange(300))["image"]
    np.testing.assert_array_equal(source.images(), drawn)
    (file,) = cache.iterdir()
    assert np.load(file).shape == (300, 32, 32, 3)
    again = Trifeature(size=300, seed=5)
    assert isinstance(again.images(), np.memmap)
    assert not again.images().flags.writeable
    np.testing.assert_array_equal(again.images(), drawn)
    np.testing.assert_array_equal(again.examples(np.array([7, 3]))["image"], drawn[[7, 3]])
    again[0]["image"][:] = 0  # what a caller gets is his own
    np.testing.assert_array_equal(again[0]["image"], drawn[0])
    Trifeature(size=300, seed=6).images()
    assert len(list(cache.iterdir())) == 2


def test_cached_images_are_not_drawn_again(monkeypatch):
    Trifeature(size=20).images()
    monkeypatch.setattr(Trifeature, "_draw", None)
    source = Trifeature(size=20)
    assert source.images() is source.images()
    assert source[3]["image"].any()


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_broken_cache_file_is_replaced(cache, content):
    drawn = Trifeature(size=20).examples(np.arange(20))["image"]
    Trifeature(size=20).images()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if content is None else content)
    np.testing.assert_array_equal(Trifeature(size=20).images(), drawn)
    assert file.read_bytes() == whole


def test_unwritable_cache_falls_back_to_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "file" / "below"))
    source = Trifeature(size=20)
    np.testing.assert_array_equal(source.images(), Trifeature(size=20).examples(np.arange(20))["image"])
    assert not isinstance(source.images(), np.memmap)
    assert not source.images().flags.writeable


def test_interrupted_write_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trifeature, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trifeature(size=20).images()
    assert list(cache.iterdir()) == []


def test_pickles_small_and_draws_the_same():
    source = Trifeature(size=50)
    source.images()
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data) == source
    np.testing.assert_array_equal(pickle.loads(data)[9]["image"], source[9]["image"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "valid"),
        ("size", 0),
        ("image_size", 31),
        ("image_size", 225),
        ("seed", -1),
        ("num_shapes", 11),
        ("num_textures", 1),
        ("num_colors", 0),
        ("rotation", -1.0),
        ("scale", (0.9, 0.7)),
        ("scale", (0.7, 1.1)),
        ("noise", 2.0),
    ],
)
def test_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*expected .*; .*$") as error:
        Trifeature(**{field: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", [-1, 20, 10**12])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"index is {index}, expected 0 to 19"):
        Trifeature(size=20)[index]


def test_iteration_ends_and_indices_must_be_integers():
    assert sum(1 for _ in Trifeature(size=5)) == 5
    with pytest.raises(ValueError, match="expected integers"):
        Trifeature(size=5).examples(np.array([0.5]))
    assert Trifeature(size=5).examples(np.array([], int))["image"].shape == (0, 32, 32, 3)
