"""A data set held on the devices: the batches, crops and results of the pipeline on the host."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from ifm_jax import augment
from ifm_jax.config import DataConfig
from ifm_jax.data import BadImages, array, crops, folder, on_device, open_source, training_batches
from ifm_jax.errors import RunError, UsageError
from ifm_jax.runs import metrics_log, training
from tests import small

resized_crops = jax.jit(augment.resized_crops, static_argnums=2)


@pytest.fixture(autouse=True, scope="module")
def light():
    with small.light():
        yield


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures of several sizes."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (40, 30), (23, 61)]
    return [
        np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC))
        for height, width in sizes
    ]


def smooth(count, side):
    """Returns pictures, uint8 `(count, side, side, 3)`."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side), Image.BICUBIC)) for each in coarse])


def train(config, workdir, devices=1):
    training.train(config, workdir, devices=jax.devices()[:devices], quiet=True)
    return small.without_speed(metrics_log.read(workdir / "metrics.jsonl"))


# Which crops.


def test_boxes_of_a_batch_are_those_of_single_images():
    rng = np.random.default_rng(0)
    uniforms = rng.random((600, crops.DRAWS))
    heights, widths = rng.integers(1, 300, (2, 600))  # some so long that no draw fits
    for scale in (crops.SCALE, (0.08, 1.0)):
        of_batch = crops.random_boxes(uniforms, heights, widths, scale)
        for row, height, width, box in zip(uniforms, heights, widths, of_batch, strict=True):
            assert tuple(box) == crops.random_box(row.tolist(), int(height), int(width), scale)


@pytest.mark.parametrize("size", [32, 12])
def test_crops_are_pils(pictures, size):
    """PIL resizes across, then down, in whole numbers after each."""
    rng = np.random.default_rng(1)
    for picture in pictures:
        height, width, _ = picture.shape
        boxes = crops.random_boxes(rng.random((20, crops.DRAWS)), np.full(20, height), np.full(20, width))
        images = np.broadcast_to(picture, (20, *picture.shape))
        ours = np.asarray(resized_crops(images, boxes.astype(np.float32), size))
        for view, (top, left, tall, wide) in zip(ours, boxes, strict=True):
            piece = Image.fromarray(picture).crop((left, top, left + wide, top + tall))
            theirs = np.asarray(piece.resize((size, size), Image.BILINEAR))
            difference = np.abs(view.astype(int) - theirs.astype(int))
            # Enlarged the same. Where a few pixels become one, sums often end on a half, and then rounding decides.
            assert difference.max() <= (max(tall, wide) > size)
            assert (difference > 0).mean() < 0.3


def test_crops_of_a_stretched_copy(pictures):
    """A copy has another shape than its image; the crops show the same place."""
    picture = pictures[2]
    copy = np.asarray(Image.fromarray(picture).resize((64, 64), Image.BILINEAR))
    box = np.array([[4.0, 11.0, 17.0, 40.0]], np.float32)
    of_copy = box * np.array([64 / 23, 64 / 61, 64 / 23, 64 / 61], np.float32)
    ours = resized_crops(copy[None], of_copy, 16)
    theirs = resized_crops(picture[None], box, 16)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 4


# Which batches.


def test_batches_are_those_of_the_host():
    """The same images and, up to their filters, crops, wherever the run starts and however calls are made."""
    source = array.ArrayFile(smooth(37, 24), 16)
    assert on_device.copies_side(source, 16) == 18  # 256/224 of a view
    copied, copies = on_device.read_all(source, 37, on_device.copies_side(source, 16, 24))
    calls = list(on_device.on_device_batches(copies, 8, [3, 1, 2, 3], 3, seed=3, start=2))
    assert [count for _, count in calls] == [int(call["steps"]) for call, _ in calls] == [3, 1, 2, 3]
    assert {call["boxes"].shape for call, _ in calls} == {(3, 8, 2, 4)}
    rows = [
        {name: call[name][row] for name in ("index", "boxes")} for call, count in calls for row in range(count)
    ]  # of each batch
    cut = jax.jit(on_device.OnDeviceStep(SimpleNamespace(method=SimpleNamespace(mesh=None)), 16).batch)
    for row, theirs in zip(rows, training_batches(source, 8, seed=3, start=2, indices=True), strict=False):
        np.testing.assert_array_equal(row["index"], theirs["index"])
        ours = cut(copied, row)
        for view in range(2):
            mine, other = np.asarray(ours["views"][:, view], int), theirs["views"][:, view].astype(int)
            assert np.abs(mine - other).mean() < 3 < 10 < np.abs(mine[::-1] - other).mean()


def test_images_of_their_own_size_are_kept_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    source = array.ArrayFile(pixels, 32)
    assert on_device.copies_side(source, 32) == 32
    copied, _ = on_device.read_all(source, 8, 32)
    np.testing.assert_array_equal(copied, pixels[:8])
    assert on_device.copies_side(source, 32, 48) == 48


def test_unreadable_images(tmp_path, pictures):
    for number in range(12):
        path = tmp_path / "train" / "a" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[0] // (number + 1)).save(path)
    (tmp_path / "train" / "a" / "00.png").write_bytes(b"none")
    (tmp_path / "train" / "a" / "05.png").write_bytes(b"none")
    source = folder.open_folder(str(tmp_path), "train", image_size=32)
    said = []
    copied, _ = on_device.read_all(source, 12, 32, bad_images=BadImages(12, 0.5, tmp_path / "bad", said.append))
    np.testing.assert_array_equal(copied[5], copied[4])
    np.testing.assert_array_equal(copied[0], copied[1])
    assert len(said) == 2
    with pytest.raises(RunError, match=r"more than data\.max_bad"):
        on_device.read_all(source, 12, 32, bad_images=BadImages(12, 0.1, tmp_path / "bad2", said.append))
    with pytest.raises(RunError, match="cannot be read"):
        on_device.read_all(source, 12, 32)


# A run.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_is_that_of_the_host(tmp_path, devices, host):
    """Calls of up to five steps end where checkpoints and evaluations are due; every step's line is there."""
    config = small.config(model__compute_dtype="float64", data__cache="device", steps_per_call=5, checkpoint_every=7)
    found = train(config, tmp_path, devices)
    assert [record["step"] for record in found] == list(range(1, 9))
    for ours, theirs in zip(found, host, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-10), (name, ours["step"])


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with jax.enable_x64(True):
        return train(small.config(model__compute_dtype="float64"), tmp_path_factory.mktemp("host"))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_step_a_call_is_the_same_step(tmp_path, host):
    """Bit for bit, also where a run goes on that has read its images from the host."""
    double = {"model__compute_dtype": "float64"}
    train(small.config(**double, steps=3), tmp_path)
    assert train(small.config(**double, data__cache="device"), tmp_path) == host


@pytest.mark.slow
def test_crops_are_cut_on_the_devices(tmp_path):
    """Of a data set that the host would crop."""
    np.savez(tmp_path / "images.npz", train_images=smooth(64, 32))
    fields = {"data__source": f"array:{tmp_path / 'images.npz'}", "data__augmentation": "moco_cifar", "steps": 3}
    found = train(small.config(data__cache="device", steps_per_call=2, **fields), tmp_path / "run", devices=2)
    assert [record["step"] for record in found] == [1, 2, 3]


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"steps_per_call=4: expected 1, or data.cache=device"):
        train(small.config(steps_per_call=4), tmp_path)
    with pytest.raises(UsageError, match=r"data.cache='disk': expected device"):
        train(small.config(data__cache="disk"), tmp_path)
    with pytest.raises(UsageError, match=r"needs 196608.0 GB of each device's"):
        on_device.check_memory(10**9, 256, 80 * 10**9)
    data = DataConfig(augmentation="trifeature", image_size=32)
    data.trifeature.train_size = 8
    assert on_device.copies_side(open_source(data, "train"), 32, 64) == 32  # views of these are made of the whole


def test_memory_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "_SHARE", 1e-9)
    with pytest.raises(UsageError, match=r"a smaller data.cache_size, or data.cache=''"):
        train(small.config(data__cache="device"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
