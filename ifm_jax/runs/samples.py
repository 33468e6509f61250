"""Draws `samples.png`: a few images of a run, each with its two views. Imports matplotlib only to draw."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import assembly, files
from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD, example_rngs
from ifm_jax.config import Config
from ifm_jax.data import Source, ViewSource
from ifm_jax.data.order import EpochOrder, crop_uniforms
from ifm_jax.errors import RunError
from ifm_jax.pretrain import step_rngs

COUNT = 8


def first_views(
    config: Config, source: Source, size: int, count: int = COUNT
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Makes the two views of the first images of a run, as its first step does.

    Images held on the devices (`data.cache`) are cropped there, to within rounding the same.

    Args:
      config: resolved config of the run.
      source: source of its images.
      size: how many of them the run uses.
      count: how many images; unreadable ones are left out.

    Returns:
      The images whole (their central squares), uint8 `(N, H, W, 3)`, and both views, normalized, each float
      `(N, H, W, 3)`.
    """
    order = EpochOrder(size, config.seed)(0)[: config.batch_size]
    uniforms = np.zeros((len(order), 0))
    if isinstance(source, ViewSource):
        uniforms = crop_uniforms(config.seed, 0, config.batch_size, source.random_crops.draws)
    places: list[int] = []
    wholes: list[np.ndarray] = []
    crops: list[tuple[np.ndarray, ...]] = []
    for place, index in enumerate(order):
        if len(places) == count:
            break
        try:
            whole = source.examples(np.array([index]))["image"][0]
            cut = source.views(int(index), uniforms[place].tolist()) if isinstance(source, ViewSource) else (whole,)
        except RunError:  # an unreadable image
            continue
        places.append(place)
        wholes.append(whole)
        crops.append(cut)
    if not places:
        raise RunError(f"none of the first {len(order)} images can be read")
    augment = jax.jit(assembly.make_augmentation(config))
    rngs = step_rngs(assembly.initial_rngs(config)[1], jnp.zeros((), jnp.int32))
    first, second = (
        np.asarray(augment(example_rngs(rng, jnp.asarray(places, jnp.int32)), np.stack([cut[which] for cut in crops])))
        for rng, which in zip(rngs[:2], (0, -1), strict=True)
    )
    return np.stack(wholes), (first, second)


def draw(config: Config, source: Source, size: int, path: str | os.PathLike[str]) -> None:
    """Draws `samples.png`; arguments as for `first_views`, and the path of the PNG file."""
    images, views = first_views(config, source, size)
    images, views = images[..., :3], [view[..., :3] for view in views]  # without random bits
    mean, std = (np.asarray(each, np.float32) for each in (IMAGENET_MEAN, IMAGENET_STD))
    draw_samples(images, [np.clip(view.astype(np.float32) * std + mean, 0, 1) for view in views], path)


def draw_samples(images: np.ndarray, views: Sequence[np.ndarray], path: str | os.PathLike[str]) -> None:
    """Draws images above the views made of them, one image a column; replaces the file atomically.

    Args:
      images: uint8 `(N, H, W, 3)`.
      views: each float or uint8 `(N, h, w, 3)`; floats in [0, 1].
      path: path of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [("image", images), *((f"view {i + 1}", view) for i, view in enumerate(views))]
    figure = Figure(figsize=(0.4 + 1.1 * len(images), 0.1 + len(rows) * 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(name, fontsize=10)
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
