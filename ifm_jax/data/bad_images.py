"""Unreadable images: a run counts, lists and replaces them while they are few, and ends when they are many."""

import pathlib
from collections.abc import Callable, Iterator

from ifm_jax.data.classes import shown
from ifm_jax.errors import RunError, UsageError

_TRIES = 100  # neighbors; beyond that the problem is not with single images


def neighbors(index: int, size: int) -> Iterator[int]:
    """Yields the images that may replace an image, nearest first: those before it, then those after it."""
    before = range(index - 1, max(index - _TRIES, 0) - 1, -1)
    yield from before
    yield from range(index + 1, min(index + 1 + _TRIES - len(before), size))


class BadImages:
    """The unreadable images that a run has met, each named once and listed in a file.

    Args:
      size: number of images in the data set.
      max_share: share of the images that may be unreadable.
      path: path of the list: one line for each image, its name and what is wrong with it, separated by a tab. Images
        that are already listed there count.
      say: shows a line to the user.
    """

    def __init__(self, size: int, max_share: float, path: str | pathlib.Path, say: Callable[[str], None] = print):
        self._size, self._max_share, self._path, self._say = size, max_share, pathlib.Path(path), say
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines: list[str] = []
        except OSError as error:
            raise UsageError(
                f"{self._path} cannot be read ({error.strerror}): expected the list of unreadable images; delete it, "
                "and the run counts them again"
            ) from None
        self._names = {line.split("\t")[0] for line in lines}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, reason: str) -> None:
        """Records that an image was unreadable and another replaced it.

        Raises:
          RunError: if there are now too many of them.
          UsageError: if the list cannot be written.
        """
        name, reason = shown(name), shown(reason)
        if name in self._names:
            return
        self._names.add(name)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{reason}\n")
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written ({error.strerror}): pass a writable --workdir") from None
        if len(self) > self._max_share * self._size:
            raise RunError(
                f"{len(self)} of {self._size} images cannot be read, more than data.max_bad={self._max_share:g} "
                f"allows; the last was {name} ({reason}). They are listed in {self._path}: raise data.max_bad to "
                "resume the run from its last checkpoint; or replace or delete the images, and delete data.json in the "
                "workdir, which would reject the new ones"
            )
        self._say(f"{name} cannot be read ({reason}): a neighbor replaces it ({len(self)} so far).")
