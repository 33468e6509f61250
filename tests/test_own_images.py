"""A folder of one's own images, from pre-training to pictures: without labels, without held-out images, with few."""

import json
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from sklearn.neighbors import NearestNeighbors

from ifm_jax import assembly
from ifm_jax.data import holdout, open_source, training_batches
from ifm_jax.data.folder import open_folder
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate, linear, neighbors, pretrained, report
from ifm_jax.methods.method import Views
from ifm_jax.pretrain import step_rngs
from ifm_jax.runs import samples, training
from ifm_jax.runs.workdir import Workdir
from tests import small

IMAGES = 60
CLASSES = ("blue", "gray", "red")


@pytest.fixture(autouse=True, scope="module")
def light():
    with small.light():
        yield


def write(path: pathlib.Path, number: int) -> None:
    """Writes an image: noise of its own on the color of its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.array([(200, 60, 40), (128, 128, 128), (40, 50, 210)][number % 3])
    noise = np.random.default_rng(number).integers(-40, 40, (32, 32, 3))
    cv2.imwrite(str(path), np.clip(color + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A flat folder, without labels."""
    root = tmp_path_factory.mktemp("flat")
    for number in range(IMAGES):
        write(root / f"photo_{number:03d}.png", number)
    return root


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """The same images in a folder for each of three classes."""
    root = tmp_path_factory.mktemp("classes")
    for number in range(IMAGES):
        write(root / CLASSES[number % 3] / f"photo_{number:03d}.png", number)
    return root


def config(root, **fields):
    changes = {"data__source": f"folder:{root}", "data__augmentation": "moco_v2", "method": "simclr", "steps": 2}
    return small.config(**changes | fields)


def train(root, workdir, **fields):
    training.train(config(root, **fields), workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


@pytest.fixture(scope="module")
def run(flat, tmp_path_factory):
    return train(flat, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def labeled_run(classes, tmp_path_factory):
    return train(classes, tmp_path_factory.mktemp("labeled"))


def evaluated(run, output=None, quiet=True, wanted=None, **fields):
    """Evaluates a run; returns results.json."""
    settings = Workdir(run).read_config()
    for name, value in fields.items():
        group, _, field = name.partition("__")
        setattr(getattr(settings, group), field, value)
    output = output or run
    options = {"devices": jax.devices()[:1], "quiet": quiet}
    assert evaluate.evaluate(run, settings, output, wanted or evaluate.Wanted(), **options) is None
    return json.loads((pathlib.Path(output) / "results.json").read_text())


def test_an_image_is_held_out_by_its_own_name():
    """The same ones when images are added or the folder moves; at least one, and never all."""
    names = [f"{number}.jpg" for number in range(5000)]
    chosen = holdout.held_out(names)
    assert 0.08 < chosen.mean() < 0.12
    np.testing.assert_array_equal(holdout.held_out([*names[:300], "a.jpg"])[:300], chosen[:300])
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(holdout.held_out([names[place] for place in order]), chosen[order])
    for count in range(2, 30):
        assert 1 <= holdout.held_out(names[:count]).sum() < count
    assert holdout.held_out(names[:2], share=1.0).sum() == 1


def test_what_is_held_out_is_not_trained_on(flat, classes, tmp_path):
    """Pre-training has all images, as ever; of a folder with `val` an evaluation takes that."""
    options = {"count": 1, "least_area": 0.08}
    for root in (flat, classes):
        data = config(root).data
        parts = {split: holdout.open_evaluated(data, split, **options) for split in holdout.SPLITS}
        names = {split: {part.name(index) for index in range(len(part))} for split, part in parts.items()}
        assert names["train"] | names["test"] == names["all"]
        assert not names["train"] & names["test"]
        assert len(names["all"]) == IMAGES == len(open_source(data, "train"))
        assert open_source(data, "train").fingerprint == open_folder(str(root), "train", image_size=32).fingerprint
    data.limit = 20
    first = {open_source(data, "train").name(index) for index in range(20)}
    limited = holdout.open_evaluated(data, "train", **options)
    assert {limited.name(index) for index in range(len(limited))} == first - names["test"]

    write(tmp_path / "own" / "train" / "a.png", 0)
    with pytest.raises(UsageError, match="has a single image, of which none can be held out: expected at least 2"):
        holdout.open_evaluated(config(tmp_path / "own").data, "test", **options)
    write(tmp_path / "own" / "val" / "b.png", 1)
    own = config(tmp_path / "own").data
    for split in ("train", "test"):
        assert len(holdout.open_evaluated(own, split, **options)) == 1
    with pytest.raises(UsageError, match=r"split='all': .* has two sets of images; expected train or test"):
        holdout.open_evaluated(own, "all", **options)

    np.savez(tmp_path / "one.npz", images=np.zeros((50, 8, 8), np.uint8))
    np.savez(tmp_path / "two.npz", images=np.zeros((50, 8, 8), np.uint8), test_images=np.zeros((7, 8, 8), np.uint8))
    data.limit = 0
    for name, expected in {"one": 50, "two": 57}.items():
        data.source = f"array:{tmp_path}/{name}.npz"
        found = [len(holdout.open_evaluated(data, split, **options)) for split in ("train", "test")]
        assert sum(found) == expected
        assert min(found) > 0


@pytest.mark.slow
def test_pictures_and_features_need_no_labels(run, flat, tmp_path, capsys):
    names = {"features": "f.npz", "map": "map.png", "neighbors": "neighbors.png"}
    files = {flag: str(tmp_path / name) for flag, name in names.items()}
    with threadpoolctl.threadpool_limits(1):  # the map's threads would wait for each other more than they compute
        found = evaluated(run, tmp_path, quiet=False, wanted=evaluate.Wanted(**files))
    with np.load(files["features"]) as file:
        assert sorted(file) == ["features", "names"]
        assert list(file["names"]) == [str(flat / f"photo_{number:03d}.png") for number in range(IMAGES)]
        features = dict(zip(file["names"], file["features"], strict=True))
    for flag in ("map", "neighbors"):
        assert pathlib.Path(files[flag]).stat().st_size > 5000
    queries = found["neighbors"]["queries"]
    held_out = holdout.held_out([f"photo_{number:03d}.png" for number in range(IMAGES)])
    assert len(queries) == min(8, held_out.sum())
    bank = [str(flat / f"photo_{number:03d}.png") for number in np.flatnonzero(~held_out)]
    near = NearestNeighbors(n_neighbors=8, metric="cosine").fit([features[name] for name in bank])
    for query in queries:
        distance, place = near.kneighbors([features[query["image"]]])
        assert [each["image"] for each in query["neighbors"]] == [bank[index] for index in place[0]]
        np.testing.assert_allclose([each["similarity"] for each in query["neighbors"]], 1 - distance[0], atol=1e-5)
    said = capsys.readouterr().out
    assert f"has no held-out images of its own: {held_out.sum()} of its 60 are held out, chosen by their names" in said


@pytest.mark.parametrize("wanted", [{}, {"fast": True}, {"knn": True}])
def test_what_needs_labels_names_what_does_not(run, tmp_path, wanted):
    with pytest.raises(UsageError, match=r"has no labels, which --knn, .* need: .* --neighbors=FILE.png, .* need none"):
        evaluated(run, tmp_path, wanted=evaluate.Wanted(**wanted))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_an_accuracy_comes_with_its_baselines(labeled_run, tmp_path, capsys):
    """And with few classes without top-5, with few images with fewer neighbors."""
    wanted = evaluate.Wanted(fast=True, knn=True, fit_lr=True)
    fields = {"linear__epochs": 2, "linear__batch_size": 16, "linear__views": 1, "linear__milestones": ()}
    found = evaluated(labeled_run, tmp_path, quiet=False, wanted=wanted, **fields)
    of = pretrained.load(labeled_run, Workdir(labeled_run).read_config())
    train, test = of.images("train"), of.images("test")
    frequent = np.bincount(train.labels()["class"]).argmax()
    for name in ("knn", "logistic_regression", "linear_fast"):
        result = found[name]["class"]
        assert result["chance"] == pytest.approx(100 / 3)
        assert result["majority"] == pytest.approx(100 * np.mean(test.labels()["class"] == frequent))
        assert 0 <= result["untrained_top1"] <= 100
    assert found["knn"]["class"]["k"] == len(train)
    fast = found["linear_fast"]["class"]
    assert (fast["train_images"], fast["test_images"], fast["lr"]) == (len(train), len(test), 1.0)
    said = capsys.readouterr().out
    assert f"There are {len(train)} training images: all of them vote, not eval.neighbors=200." in said
    assert "top-5" not in said
    for text in ("nearest neighbors of 'class'", "Logistic regression (L-BFGS) of 'class'"):
        (line,) = [line for line in said.splitlines() if text in line]
        assert "(chance 33.33 %, always the most frequent class" in line
        assert "untrained network" in line

    untrained = pretrained.load(labeled_run, Workdir(labeled_run).read_config()).untrained(jax.devices()[:1])
    start = jax.jit(assembly.state_creator(untrained.config))()
    assert untrained.step == 0
    fresh = untrained.frozen(jax.devices()[:1])
    small.assert_same(fresh.weights[1], {name: start.batch_stats[name] for name in fresh.weights[1]})
    small.assert_same(fresh.weights[0], {name: start.params[name] for name in fresh.weights[0]})


@pytest.mark.slow
def test_results_of_other_settings_stay_side_by_side(labeled_run, tmp_path):
    """The newest is under the name of its evaluation; the history has all; the same settings replace their entry."""
    quick = evaluate.Wanted(knn=True, untrained=False)
    (tmp_path / "results.json").write_text('{"knn": {"class": {"top1": 1.0}}}')  # of an earlier version
    for k in (5, 9, 5):
        found = evaluated(labeled_run, tmp_path, wanted=quick, eval__neighbors=k)
        assert found["knn"]["class"]["k"] == k
    assert [entry["result"]["class"].get("k") for entry in found["history"]] == [None, 9, 5]
    assert [entry["settings"] and entry["settings"]["k"] for entry in found["history"]] == [None, 9, 5]

    short = {"linear__epochs": 1, "linear__milestones": (), "linear__batch_size": 32}
    for lr in ((1.0,), (2.0,), (1.0,)):
        found = evaluated(labeled_run, tmp_path, linear__lr=lr, **short)
        assert found["linear_full"]["class"]["lr"] == lr[0]
    history = [entry for entry in found["history"] if entry["evaluation"] == "linear_full"]
    assert [entry["settings"]["linear"]["lr"] for entry in history] == [[2.0], [1.0]]
    assert sorted(path.name for path in tmp_path.glob("linear-*")) == ["linear-full", "linear-full-2"]
    of = pretrained.load(labeled_run, Workdir(labeled_run).read_config())
    with pytest.raises(UsageError, match="belongs to another evaluation"):
        linear.run(of, tmp_path / "linear-full", devices=jax.devices()[:1], quiet=True)


def test_one_class_is_nothing_to_classify(tmp_path):
    for number in range(4):
        write(tmp_path / "cat" / f"{number}.png", number)
    with pytest.raises(UsageError, match=r"has a single class, 'cat', so there is nothing to classify"):
        pretrained.labeled(config(tmp_path), "train")


@pytest.mark.parametrize("source", ["folder", "trifeature"])
def test_samples_are_the_views_of_the_first_step(flat, source):
    """Cut on the host, or on the device."""
    of_run = config(flat) if source == "folder" else small.config()
    of_run = assembly.resolve(of_run)
    images = open_source(of_run.data, "train")
    wholes, views = samples.first_views(of_run, images, len(images), 5)
    batches = training_batches(images, of_run.batch_size, seed=of_run.seed, indices=True)
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(wholes, images.examples(batch["index"][:5])["image"])
    cut = jnp.asarray(batch["views"][:, 0]), jnp.asarray(batch["views"][:, -1])
    rngs = step_rngs(assembly.initial_rngs(of_run)[1], jnp.zeros((), jnp.int32))
    made = Views(cut, (rngs[0], rngs[1]), assembly.make_augmentation(of_run))
    for number in (0, 1):
        np.testing.assert_allclose(views[number], made(number)[:5], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_samples_are_drawn_once_and_never_stop_a_run(flat, tmp_path, monkeypatch, capsys):
    drawn = []

    def draw(config, source, size, path):
        drawn.append(size)
        if len(drawn) == 1:
            raise MemoryError("no room")
        samples.draw_samples(np.zeros((3, 8, 8, 3), np.uint8), [np.zeros((3, 8, 8, 3))] * 2, path)

    monkeypatch.setattr(samples, "draw", draw)
    options = {"devices": jax.devices()[:1]}
    for steps in (1, 2, 3):
        assert training.train(config(flat, steps=steps), tmp_path, **options).stopped_by is None
    assert drawn == [IMAGES, IMAGES]
    assert (tmp_path / "samples.png").stat().st_size > 1000
    captured = capsys.readouterr()
    assert "samples.png is not drawn: MemoryError: no room" in captured.out + captured.err


def test_colors_are_those_that_classes_are_named_after():
    assert report.class_colors(("red", "White", "cyan")) == ["#FF0000", "#FFFFFF", "#00FFFF"]
    for count in (2, 10, 15, 40):
        colors = report.class_colors([f"red{number}" for number in range(count)])
        assert len({tuple(color) for color in colors}) == count


def test_pictures_in_a_map_do_not_hide_each_other():
    points = np.random.default_rng(0).normal(size=(500, 2)) * (3, 100)
    chosen = report.thumbnails(points, most=60, across=10)
    assert 20 < len(chosen) <= 60
    scaled = points[chosen] / (points.max(axis=0) - points.min(axis=0)) * 10
    apart = np.abs(scaled[:, None] - scaled[None]).max(axis=2) + 9 * np.eye(len(chosen))
    assert apart.min() >= 1


def test_queries_are_spread_evenly():
    assert list(neighbors.spread(300, 3)) == [50, 150, 250]
    assert list(neighbors.spread(5)) == [0, 1, 2, 3, 4]
    assert list(neighbors.spread(1)) == [0]
