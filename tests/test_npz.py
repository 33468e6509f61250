"""Files of arrays from strangers: what is wrong with one is said in one line, and memory is not filled."""

import io
import resource
import struct
import zipfile

import numpy as np
import pytest

from ifm_jax.data import npz
from ifm_jax.data.array import open_array
from ifm_jax.errors import UsageError
from ifm_jax.torch_interop import replay


def saved(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def of_header(shape, descr="|u1", version=(1, 0), content=b""):
    """A file with an array whose header claims what it likes."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    member = b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(header)) + header
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", member + content)
    return file.getvalue()


def patched(data, before, after):
    assert before in data
    return data.replace(before, after)


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
GOOD = saved(images=IMAGES)


def encrypted():
    """With the flag set that says so, in the member's own header and in the directory's."""
    data = bytearray(GOOD)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1
    return bytes(data)


HOSTILE = {
    "nothing": (b"", "File is not a zip file"),
    "half": (GOOD[: len(GOOD) // 2], "File is not a zip file"),
    "text": (b"text", "File is not a zip file"),
    "encrypted": (encrypted(), "images: it is encrypted"),
    "damaged": (GOOD[:200] + bytes(50) + GOOD[250:], "images: "),
    "unknown compression": (patched(GOOD, b"\x08\x00\x00\x00\x21\x00", b"\x63\x00\x00\x00\x21\x00"), "images: "),
    "objects": (saved(images=np.array([{}, {}], object)), "images: it contains Python objects, expected plain"),
    "too large": (of_header((2**40, 2**10)), "images: it is truncated: .* needs 1125899906842624 bytes"),
    "negative": (of_header((-1, 8, 8, 3)), r"images: its shape is \(-1, 8, 8, 3\)"),
    "truncated": (of_header((4, 8, 8, 3), content=b"few"), "images: it is truncated"),
    "no header": (of_header("nonsense"), "images: "),
    "future": (of_header((1,), version=(9, 0)), "images: it has format 9.0, expected 1.0 or 2.0"),
    "no type": (of_header((1,), descr="nix"), "images: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_named(tmp_path, name):
    """By both who read such files."""
    content, message = HOSTILE[name]
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    for read, said in (
        (lambda: open_array(str(path), "train", image_size=8), "bad.npz cannot be read"),
        (lambda: replay.load_npz(path, "views"), "bad.npz is not a .npz of plain arrays"),
    ):
        with pytest.raises(UsageError, match=rf"{said} \({message}.*\)[:;] expected") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_in_memory_is_not_read(tmp_path, monkeypatch):
    """A few kilobytes that would be two gigabytes: refused for their header, one by one and together."""
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("images", "labels"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": (2**26, 3)}
                )
                for _ in range(3 * 2**6):
                    member.write(bytes(2**20))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(npz, "memory", lambda: 2**27)
    unfit = pytest.raises(npz.NpzError, match=r"images: its 0.2 GiB do not fit in this machine's 0.1 GiB of memory")
    with npz.Npz(tmp_path / "bomb.npz") as file, unfit:
        file["images"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 50_000  # kB
    monkeypatch.setattr(npz, "memory", lambda: 2**28)
    with npz.Npz(tmp_path / "bomb.npz") as file:
        assert file["images"].shape == (2**26, 3)
        with pytest.raises(npz.NpzError, match=r"labels: its 0.2 GiB do not fit"):
            file["labels"]
    monkeypatch.undo()
    assert npz.memory() > 2**28


def test_good_files_are_as_numpy_reads_them(tmp_path):
    arrays = {
        "images": IMAGES,
        "text": np.array(["a", "ü"]),
        "turned": np.asfortranarray(IMAGES[0]),
        "one": np.float64(3),
    }
    np.savez(tmp_path / "good.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "good.npz", "a") as archive:
        archive.writestr("README", "no array")
    with npz.Npz(tmp_path / "good.npz") as file:
        assert list(file) == list(arrays)
        assert "README" not in file
        for name, expected in arrays.items():
            np.testing.assert_array_equal(file[name], expected)
            assert file[name].dtype == np.asarray(expected).dtype
    with pytest.raises(FileNotFoundError):
        npz.Npz(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.array([0, 1, 2, 2**40])}, "labels contain 1099511627776; expected class numbers from 0 to"),
        ({"labels": np.array([0, 1, 2, 2**63], np.uint64)}, "labels contain 9223372036854775808; expected"),
        ({"labels": np.array([0, 1, -2, 0])}, "labels contain -2; expected"),
        ({"labels": np.array([0, 1, np.nan, 0])}, r"labels are float64 of shape \(4,\); expected 4 integers"),
        ({"labels": np.array(["a", "b", "c", "d"])}, r"labels are <U1 of shape \(4,\); expected 4 integers"),
        ({"labels": np.array(3)}, r"labels are int64 of shape \(\); expected 4 integers"),
        ({"labels": np.arange(4), "class_names": "one"}, r"class_names has shape \(\); expected one name for each"),
        ({"labels": np.arange(4), "class_names": [["a"], ["b"]]}, r"class_names has shape \(2, 1\)"),
        ({"images": np.uint8(3)}, r"images are uint8 of shape \(\); expected uint8 of shape \(N, H, W, 3\)"),
        ({"images": IMAGES[:0], "labels": np.arange(0)}, r"of shape \(0, 8, 8, 3\); expected"),
    ],
)
def test_bad_labels_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **({"images": IMAGES} | arrays))
    with pytest.raises(UsageError, match=message) as caught:
        open_array(str(tmp_path / "set.npz"), "train", image_size=8)
    assert "\n" not in str(caught.value)


def test_bad_training_labels_are_named_for_held_out_images(tmp_path):
    np.savez(tmp_path / "set.npz", y_train=np.array([0.0, np.nan]), x_test=IMAGES, y_test=np.arange(4))
    with pytest.raises(UsageError, match="its training labels are float64"):
        open_array(str(tmp_path / "set.npz"), "test", image_size=8)
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=np.arange(4), class_names=[])
    assert open_array(str(tmp_path / "set.npz"), "train", image_size=8).label_names == {"class": tuple("0123")}
