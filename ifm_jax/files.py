"""Small files of a run: written whole or not at all, read as what a person or a disk may have made of them."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ifm_jax.errors import UsageError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`, which takes its place once the block has ended without an error.

    Two threads of a process must not replace the same file at once.

    Raises:
      OSError: if it cannot take its place; `path` is as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a JSON object in place of what is there.

    Raises:
      OSError: if it cannot be written; `path` is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any] | None:
    """Returns the JSON object that a file holds; None where there is no file.

    Args:
      path: path of the file.
      remedy: what to do about a file that cannot be read, for the error.

    Raises:
      UsageError: if it cannot be read, or holds something else than an object.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except RecursionError:
        raise UsageError(f"{path} cannot be read (nested too deeply): {remedy}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds {json.dumps(values)[:40]}, expected a JSON object: {remedy}")
    return values


def cache_directory(*parts: str) -> pathlib.Path:
    """Returns a directory for what can be made again: drawn images, listed folders, compiled programs.

    It is below `$IFM_JAX_CACHE` (`~/.cache/ifm_jax` if unset), and may not exist yet.
    """
    return pathlib.Path(os.environ.get("IFM_JAX_CACHE") or os.path.expanduser("~/.cache/ifm_jax"), *parts)
