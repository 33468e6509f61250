"""Arrays from untrusted .npz files: nothing in them is executed, and no array is read that does not fit in memory."""

import contextlib
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

_SUFFIX = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzError(ValueError):
    """A file, or an array in it, that cannot be read; the message says why, in one line."""


class Npz(Mapping[str, np.ndarray]):
    """The arrays of a file, each read on access.

    This is a context manager. Members that are not arrays are skipped.

    Args:
      path: path of the file.

    Raises:
      FileNotFoundError: if the file does not exist.
      NpzError: if it is not a .npz file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._left = memory()
        try:
            self._file = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise
        except Exception as error:  # damage can make the library raise anything, here and below
            raise NpzError(_reason(error)) from None
        names = (name for name in self._file.namelist() if name.endswith(_SUFFIX))
        self._members = {name.removesuffix(_SUFFIX): name for name in names}

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members  # Mapping's would read the array

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns an array.

        Raises:
          KeyError: if there is no array of this name.
          NpzError: if it is damaged or encrypted, holds Python objects, or takes more memory than the machine has.
        """
        member = self._members[name]
        try:
            self._check(member)
            with self._file.open(member) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        except NpzError as error:
            raise NpzError(f"{name}: {error}") from None
        except Exception as error:
            raise NpzError(f"{name}: {_reason(error)}") from None

    def _check(self, member: str) -> None:
        """Raises an `NpzError` if an array's header rules out reading it, before any memory is allocated."""
        if self._file.getinfo(member).flag_bits & 1:
            raise NpzError("it is encrypted")
        with self._file.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in _HEADERS:
                raise NpzError(f"it has format {'.'.join(map(str, version))}, expected 1.0 or 2.0")
            shape, _, dtype = _HEADERS[version](stream)
        if dtype.hasobject:
            raise NpzError("it contains Python objects, expected plain numbers or text")
        if any(side < 0 for side in shape):
            raise NpzError(f"its shape is {shape}")
        size = dtype.itemsize * math.prod(shape)
        if size > self._file.getinfo(member).file_size:
            raise NpzError(f"it is truncated: {shape} of {dtype} needs {size} bytes")
        if size > self._left:
            raise NpzError(
                f"its {size / 2**30:.1f} GiB do not fit in this machine's {memory() / 2**30:.1f} GiB of memory"
            )
        self._left -= size


def memory() -> float:
    """Returns how many bytes of memory this process may use; infinity if unknown."""
    found = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # another system
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):  # no container, or one without a limit
        found.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
