"""The images that an evaluation uses: where a source has one set of images only, a tenth of it is held out.

Pre-training needs no labels and uses all images of its source. An evaluation never trains a classifier on held-out
images. Which images are held out depends on each image's own name alone, so it stays the same when images are added,
and wherever the folder is.
"""

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from ifm_jax.config import DataConfig, random_bits
from ifm_jax.data.npz import NpzError
from ifm_jax.data.protocols import ViewSource
from ifm_jax.data.sources import open_views, subset
from ifm_jax.errors import UsageError

SHARE = 0.1  # of the training images
SPLITS = ("train", "test", "all")


def has_held_out(data: DataConfig) -> bool:
    """Returns whether the config's source has held-out images of its own, as far as can be told without reading it.

    Args:
      data: data section of a validated config.

    Raises:
      UsageError: if there is no such folder.
    """
    kind, _, rest = random_bits(data)[1].partition(":")
    if kind == "folder":
        from ifm_jax.data.folder import has_held_out

        return has_held_out(rest)
    if kind == "array":
        from ifm_jax.data.array import has_held_out

        try:
            return has_held_out(pathlib.Path(rest).expanduser())
        except (OSError, RuntimeError, NpzError):  # opening it explains what is wrong
            return True
    return True  # drawn images have any number of them; a tfds: source has splits and expressions


def held_out(names: Sequence[str], share: float = SHARE) -> np.ndarray:
    """Chooses the images to hold out, each by a hash of its own name.

    Args:
      names: names of the images, N of them, which do not depend on where the images are stored.
      share: about this share of them is chosen, at least one and never all.

    Returns:
      bool `(N,)`.
    """
    place = np.array([int.from_bytes(_hash(name)[:8], "big") / 2**64 for name in names])
    chosen = place < share
    if len(names) > 1:
        chosen[place.argmin()] = True
        chosen[place.argmax()] = False
    return chosen


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def open_evaluated(data: DataConfig, split: str, *, count: int, least_area: float) -> ViewSource:
    """Returns the images of a split, as an evaluation uses them.

    Args:
      data: data section of a validated config; with `data.limit` the training images are among its first.
      split: "train", "test" (held out) or "all": every training image, where those held out are among them.
      count: number of views per image; see `sources.open_views`.
      least_area: likewise.

    Raises:
      UsageError: if there are no such images.
    """
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    own = has_held_out(data)
    if own and split == "all":
        raise UsageError(f"split='all': data.source={data.source!r} has two sets of images; expected train or test")
    if own and split == "test":
        return open_views(data, "test", count=count, least_area=least_area)
    source = open_views(data, "train", count=count, least_area=least_area)
    kept = np.ones(len(source), bool)
    if not own and split != "all":
        if len(source) < 2:
            raise UsageError(
                f"data.source={data.source!r} has a single image, of which none can be held out: expected at least 2"
            )
        images = getattr(source, "source", source)  # without random bits
        aside = held_out(getattr(images, "paths", None) or [source.name(index) for index in range(len(source))])
        kept = aside if split == "test" else ~aside
    if split == "train" and data.limit:
        kept = kept & (np.arange(len(source)) < data.limit)
        if not kept.any():
            raise UsageError(
                f"data.limit={data.limit}: these images of data.source={data.source!r} are all held out; expected more"
            )
    return source if kept.all() else subset(source, np.flatnonzero(kept))
