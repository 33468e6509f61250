"""Listing image files, in torchvision's order."""

import os
import socket

import pytest

from ifm_jax.data import scan


@pytest.fixture
def root(tmp_path):
    for name in ("a/1.jpg", "a/sub/2.PNG", "a-b/3.webp", "a/.hidden/4.jpg", "a/._5.jpg", "a/notes.txt", "b/6.bmp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def files(tree):
    return [path for name in tree.listings[""].folders for path in tree.images_below(name)]


def test_images_of_all_folders_are_listed_and_hidden_ones_are_not(root):
    expected = ["a/1.jpg", "a/sub/2.PNG", "a-b/3.webp", "b/6.bmp"]
    assert sorted(files(scan.tree(root))) == sorted(expected)
    (root / "a" / "sub" / "7.jpg").touch()
    (root / "b" / "6.bmp").unlink()
    assert sorted(files(scan.tree(root))) == sorted([*expected[:-1], "a/sub/7.jpg"])


def test_a_folder_in_itself_is_passed_over(root):
    """By a link to itself, to the one above it or across; a folder that is linked twice is there twice."""
    before = files(scan.tree(root))
    (root / "a" / "sub" / "up").symlink_to(root)
    (root / "a" / "here").symlink_to(".")
    (root / "a" / "across").symlink_to(root / "b")
    (root / "b" / "back").symlink_to(root / "a")
    (root / "b" / "itself").symlink_to("itself")
    expected = sorted([*before, "a/across/6.bmp", "b/back/1.jpg", "b/back/sub/2.PNG"])
    assert sorted(files(scan.tree(root))) == expected


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


def test_a_long_search_says_how_far_it_is(root, monkeypatch, capsys):
    monkeypatch.setattr(scan, "_SAY_AFTER", 0.0)
    scan.tree(root)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"Searching {root}: 0 images in 1 folders"
    assert said[-1].startswith(f"Searching {root}: 4 images in 5 folders, in ")
