"""Where things are kept that can be made again: drawn images, found files, compiled programs."""

import os
import pathlib


def directory(*parts: str) -> pathlib.Path:
    """Returns a directory below `$IFM_JAX_CACHE` (`~/.cache/ifm_jax` if unset); it may not exist yet."""
    return pathlib.Path(os.environ.get("IFM_JAX_CACHE") or os.path.expanduser("~/.cache/ifm_jax"), *parts)
