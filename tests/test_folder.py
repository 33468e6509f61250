"""Images in folders: PIL's pixels, torchvision's classes and crops, the same batches wherever they are read."""

import errno
import hashlib
import io
import itertools
import os
import pathlib
import resource
import shutil
import struct
import tracemalloc
import zlib

import cv2
import jax
import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ifm_jax import assembly, augment
from ifm_jax.config import DataConfig
from ifm_jax.data import BadImages, ViewSource, crops, folder, images, open_source, training_batches
from ifm_jax.errors import RunError, UsageError
from ifm_jax.runs import metrics_log, training
from references.torchvision_peer import torchvision
from tests import small


@pytest.fixture(scope="module")
def photographs():
    return load_sample_images().images


@pytest.fixture(scope="module")
def root(tmp_path_factory, photographs):
    """Forty small pieces of photographs in the classes a, b and c, of train and val, some in subfolders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        part = root / ("train" if number < 30 else "val") / "cab"[number % 3] / ("sub" if number % 4 == 0 else "")
        part.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(40, 90, 2)
        top, left = rng.integers(0, 300, 2)
        piece = Image.fromarray(photographs[number % 2][top : top + height, left : left + width])
        piece.save(part / f"{number:02}{('.jpg', '.JPEG', '.png', '.webp', '.bmp')[number % 5]}")
    return root


def source(root, split="train", size=32, **options):
    return folder.open_folder(str(root), split, image_size=size, **options)


def batches(root, count, **options):
    return list(itertools.islice(training_batches(source(root), 8, **({"seed": 0} | options)), count))


def assert_equal(a, b):
    assert a.keys() == b.keys() == {"views"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# Which images.


@pytest.mark.torch
@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("test", "val")])
def test_files_and_labels_are_torchvisions(root, split, part):
    ours, theirs = source(root, split), torchvision.datasets.ImageFolder(root / part)
    names = map(ours.name, range(len(ours)))
    assert list(zip(names, ours.labels()["class"], strict=True)) == theirs.samples
    assert ours.label_names == {"class": ("a", "b", "c")}
    assert len(ours) == (30 if split == "train" else 10)
    assert isinstance(ours, ViewSource)


def test_a_folder_without_parts_is_for_training(root):
    assert source(root / "train").paths == source(root).paths
    assert source(root / "train").fingerprint == source(root).fingerprint
    with pytest.raises(UsageError, match=r"has no held-out images: expected .*train and .*val \(or test\)"):
        source(root / "train", "test")


def test_a_flat_folder_has_no_labels(root):
    flat = source(root / "val" / "a" / "..", "train"), source(root / "train" / "b" / "sub")
    assert [bool(each.label_names) for each in flat] == [True, False]
    assert flat[1].labels() == {}
    assert flat[1].examples(np.array([0, 1])).keys() == {"image"}


def test_chosen_classes(root, tmp_path):
    (tmp_path / "names").write_text("# Two of three\nc\n\na  # the first\n")
    for split in ("train", "test"):
        chosen, whole = source(root, split, classes=str(tmp_path / "names")), source(root, split)
        assert chosen.label_names == {"class": ("a", "c")}
        assert chosen.paths == [path for path in whole.paths if not path.startswith("b/")]
        assert set(chosen.labels()["class"][np.array([path.startswith("c/") for path in chosen.paths])]) == {1}


def test_held_out_images_are_numbered_as_the_training_images(root, tmp_path):
    """Where the held-out part lacks a class, torchvision would number the others anew."""
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c").symlink_to(root / "val" / "c")
    assert set(source(tmp_path, "test").labels()["class"]) == {2}


def make(path, *names):
    for name in names:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(target) if target.suffix else target.mkdir()
    return path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody-here/images", "data.source='folder:~nobody-here/images': .*; expected the path of a folder"),
        ("x" * 300, "xxx cannot be read .File name too long.; expected readable folders"),
    ],
)
def test_mistaken_paths_are_named(path, message):
    with pytest.raises(UsageError, match=message):
        source(path)


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"train cannot be read \(Permission denied\); expected readable folders"):
        source(root)


def test_a_replaced_file_is_noticed(root, tmp_path):
    """And what was written before sizes counted is still known."""
    shutil.copytree(root, tmp_path / "images")
    before = source(tmp_path / "images")
    assert before.fingerprint == source(root).fingerprint  # wherever they lie
    with (tmp_path / "images" / "train" / before.paths[3]).open("ab") as file:
        file.write(b"more")
    after = source(tmp_path / "images")
    assert after.paths == before.paths
    assert after.fingerprint != before.fingerprint
    assert after.earlier_fingerprints == before.earlier_fingerprints
    names = hashlib.sha256()
    for part in ("\0".join(before.paths).encode(), before.labels()["class"].tobytes()):
        names.update(b"%d:" % len(part) + part)
    assert before.earlier_fingerprints == (names.hexdigest()[:24],)


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (None, "", "does not exist; expected a folder of images"),
        (["x.png"], "", "x.png is not a folder; expected"),
        ([], "", "no images in .*; expected .jpg, "),
        (["a/1.png", "b"], "", "class folder .*b has no images: expected .jpg"),
        (["a/1.png", "2.png"], "", r"has both images \(2.png, ...\) and folders of images \(a, ...\)"),
        (["train/a/1.png", "val/b/1.png"], "", "val has the class 'b', which .*train does not"),
        (
            ["a/1.png", "b/1.png"],
            "a\nd\n",
            "data.classes=.*: 'd' is not among the 2 class folders of .* \\('a', 'b'\\)",
        ),
        (["1.png"], "a\n", "has no class folders to choose from"),
        (["a/1.png"], "# none\n", "names no class"),
        (["a/1.png"], None, r"data.classes=.* cannot be read \(No such file"),
    ],
)
def test_mistakes_are_named(tmp_path, names, classes, message):
    path = tmp_path / "images"
    if names is not None:
        path.mkdir()
        make(path, *names)
    if names == ["x.png"]:
        path /= "x.png"
    if classes:
        (tmp_path / "names").write_text(classes)
    with pytest.raises(UsageError, match=message) as caught:
        source(
            path, "test" if "which" in message else "train", classes="" if classes == "" else str(tmp_path / "names")
        )
    assert "\n" not in str(caught.value)


def test_the_files_of_other_programs_are_passed_over(tmp_path):
    make(tmp_path, "a/1.png", ".cache/2.png")
    for name in ("a/._1.png", "a/Thumbs.db", "notes.txt"):
        (tmp_path / name).write_text("")
    assert source(tmp_path).paths == ["a/1.png"]
    # Beside the images of a flat folder, a folder without any is no class.
    make(tmp_path / "a", "labels")
    assert len(source(tmp_path / "a")) == 1


# Pixels.


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_files(photograph):
    image = Image.fromarray(photograph).resize((100, 75))
    translucent = image.copy()
    translucent.putalpha(image.convert("L"))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = cv2.imencode(".png", np.random.default_rng(0).integers(0, 65536, (50, 60, 3)).astype(np.uint16))[1]
    return {
        "jpeg": encoded(image, "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True, subsampling=0),
        "gray jpeg": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "rotated": encoded(image, "JPEG", exif=rotated),
        "png": encoded(image, "PNG"),
        "gray png": encoded(image.convert("L"), "PNG"),
        "translucent": encoded(translucent, "PNG"),
        "translucent gray": encoded(translucent.convert("LA"), "PNG"),
        "palette": encoded(image.quantize(64), "PNG", transparency=3),
        "bits": encoded(image.convert("1"), "PNG"),
        "16 bits": deep.tobytes(),
        "webp": encoded(image, "WEBP"),
        "translucent webp": encoded(translucent, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
    }


def test_pixels_are_pils(photographs):
    for name, data in image_files(photographs[0]).items():
        ours = images.decode(name, np.frombuffer(data, np.uint8))[..., ::-1].astype(int)
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert ours.shape == theirs.shape, name
        # Another rounding of the four inks; otherwise the same pixels.
        assert np.abs(ours - theirs).max() <= (1 if name == "cmyk" else 0), name
        is_jpeg = name in ("jpeg", "progressive", "gray jpeg", "cmyk", "rotated")
        assert images.jpeg_size(np.frombuffer(data, np.uint8)) == (ours.shape[:2] if is_jpeg else None), name


@pytest.mark.parametrize("size", [32, 96, 128, 224])
def test_crops_are_pils(photographs, tmp_path, size):
    """Within 3/255 on average, every one of them, from enlarged ones to those decoded at a quarter of the size."""
    for number, photograph in enumerate(photographs):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(photograph).save(path, quality=92)
        views = source(tmp_path, size=size).views
        whole = Image.open(path).convert("RGB")
        for draw in range(12):
            for view, box in zip(views(number, draws(draw)), boxes(draw, *photograph.shape[:2]), strict=True):
                top, left, height, width = snapped(draw, box, photograph.shape[:2], size)
                peer = whole.crop((left, top, left + width, top + height)).resize((size, size), Image.BILINEAR)
                error = np.abs(view.astype(float) - np.asarray(peer)).mean()
                assert error < 3, (number, draw, box)


def draws(number):
    return np.random.default_rng(number).random(crops.TWO_VIEWS.draws).tolist()


def boxes(number, height, width):
    return crops.TWO_VIEWS.boxes(draws(number), height, width)


def snapped(draw, box, shape, size):
    """The box in whole pixels of the reduced image, where one is decoded; half a pixel of the view at most."""
    shrink = min(min(other[2:]) for other in boxes(draw, *shape)) / size
    reduction = max(r for r in (1, 2, 4, 8) if r == 1 or 1.5 * r <= shrink)
    reduced = crops.reduced_box(box, reduction, *(-(-side // reduction) for side in shape))
    moved = [reduction * side for side in reduced]
    assert max(abs(a - b) for a, b in zip(moved, box, strict=True)) <= reduction <= max(1, shrink / 1.5)
    return moved


@pytest.mark.torch
@pytest.mark.parametrize("size", [64, 224])
def test_the_evaluated_view_is_torchvisions(photographs, tmp_path, size):
    for number, photograph in enumerate(photographs):
        Image.fromarray(np.rot90(photograph) if number else photograph).save(tmp_path / f"{number}.png")
    views = source(tmp_path, size=size).examples(np.array([1, 0]))["image"]
    assert views.dtype == np.uint8
    assert views.shape == (2, size, size, 3)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(round(size * 256 / 224)), torchvision.transforms.CenterCrop(size)]
    )
    for number, view in zip((1, 0), views, strict=True):
        peer = transform(Image.open(tmp_path / f"{number}.png"))
        assert np.abs(view.astype(float) - np.asarray(peer)).mean() < 3


def test_equal_sizes_are_left_alone(photographs):
    piece = photographs[0][:48, :48]
    np.testing.assert_array_equal(crops.resize(piece, 48, 48), piece)
    np.testing.assert_array_equal(crops.cut(photographs[0], (5, 7, 32, 32), 32), photographs[0][5:37, 7:39])


# Which crops.


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width", "least"), [(375, 500, 0.2), (375, 500, 0.08), (60, 200, 0.2)])
def test_boxes_are_distributed_as_torchvisions(height, width, least):
    """In the last case, more than three times as wide as high, some find none that fits."""
    count = 20_000 if width == 500 else 5_000
    random_crops = crops.RandomCrops(2, (least, 1.0))
    rng = np.random.default_rng(0)
    ours = [random_crops.boxes(rng.random(random_crops.draws).tolist(), height, width) for _ in range(count // 2)]
    ours = np.array(ours).reshape(-1, 4)
    torch.manual_seed(0)
    image = torch.zeros(3, 1, 1).expand(3, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for name, our, their in zip(("top", "left", "height", "width"), ours.T, theirs.T, strict=True):
        assert scipy.stats.ks_2samp(our, their).pvalue > 0.001, name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


def test_the_two_boxes_are_independent():
    query, key = np.array([boxes(number, 375, 500) for number in range(4000)]).transpose(1, 2, 0)
    assert np.abs(np.corrcoef(query, key)[:4, 4:]).max() < 0.08


def test_the_box_that_never_fits_is_central():
    for (height, width), box in {
        (32, 32): (0, 0, 32, 32),
        (30, 60): (0, 10, 30, 40),
        (60, 30): (10, 0, 40, 30),
    }.items():
        assert crops.random_box([0.9999] * 20 + [0.5] * 2, height, width, (2.0, 2.0)) == box


# Batches.


def test_batches_hold_two_views_of_each_image(root):
    for batch in batches(root, 2):
        assert batch["views"].shape == (8, 2, 32, 32, 3)
        assert batch["views"].dtype == np.uint8
        assert (batch["views"][:, 0] != batch["views"][:, 1]).any((1, 2, 3)).all()


def test_a_restart_needs_only_the_step(root):
    for a, b in zip(batches(root, 20)[17:], batches(root, 3, start=17), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_cut_their_pieces_of_the_same_batches(root, hosts):
    whole = batches(root, 5, start=2)
    pieces = [batches(root, 5, start=2, host=host, hosts=hosts) for host in range(hosts)]
    for step, batch in enumerate(whole):
        assert_equal({"views": np.concatenate([piece[step]["views"] for piece in pieces])}, batch)


@pytest.mark.slow
def test_threads_and_processes_change_nothing(root):
    """Started at step 137, the second of two hosts, too."""
    plain = batches(root, 6, start=137, host=1, hosts=2, threads=1)
    for options in ({"threads": 5}, {"processes": 4, "threads": 1}):
        for a, b in zip(plain, batches(root, 6, start=137, host=1, hosts=2, **options), strict=True):
            assert_equal(a, b)
    for a, b in zip(plain, batches(root, 143, host=1, hosts=2)[137:], strict=True):
        assert_equal(a, b)


def test_views_are_new_in_every_epoch_and_for_every_seed(root):
    views = [batches(root, 12), batches(root, 12, seed=1)]
    seen = {view.tobytes() for run in views for batch in run for both in batch["views"] for view in both}
    assert len(seen) == 2 * 12 * 2 * 8


def test_no_image_comes_twice_in_an_epoch(root):
    for epoch in np.array_split(batches(root, 9, seed=3, indices=True), 3):
        seen = np.concatenate([batch["index"] for batch in epoch])
        assert len(seen) == len(set(seen)) == 24


def test_a_source_may_cut_one_view_and_say_of_which_image(root):
    single = source(root, random_crops=crops.RandomCrops(1, (0.08, 1.0)))
    batch = next(training_batches(single, 8, seed=0, indices=True))
    assert batch.keys() == {"views", "index"}
    assert batch["views"].shape == (8, 1, 32, 32, 3)
    assert single.random_crops.draws == crops.TWO_VIEWS.draws // 2
    small_crops = single.random_crops.boxes([0.0] * 22, 100, 100)
    assert small_crops == [(0, 0, 33, 24)]  # a share of 0.08, three to four


def test_memory_stays_flat_over_epochs(root):
    """What is allocated while an epoch is read is given back."""
    tracemalloc.start()
    try:
        reader, used = training_batches(source(root), 10, seed=0, threads=2), []
        for _ in range(4):
            for _ in range(3 * 4):  # four epochs at a time
                next(reader)
            used.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(used[1:]) < used[0] + 500_000


def test_embedded_images_are_cropped_too():
    data = DataConfig(image_size=32, augmentation="moco_v2")
    data.trifeature.train_size = 40
    embedded = open_source(data, "train")
    assert isinstance(embedded, ViewSource)
    assert set(embedded.label_names) == set(embedded.labels()) == {"shape", "texture", "color"}
    batch = next(training_batches(embedded, 8, seed=0))
    assert batch["views"].shape == (8, 2, 32, 32, 3)
    data.augmentation = "trifeature"
    assert next(training_batches(open_source(data, "train"), 8, seed=0))["views"].shape == (8, 1, 32, 32, 3)


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_an_unreadable_image_is_named(root, tmp_path, content):
    good = pathlib.Path(source(root).name(0)).read_bytes()
    (tmp_path / "bad.jpg").write_bytes(good[: len(good) // 2] if content == "half" else content)
    bad = source(tmp_path)
    with pytest.raises(RunError, match=r"bad.jpg cannot be read \(not an image, or a broken one\): replace or delete"):
        next(training_batches(bad, 1, seed=0))
    with pytest.raises(RunError, match=r"bad.jpg cannot be read"):
        bad.examples(np.array([0]))
    (tmp_path / "bad.jpg").unlink()
    with pytest.raises(RunError, match=r"bad.jpg cannot be read \(No such file"):
        next(training_batches(bad, 1, seed=0))


@pytest.mark.slow
def test_unreadable_images_are_replaced_counted_and_listed(root, tmp_path):
    """The nearest image before it that can be read takes its place, wherever and by whom it is read."""
    names = source(root / "train").paths
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pathlib.Path(root / "train" / name).read_bytes())
    bad = {0, 7, 8, 20}
    for number in bad:
        (tmp_path / "images" / names[number]).write_bytes(b"no image")
    of = source(tmp_path / "images")

    def read(listed, share=0.2, **options):
        said = []
        ledger = BadImages(30, share, tmp_path / listed, said.append)
        reader = training_batches(of, 10, seed=0, bad_images=ledger, indices=True, **options)
        return list(itertools.islice(reader, 6)), said

    got, said = read("bad.txt")
    for epoch in (got[:3], got[3:]):
        taken = np.bincount(np.concatenate([batch["index"] for batch in epoch]), minlength=30)
        assert taken[[0, 1, 6, 7, 8, 19, 20]].tolist() == [0, 2, 3, 0, 0, 2, 0]
    assert len(said) == 4
    assert "cannot be read (not an image, or a broken one): a neighbor replaces it (1 so far)." in said[0]
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == {of.name(number) for number in bad}
    again, said = read("bad.txt", processes=2)  # and what is listed is named no more
    assert said == []
    for a, b in zip(got, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(
        RunError, match=r"^4 of 30 images cannot be read, more than data.max_bad=0.1 allows; .* listed in"
    ):
        read("few.txt", share=0.1)
    assert len((tmp_path / "few.txt").read_text().splitlines()) == 4
    with pytest.raises(RunError, match="cannot be read"):
        next(training_batches(of, 30, seed=0))  # nobody takes note


def png(width, height, content):
    """A PNG with a header, whatever its content; its checksums are right."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", content), (b"IEND", b"")
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(data, place):
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def bad_files(photograph):
    """Name -> content that is no image."""
    image = Image.fromarray(photograph).resize((100, 75))
    files = {"0.jpg": b"", "text.jpg": b"no image", "huge.jpg": None}
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = encoded(image, kind)
        files |= {f"half {kind}.jpg": data[: len(data) // 2], f"start {kind}.jpg": data[:30]}
    whole, progressive = encoded(image, "PNG"), encoded(image, "JPEG", progressive=True)
    files |= {f"damaged {place}.png": damaged(whole, place) for place in (17, 30, len(whole) // 2, len(whole) - 20)}
    files |= {"tail.png": whole[: len(whole) // 2] + bytes(5000), "cut.jpg": progressive[:-20]}
    # Small files that would fill memory.
    files |= {f"{side}.png": png(side, side, zlib.compress(bytes(10**6))) for side in (0, 13_400, 60_000)}
    at = images._jpeg_header(np.frombuffer(progressive, np.uint8)).place
    files["wide.jpg"] = progressive[: at + 5] + struct.pack(">HH", 65_000, 65_000) + progressive[at + 9 :]
    return files


def test_no_bad_file_is_more_than_that(photographs, tmp_path, capfd):
    """Of whatever kind: named with its reason, nothing written by libraries, no memory filled."""
    for name, content in bad_files(photographs[0]).items():
        (tmp_path / name).write_bytes(content or b"")
    with (tmp_path / "huge.jpg").open("r+b") as file:
        file.truncate(2**40)  # of which the disk holds nothing
    (tmp_path / "broken.jpg").symlink_to("nothing")
    bad = source(tmp_path)
    assert len(bad) == len(bad_files(photographs[0])) + 1
    (tmp_path / "text.jpg").unlink()
    os.mkfifo(tmp_path / "text.jpg")  # in the place of a file that was found
    used, reasons = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for index in range(len(bad)):
        for read in (lambda index: bad.views(index, draws(0)), bad.central_view, lambda index: bad.whole(index, 32)):
            with pytest.raises(images.UnreadableImageError) as caught:
                read(index)
            reasons[bad.paths[index]] = caught.value.reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000  # kB
    assert reasons.pop("huge.jpg") == "1099511627776 bytes, more than 1073741824"
    assert reasons.pop("text.jpg") == "not a regular file"
    assert reasons.pop("broken.jpg") == "No such file or directory"
    assert reasons.pop("13400.png") == "13400 x 13400 pixels, more than 178956970"
    assert reasons.pop("60000.png") == "60000 x 60000 pixels, more than 178956970"
    assert reasons.pop("wide.jpg") == "65000 x 65000 pixels, more than 178956970"
    assert set(reasons.values()) == {"not an image, or a broken one"}
    assert capfd.readouterr() == ("", "")


def test_flaws_that_leave_an_image_are_passed_over_in_silence(photographs, capfd):
    """The pixels are PIL's, which says nothing either."""
    image = Image.fromarray(photographs[0]).resize((100, 75))
    jpeg, preview = encoded(image, "JPEG"), encoded(image.resize((8, 8)), "JPEG")
    flawed = {
        "more before the end": jpeg[:-2] + b"abcdef" + jpeg[-2:],
        "more after the end": jpeg + b"abcdef",
        "flipped bits": damaged(jpeg, 1500),
        "a profile that is none": encoded(image, "PNG", icc_profile=b"no profile" * 30),
        "previews": encoded(image, "JPEG", exif=b"Exif\0\0" + preview),
    }
    for name, data in flawed.items():
        ours = images.decode(name, np.frombuffer(data, np.uint8))[..., ::-1]
        np.testing.assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), name)
    cut = flawed["previews"][:-500]
    with pytest.raises(images.UnreadableImageError):
        images.decode("a preview does not end an image", np.frombuffer(cut, np.uint8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (1, 1)])
def test_a_strip_is_an_image(tmp_path, shape):
    """Resized as a whole, its longer side would be millions of pixels."""
    Image.fromarray(np.full((*shape, 3), 77, np.uint8)).save(tmp_path / "strip.png")
    strip = source(tmp_path, size=64)
    for view in (strip.central_view(0), *strip.views(0, draws(0)), strip.whole(0, 64)[0]):
        np.testing.assert_array_equal(view, np.full((64, 64, 3), 77))


def test_any_file_name_is_written_in_one_line(tmp_path):
    """Bytes that are not UTF-8, tabs and line ends; what is listed is known again."""
    (tmp_path / "images" / os.fsdecode(b"cl\xffass")).mkdir(parents=True)
    names = [b"\xff\xfe.jpg", b"a\tb\nc.jpg", "d\u2028e.jpg".encode(), "ü.jpg".encode()]
    for name in names:
        (tmp_path / "images" / os.fsdecode(b"cl\xffass") / os.fsdecode(name)).write_bytes(b"")
    bad = source(tmp_path / "images")
    bad.fingerprint.encode("ascii")
    assert bad.label_names == {"class": (r"cl\xffass",)}
    for _ in range(2):
        ledger = BadImages(4, 1.0, tmp_path / "bad.txt", str.encode)  # as a terminal does
        for index in range(4):
            with pytest.raises(images.UnreadableImageError) as caught:
                bad.views(index, draws(0))
            assert caught.value.reason == "not an image, or a broken one"
            ledger.add(bad.name(index), "why\nnot")
        assert len(ledger) == 4
        lines = (tmp_path / "bad.txt").read_text().splitlines()
        shown = [line.removeprefix(str(tmp_path / "images" / r"cl\xffass") + "/") for line in lines]
        assert shown == [f"{name}\twhy\\nnot" for name in (r"a\tb\nc.jpg", r"d\u2028e.jpg", "ü.jpg", r"\xff\xfe.jpg")]


def test_one_image_of_many_is_found_bad_only_if_all_around_it_are(tmp_path):
    make(tmp_path, "1.png", "2.png")
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    reader = training_batches(source(tmp_path), 1, seed=0, bad_images=BadImages(2, 0.9, tmp_path / "bad", print))
    with pytest.raises(RunError, match=r"png cannot be read \(not an image"):
        next(reader)


# A run.


make_augmentation = assembly.make_augmentation


@pytest.fixture
def one_block():
    """The smallest network, with the augmentation of photographs."""
    with small.light(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "make_augmentation", make_augmentation)
        yield


def own_images(root, **fields):
    few = {"moco__queue_beyond_images": True}  # 30 images, 64 keys
    return small.config(data__source=f"folder:{root}", data__augmentation="moco_v2", **few, **fields)


@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
def test_a_run_on_a_folder(root, tmp_path):
    """Trains, stops, goes on bit for bit; its classes can be read out."""
    from ifm_jax.evaluation import suppression

    for name, steps in (("whole", [2]), ("parts", [1, 2])):
        for stop in steps:
            training.train(own_images(root, steps=stop), tmp_path / name, devices=jax.devices()[:1], quiet=True)
    whole, parts = (
        small.without_speed(metrics_log.read(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts")
    )
    assert [record["step"] for record in whole] == [1, 2]
    assert whole == parts
    assert all(0 <= record["data_wait"] <= 1 for record in metrics_log.read(tmp_path / "whole" / "metrics.jsonl"))
    readouts = suppression.read_out_workdir(tmp_path / "whole")
    assert set(readouts.accuracy) == {"class"}

    # It may go on elsewhere, but only on the same images.
    shutil.copytree(root, tmp_path / "moved")
    training.train(own_images(tmp_path / "moved", steps=2), tmp_path / "parts", devices=jax.devices()[:1], quiet=True)
    next((tmp_path / "moved" / "train").rglob("*.png")).unlink()
    with pytest.raises(
        UsageError, match=r"a run on other images than those of .*moved' \(30 then, 29 now\): pass another"
    ):
        training.train(own_images(tmp_path / "moved"), tmp_path / "parts", devices=jax.devices()[:1], quiet=True)


@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
def test_a_run_replaces_an_unreadable_image(root, tmp_path, capfd):
    """And says so itself, once: the libraries that decode say nothing."""
    shutil.copytree(root / "train", tmp_path / "images")
    bad = next((tmp_path / "images").rglob("*.png"))
    bad.write_bytes(damaged(bad.read_bytes(), 200))
    run = own_images(tmp_path / "images", data__max_bad=0.1, steps=2, batch_size=16)
    training.train(run, tmp_path / "run", devices=jax.devices()[:1])
    said = capfd.readouterr()
    assert f"{bad} cannot be read (not an image, or a broken one): a neighbor replaces it" in said.out
    assert said.err == ""
    assert (tmp_path / "run" / "bad_images.txt").read_text().startswith(str(bad))
    run.data.max_bad, run.steps = 0.01, 2
    with pytest.raises(RunError, match=r"1 of 30 images cannot be read, more than data.max_bad=0.01"):
        training.train(run, tmp_path / "other", devices=jax.devices()[:1], quiet=True)


def test_the_config_chooses_the_augmentation(root):
    for name, expected in (("moco_v1", augment.MoCoV1Augmentation), ("moco_v2", augment.MoCoV2Augmentation)):
        config = own_images(root)
        config.data.augmentation = name
        assert assembly.make_augmentation(config) == expected()


def test_a_mistaken_folder_leaves_no_workdir(root, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        training.train(own_images(root / "nothing"), tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    with pytest.raises(UsageError, match=r"data.augmentation='trifeature' does not work with data.source='folder:"):
        training.train(small.config(data__source=f"folder:{root}"), tmp_path / "run", quiet=True)
    with pytest.raises(UsageError, match=r"data.source='folder:' names no folder: expected --config.data.source"):
        training.train(small.config(data__source="folder:"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
