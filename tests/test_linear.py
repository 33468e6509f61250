"""Linear evaluation: the original's protocol, on any number of devices, stopped and gone on with."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
import threadpoolctl
import torch

from ifm_jax.augment import normalize
from ifm_jax.data import ViewSource, open_source, pipeline
from ifm_jax.data.array import open_array
from ifm_jax.data.sources import drawn
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import classifiers, evaluate, features, linear, pretrained
from ifm_jax.runs import loop, metrics_log, training
from ifm_jax.runs.workdir import Workdir
from tests import small

LABELS = ("shape", "texture", "color")


@pytest.fixture(autouse=True, scope="module")
def light():
    with small.light(curves=True):
        yield


@pytest.fixture(autouse=True)
def _without_curves(request, monkeypatch):
    """Drawn once, by the evaluation that all have in common."""
    if "full" in request.fixturenames:
        request.getfixturevalue("full")
    monkeypatch.setattr(loop.Recorder, "draw", lambda self: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on 60 training images and 37 held-out ones, no multiple of any batch."""
    workdir = tmp_path_factory.mktemp("run")
    config = small.config(steps=2, data__trifeature__train_size=60, data__trifeature__test_size=37, moco__queue_size=48)
    training.train(config, workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


def of(run, **fields):
    """The run as it is evaluated: three epochs, the middle one's end a milestone."""
    config = Workdir(run).read_config()
    changes = {"epochs": 3, "milestones": (2,), "batch_size": 16, "lr": (1.0,)} | fields
    for name, value in changes.items():
        holder, _, field = name.rpartition("__")
        setattr(getattr(config, holder) if holder else config.linear, field or name, value)
    return pretrained.load(run, config)


def results(run, directory, *, devices=1, fast=False, **fields):
    return linear.run(of(run, **fields), directory, fast=fast, devices=jax.devices()[:devices], quiet=True)


@pytest.fixture(scope="module")
def full(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    return results(run, directory), directory


@pytest.mark.slow
def test_every_label_is_evaluated_on_every_image(full):
    found, directory = full
    assert tuple(found) == LABELS
    for label, result in found.items():
        assert (result.label, result.protocol, result.classes) == (label, "full", 10)
        assert (result.train_images, result.test_images) == (60, 37)
        (head,) = result.heads
        for value in (head.top1, head.top5, head.best_top1):
            assert value * 37 / 100 == pytest.approx(round(value * 37 / 100), abs=1e-9)
        assert head.top1 <= head.top5
        assert head.best_top1 >= head.top1
        assert head.holdout_top1 is None
    records = metrics_log.read(directory / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["lr"] for record in records] == pytest.approx([1.0] * 8 + [0.1] * 4)
    evaluated = [record for record in records if "heads" in record]
    assert [record["epoch"] for record in evaluated] == [1, 2, 3]
    assert evaluated[-1]["val_acc1/shape"] == found["shape"].best.top1
    assert (directory / "curves.png").exists()


@pytest.mark.torch
def test_the_training_is_pytorchs(run, full):
    """The same crops through the same backbone into torch's own linear layer: losses and accuracy agree."""
    of_run = of(run)
    frozen = of_run.frozen(jax.devices()[:1])
    source, test = (pretrained.labeled(of_run.config, split) for split in ("train", "test"))
    views = linear._Views(frozen, of_run.config, source, ["shape"], None)
    start = classifiers.create(jax.random.fold_in(jax.random.key(0), 0), 1, frozen_features(frozen, test).shape[1], 10)
    fc = torch.nn.Linear(*reversed(start.params["weight"][0].shape))
    fc.weight.data = torch.tensor(np.asarray(start.params["weight"][0]))
    fc.bias.data.zero_()
    optimizer = torch.optim.SGD(fc.parameters(), 1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    compute = jax.jit(views.features)
    batches, losses = views.fresh(0), []
    for _ in range(3):
        for step in range(4):
            batch = next(batches)
            assert batch["weight"].sum() == (16 if step < 3 else 12)
            of_images = torch.tensor(np.asarray(compute(frozen.weights, batch)))[batch["weight"] > 0]
            labels = torch.tensor(batch["label/shape"][batch["weight"] > 0]).long()
            loss = torch.nn.functional.cross_entropy(fc(of_images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        schedule.step()

    theirs = fc(torch.tensor(frozen_features(frozen, test))).argmax(1).numpy()
    found, directory = full
    assert found["shape"].best.top1 == pytest.approx(100 * np.mean(theirs == test.labels()["shape"]))
    only = results(run, directory.parent / "only", data__label="shape")
    assert tuple(only) == ("shape",)
    assert only["shape"].best == found["shape"].best
    ours = [record["loss"] for record in metrics_log.read(directory.parent / "only" / "metrics.jsonl")]
    np.testing.assert_allclose(ours, losses, rtol=1e-4)


def frozen_features(frozen, source):
    return features.extract(frozen, source, 16)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_features_do_not_depend_on_devices_or_batch(run, devices):
    of_run = of(run)
    test = pretrained.labeled(of_run.config, "test")
    one = of_run.frozen(jax.devices()[:1])
    plain = frozen_features(one, test)
    images = normalize(test.examples(np.arange(37))["image"] / np.float32(255))
    np.testing.assert_allclose(plain, one.apply(one.weights, images), rtol=1e-5, atol=1e-6)
    for batch_size in (7, 64):
        split = features.extract(of_run.frozen(jax.devices()[:devices]), test, batch_size)
        np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_stopped_and_gone_on_with_it_is_the_same(run, full, tmp_path, monkeypatch):
    """SIGTERM arrives while the first epoch's end is evaluated; the step after it is the last."""
    evaluate_held = linear._Held.evaluate

    def interrupted(self, state):
        signal.raise_signal(signal.SIGTERM)
        return evaluate_held(self, state)

    monkeypatch.setattr(linear._Held, "evaluate", interrupted)
    stopped = results(run, tmp_path / "probe")
    assert stopped == loop.Outcome(4, 12, signal.SIGTERM)
    monkeypatch.undo()
    found = results(run, tmp_path / "probe")
    assert found == full[0]
    lines = [small.without_speed(metrics_log.read(path / "metrics.jsonl")) for path in (tmp_path / "probe", full[1])]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(12,), (9, 12)])
def test_damaged_checkpoints_of_an_evaluation_are_set_aside(run, full, tmp_path, steps):
    """It goes on from the one before, or starts afresh: the results are the same."""
    probe = shutil.copytree(full[1], tmp_path / "probe")
    for step in steps:
        (probe / "checkpoints" / str(step) / "state" / "_METADATA").write_text("{")
    assert results(run, probe) == full[0]
    assert sorted(path.name for path in (probe / "damaged").iterdir()) == sorted(map(str, steps))


def test_one_evaluation_at_a_time_in_a_directory(run, tmp_path):
    (tmp_path / "probe").mkdir()
    with (
        Workdir(tmp_path / "probe", "--output").locked(),
        pytest.raises(UsageError, match=r"is in use by process .* --output"),
    ):
        results(run, tmp_path / "probe")


@pytest.mark.slow
def test_as_many_kept_views_as_epochs_are_the_full_protocol(run, full, tmp_path):
    found = results(run, tmp_path / "fast", fast=True, views=3)
    for label in LABELS:
        assert found[label].protocol == "fast"
        assert found[label].heads == full[0][label].heads
    fewer = results(run, tmp_path / "fewer", fast=True, views=0, data__label="color")
    assert fewer["color"].test_images == 37


@pytest.mark.slow
def test_the_best_of_a_sweep_is_chosen_on_training_images(run, tmp_path):
    found = results(run, tmp_path / "sweep", devices=2, lr=(1e-4, 1.0), weight_decay=(0.0, 1e-3), data__label="color")
    result = found["color"]
    assert (result.train_images, result.test_images) == (54, 37)
    assert [(head.lr, head.weight_decay) for head in result.heads] == [(1e-4, 0), (1e-4, 1e-3), (1, 0), (1, 1e-3)]
    aside = [head.holdout_top1 for head in result.heads]
    assert result.best.holdout_top1 == max(aside)
    assert result.to_dict()["top1"] == result.best.top1
    # A head is the same alone, where nothing is set aside; so on the same 54 images it is not comparable: only that
    # the others do not count is tested in test_heads.


@pytest.mark.slow
def test_a_directory_is_one_evaluations(run, full):
    with pytest.raises(UsageError, match=r"belongs to another evaluation \(linear.lr differ\): pass another --output"):
        results(run, full[1], lr=(2.0,))


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said(run, tmp_path):
    config = Workdir(run).read_config()
    config.data.label = "size"
    with pytest.raises(
        UsageError, match=r"data.label='size' is not a label of .*: expected one of shape, texture, color"
    ):
        pretrained.labeled(pretrained.load(run, config).config, "train")
    config = Workdir(run).read_config()
    config.model.arch = "resnet18"
    with pytest.raises(
        UsageError, match=r"the config does not fit .*model.arch='resnet18', but the tensors have 'resnet8'"
    ):
        pretrained.load(run, config)
    np.savez(tmp_path / "bare.npz", images=np.zeros((20, 32, 32, 3), np.uint8))
    config = Workdir(run).read_config()
    config.data.source, config.data.augmentation = f"array:{tmp_path}/bare.npz", "moco_v2"
    with pytest.raises(UsageError, match=r"has no labels, which --knn, .* need: expected a folder for each class"):
        pretrained.labeled(pretrained.load(run, config).config, "train")
    with pytest.raises(UsageError, match=r"linear.batch_size=16 is not a multiple of the 3 devices"):
        results(run, tmp_path / "three", devices=3)


@pytest.mark.slow
def test_all_at_once(run, tmp_path, capsys, monkeypatch):
    """Nearest neighbors, diagnostics, features and a map, from the script's function."""
    shutil.copytree(run, tmp_path / "run")
    wanted = evaluate.Wanted(
        knn=True, diagnostics=True, features=str(tmp_path / "f.npz"), map=str(tmp_path / "map.png"), split="test"
    )
    options = {"devices": jax.devices()[:2]}
    extracted, extract = [], features.extract
    for module in (pretrained, evaluate, linear):
        monkeypatch.setattr(
            module, "extract", lambda frozen, source: extracted.append(len(source)) or extract(frozen, source)
        )
    config = Workdir(run).read_config()
    with threadpoolctl.threadpool_limits(1):  # the map's threads would wait for each other more than they compute
        assert evaluate.evaluate(tmp_path / "run", config, tmp_path / "run", wanted, **options) is None
    assert sorted(extracted) == [37, 37, 60, 60]  # each split once, and once for the untrained network
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(found) == {"knn", "diagnostics", "history"}
    assert set(LABELS) < set(found["knn"])
    assert found["knn"]["shape"]["k"] == 60
    assert found["knn"]["shape"]["test_images"] == found["diagnostics"]["images"] == 37
    assert found["diagnostics"]["positive_mean"] > found["diagnostics"]["negative_mean"]
    assert 1 <= found["diagnostics"]["effective_rank"] <= 37
    said = capsys.readouterr().out
    assert "60 nearest neighbors of 'shape': top-1" in said
    with np.load(tmp_path / "f.npz") as file:
        frozen = of(run).frozen(jax.devices()[:1])
        source = pretrained.labeled(of(run).config, "test")
        np.testing.assert_allclose(file["features"], frozen_features(frozen, source), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(file["label_color"], source.labels()["color"])
        assert list(file["classes_color"])[:2] == ["red", "green"]
        assert file["names"][3] == "image 3"
    for name in ("map.png", "run/similarities.png"):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.slow
def test_diagnostics_are_of_images_drawn_at_random(run, monkeypatch):
    """Of a source that cuts no views, too; the embeddings are of the same images as the features."""
    read = []
    monkeypatch.setattr(
        evaluate, "training_batches", lambda *args, **options: read.append(args[0]) or batches(*args, **options)
    )
    monkeypatch.setattr(evaluate, "extract", lambda frozen, source: read.append(source) or extract(frozen, source))
    batches, extract = pipeline.training_batches, features.extract
    found = evaluate.diagnose(of(run, eval__images=12), jax.devices()[:1])
    assert found["images"] == 12
    assert sum(found["positive_histogram"]) == 12
    assert [isinstance(source, ViewSource) for source in read] == [False, True]  # views as in training, and the image
    for source in read:
        np.testing.assert_array_equal(source.indices, np.sort(np.random.default_rng(0).permutation(37)[:12]))
    assert len(read) == 2


def test_a_part_drawn_at_random_has_all_classes(tmp_path):
    """Of a source sorted by class; it depends on the seed alone and is what the source is: of views or not."""
    np.savez(tmp_path / "sorted.npz", images=np.zeros((1000, 8, 8), np.uint8), labels=np.arange(1000) // 5)
    source = open_array(str(tmp_path / "sorted.npz"), "train", image_size=8)
    part = drawn(source, 400, 0)
    assert isinstance(part, ViewSource)
    assert len(set(part.labels()["class"])) > 170
    assert part.fingerprint == drawn(source, 400, 0).fingerprint != drawn(source, 400, 1).fingerprint
    assert [part.name(place) for place in (0, 399)] == [f"image {part.indices[place]}" for place in (0, 399)]
    assert drawn(source, 0, 0) is drawn(source, 1000, 0) is source
    plain = drawn(small_trifeature(), 10, 0)
    assert not isinstance(plain, ViewSource)
    np.testing.assert_array_equal(plain.examples(np.arange(10))["color"], plain.labels()["color"])


def small_trifeature():
    return open_source(small.config().data, "test")


@pytest.mark.slow
def test_records_and_projections(run, tmp_path):
    from array_record.python import array_record_data_source
    from flax import serialization

    wanted = evaluate.Wanted(features=str(tmp_path / "f.array_record"), layer="projection")
    config = Workdir(run).read_config()
    evaluate.evaluate(run, config, tmp_path / "out", wanted, devices=jax.devices()[:1], quiet=True)
    records = array_record_data_source.ArrayRecordDataSource(str(tmp_path / "f.array_record"))
    assert len(records) == 37
    record = serialization.msgpack_restore(records[5])
    assert record["features"].shape == (8,)
    assert np.linalg.norm(record["features"]) == pytest.approx(1, rel=1e-5)
    assert record["label_shape"] == pretrained.labeled(config, "test").labels()["shape"][5]
    for flag, suffixes in {"features": ".npz or .array_record", "map": ".png"}.items():
        wanted = evaluate.Wanted(**{flag: str(tmp_path / "f.txt")})
        with pytest.raises(UsageError, match=f"--{flag}=.*f.txt: expected a name that ends in {suffixes}"):
            evaluate.evaluate(run, config, tmp_path / "out", wanted, quiet=True)
