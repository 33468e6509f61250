"""Small files of a run: writes them atomically, and reads them without trusting their contents."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ifm_jax.errors import UsageError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`; the file replaces `path` when the block ends without an error.

    Two threads of a process must not replace the same file at the same time.

    Raises:
      OSError: if the file cannot replace `path`, which then stays unchanged.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a JSON object and replaces an existing file.

    Raises:
      OSError: if the file cannot be written; `path` stays unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if there is no file.

    Args:
      path: path of the file.
      remedy: advice about an unreadable file, for the error.

    Raises:
      UsageError: if the file cannot be read, or holds no object.
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
        raise UsageError(f"{path} contains {json.dumps(values)[:40]}, expected a JSON object: {remedy}")
    return values


def cache_directory(*parts: str) -> pathlib.Path:
    """Returns the cache directory for drawn images, labels and compiled programs.

    It is below `$IFM_JAX_CACHE` (`~/.cache/ifm_jax` if unset), and may not exist yet.
    """
    return pathlib.Path(os.environ.get("IFM_JAX_CACHE") or os.path.expanduser("~/.cache/ifm_jax"), *parts)
