"""Finding files: once, in torchvision's order, and again as soon as a folder has changed."""

import os
import socket

import pytest

from ifm_jax.data import scan


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "_WORTH_REMEMBERING", 3)
    for name in ("a/1.jpg", "a/sub/2.PNG", "a-b/3.webp", "a/.hidden/4.jpg", "a/._5.jpg", "a/notes.txt", "b/6.bmp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    settle(tmp_path / "images")
    return tmp_path / "images"


def settle(root):
    """Makes all folders look as if they had not been touched for a minute."""
    for folder, _, _ in os.walk(root):
        then = os.stat(folder).st_mtime_ns - 60 * 10**9
        os.utime(folder, ns=(then, then))


def files(tree):
    return [path for name in tree.listings[""].folders for path in tree.images_below(name)]


def read_folders(root, monkeypatch):
    """Returns what is found, and how many folders were read for it."""
    count = []
    listing = scan._list
    monkeypatch.setattr(scan, "_list", lambda folder, above: count.append(folder) or listing(folder, above))
    found = files(scan.tree(root))
    monkeypatch.setattr(scan, "_list", listing)
    return found, len(count)


def test_what_was_found_is_remembered_until_a_folder_changes(root, monkeypatch):
    expected = ["a/1.jpg", "a/sub/2.PNG", "a-b/3.webp", "b/6.bmp"]
    assert sorted(read_folders(root, monkeypatch)[0]) == sorted(expected)
    assert read_folders(root, monkeypatch) == (files(scan.tree(root)), 0)
    (root / "a" / "sub" / "7.jpg").touch()
    found, count = read_folders(root, monkeypatch)
    assert "a/sub/7.jpg" in found
    assert count == 5
    # A folder that has just changed may change once more without its time telling: not to be remembered.
    assert read_folders(root, monkeypatch)[1] == 5
    settle(root)
    assert [read_folders(root, monkeypatch)[1] for _ in range(2)] == [5, 0]
    (root / "b" / "6.bmp").unlink()
    assert "b/6.bmp" not in read_folders(root, monkeypatch)[0]


def test_a_folder_in_itself_is_passed_over(root, monkeypatch):
    """By a link to itself, to the one above it or across; a folder that is linked twice is there twice."""
    before = files(scan.tree(root))
    (root / "a" / "sub" / "up").symlink_to(root)
    (root / "a" / "here").symlink_to(".")
    (root / "a" / "across").symlink_to(root / "b")
    (root / "b" / "back").symlink_to(root / "a")
    (root / "b" / "itself").symlink_to("itself")
    settle(root)
    expected = sorted([*before, "a/across/6.bmp", "b/back/1.jpg", "b/back/sub/2.PNG"])
    assert sorted(files(scan.tree(root))) == expected
    found, count = read_folders(root, monkeypatch)
    assert (sorted(found), count) == (expected, 0)


def test_only_files_are_images(root):
    """A pipe named so would be waited for; a link that leads nowhere is an image that cannot be read."""
    before = files(scan.tree(root))
    os.mkfifo(root / "b" / "pipe.jpg")
    (root / "b" / "null.jpg").symlink_to(os.devnull)
    (root / "b" / "link.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "b" / "broken.jpg").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "b" / "socket.jpg"))  # an absolute path may be too long for one
        assert sorted(files(scan.tree(root))) == sorted([*before, "b/link.jpg", "b/broken.jpg"])


def test_subfolders_come_in_the_order_of_their_paths(root):
    assert scan.tree(root).images_below("a") == ["a/1.jpg", "a/sub/2.PNG"]
    assert scan.tree(root / "a").images_below("") == ["1.jpg", "sub/2.PNG"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08"])
def test_a_damaged_memory_is_passed_over(root, content):
    found = files(scan.tree(root))
    (memory,) = (root.parent / "cache" / "folders").iterdir()
    memory.write_bytes(content)
    assert files(scan.tree(root)) == found


def test_a_long_search_says_how_far_it_is(root, monkeypatch, capsys):
    monkeypatch.setattr(scan, "_SAY_AFTER", 0.0)
    scan.tree(root)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"Searching {root}: 0 images in 1 folders"
    assert said[-1].startswith(f"Searching {root}: 4 images in 5 folders, in ")
