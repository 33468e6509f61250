"""Data sets of TensorFlow Datasets, prepared and read without TensorFlow."""

import importlib.util
import json
import pickle
import shutil
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ifm_jax.config import DataConfig
from ifm_jax.data import open_source, training_batches
from ifm_jax.data.tfds import open_tfds
from ifm_jax.errors import UsageError

NAMES = ("snake", "newt", "toad")


class Reptiles(tfds.core.GeneratorBasedBuilder):
    """Twenty training images of one color each, four for validation, three without a label."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=NAMES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(20),
            "validation": self._generate_examples(4),
            "unlabelled": self._generate_examples(3),
        }

    def _generate_examples(self, count):
        for number in range(count):
            pixels = np.full((24, 30, 3), 10 * number, np.uint8)
            label = -1 if count == 3 else number % 3
            yield number, {"image": cv2.imencode(".png", pixels)[1].tobytes(), "label": label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Reptiles(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def root(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))  # which it read when it was imported
    return prepared


def config(source="tfds:reptiles", **fields):
    return DataConfig(source=source, image_size=16, augmentation="moco_v2", **fields)


def test_it_is_read_without_tensorflow(root):
    assert importlib.util.find_spec("tensorflow") is None
    for name in ("tfds:reptiles", "tfds:reptiles:1.0.0", f"tfds:{root}/reptiles/1.0.0"):
        train, test = open_source(config(name), "train"), open_source(config(name), "test")
        assert (len(train), len(test)) == (20, 4)
    assert train.label_names == {"label": NAMES}
    records = train.records
    np.testing.assert_array_equal(train.labels()["label"], [record["label"] for record in records])
    batch = train.examples(np.array([3, 0]))
    levels = [cv2.imdecode(np.frombuffer(records[i]["image"], np.uint8), 1)[0, 0, 0] for i in (3, 0)]
    np.testing.assert_array_equal(
        batch["image"], np.array(levels, np.uint8)[:, None, None, None] + np.zeros_like(batch["image"])
    )
    np.testing.assert_array_equal(batch["label"], np.array(levels) // 10 % 3)
    assert "tensorflow" not in sys.modules


def test_it_travels_to_worker_processes(root):
    source = open_source(config(), "train")
    copy = pickle.loads(pickle.dumps(source))
    for ours, theirs in zip(source.views(5, [0.4] * 44), copy.views(5, [0.4] * 44), strict=True):
        assert ours.shape == (16, 16, 3)
        np.testing.assert_array_equal(ours, theirs)
    batch = next(training_batches(source, 8, seed=0))
    assert batch["views"].shape == (8, 2, 16, 16, 3)


def test_splits(root):
    both = open_source(config(train_split="train+unlabelled"), "train")
    assert len(both) == 23
    assert sorted(both.labels()["label"])[:4] == [-1, -1, -1, 0]
    assert len(open_source(config(test_split="train[:5]"), "test")) == 5
    with pytest.raises(UsageError, match="no split 'nix'; expected one of 'train', 'unlabelled', 'validation', or"):
        open_source(config(train_split="nix"), "train")


def test_chosen_classes_are_numbered_anew_and_remembered(root, tmp_path, monkeypatch):
    (tmp_path / "names").write_text("toad\nsnake\n")
    for _ in range(2):
        chosen = open_source(config(classes=str(tmp_path / "names")), "train")
        assert chosen.label_names == {"label": ("snake", "toad")}
        labels = chosen.labels()["label"]
        assert np.bincount(labels).tolist() == [7, 6]
        levels = chosen.examples(np.arange(13))["image"][:, 0, 0, 0]
        np.testing.assert_array_equal(labels, np.where(levels // 10 % 3 == 0, 0, 1))
        monkeypatch.setattr("ifm_jax.data.tfds.Tfds._read_labels", None)  # the second time they are known
    (tmp_path / "names").write_text("crow\n")
    with pytest.raises(UsageError, match="'crow' is not among the 3 classes of reptiles"):
        open_source(config(classes=str(tmp_path / "names")), "train")


def test_a_damaged_record_is_named(root):
    source = open_tfds("reptiles", "train", image_size=16)
    source.records = [{"image": b"no image"}]
    with pytest.raises(RuntimeError, match=r"reptiles/1.0.0 train record 0 cannot be read \(not an image, or a broken"):
        source.views(0, [0.5] * 44)


@pytest.mark.parametrize("way", ["plain", "snake", "nested", "legacy", "by name"])
def test_no_module_that_a_data_set_names_is_imported(root, tmp_path, monkeypatch, way):
    (tmp_path / "evil_feature.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "reptiles" / "1.0.0"
    shutil.copytree(root / "reptiles" / "1.0.0", folder)
    features, evil = json.loads((folder / "features.json").read_text()), "evil_feature.Image"
    parts = features["featuresDict"]["features"]
    if way == "snake":
        del parts["image"]["pythonClassName"]
        parts["image"]["python_class_name"] = evil
    elif way == "nested":
        inner = json.dumps({"image": {"type": evil, "content": {}}})
        features = {"pythonClassName": features["pythonClassName"], "jsonFeature": {"json": inner}}
    elif way == "legacy":
        old = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        features = {"type": old, "content": {"image": {"type": evil, "content": {}}}}
    else:
        parts["image"]["pythonClassName"] = evil
    (folder / "features.json").write_text(json.dumps(features))
    name = str(folder)
    if way == "by name":
        name = "reptiles"
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(
        UsageError, match=r"names the class 'evil_feature.Image', which would run code from outside"
    ) as caught:
        open_tfds(name, "train", image_size=16)
    assert "\n" not in str(caught.value)
    assert "evil_feature" not in sys.modules


def test_a_feature_may_be_called_type(root, tmp_path):
    folder = tmp_path / "1.0.0"
    shutil.copytree(root / "reptiles" / "1.0.0", folder)
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["type"] = features["featuresDict"]["features"].pop("label")
    (folder / "features.json").write_text(json.dumps(features))
    assert set(open_tfds(str(folder), "train", image_size=16).label_names) == {"type"}
    (folder / "features.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"cannot be opened \(.*\): expected the name of a data set"):
        open_tfds(str(folder), "train", image_size=16)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_damaged_remembered_labels_are_read_anew(root, tmp_path, content):
    labels = open_source(config(), "train").labels()["label"]
    (memory,) = (tmp_path / "cache" / "tfds").iterdir()
    memory.write_bytes(content)
    np.testing.assert_array_equal(open_source(config(), "train").labels()["label"], labels)


def test_mistakes_are_named(root, tmp_path):
    old = tmp_path / "reptiles" / "1.0.0"
    shutil.copytree(root / "reptiles" / "1.0.0", old)
    info = json.loads((old / "dataset_info.json").read_text())
    (old / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    convert = f"tfds convert_format --dataset_version_dir={old} --out_file_format=array_record"
    for name, message in {
        "nothing_such": "'tfds:nothing_such' cannot be opened .*: expected the name of a data set",
        "cifar10": "'tfds:cifar10' is not prepared: expected it in .*file_format='array_record'",
        str(old): f"is prepared as tfrecord in {old}, .* convert it once, in place, with {convert}",
        str(tmp_path): "has no dataset_info.json; expected the folder of a prepared version",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            open_tfds(name, "train", image_size=16)
        assert "\n" not in str(caught.value)
    # Converted in place it keeps its old format, and has the new one beside it.
    both = info | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (old / "dataset_info.json").write_text(json.dumps(both))
    assert len(open_tfds(str(old), "train", image_size=16).labels()["label"]) == 20
