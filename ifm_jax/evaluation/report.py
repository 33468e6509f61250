"""Readouts as a table and as a picture."""

import os
from collections.abc import Sequence

import numpy as np
import rich.console
import rich.table

from ifm_jax.evaluation.suppression import Readouts


def print_table(rows: Sequence[Readouts], console: rich.console.Console | None = None) -> None:
    """Prints held-out accuracy in percent, run x label, with the mean and the worst label."""
    table = rich.table.Table(title="Linear readouts of the frozen backbone, held-out accuracy in percent")
    table.add_column("run", no_wrap=True)
    labels = list(rows[0].accuracy)
    for column in [*labels, "mean", "worst"]:
        table.add_column(column, justify="right")
    for row in rows:
        values = [*(row.accuracy[label] for label in labels), row.mean, row.worst]
        table.add_row(row.name, *(f"{value:.1f}" for value in values))
    (console or rich.console.Console()).print(table)


def draw_readouts(rows: Sequence[Readouts], path: str | os.PathLike, chance: dict[str, float] | None = None) -> None:
    """Draws grouped bars, a group for each label and a bar for each run, with the accuracy on top.

    Args:
      rows: one for each run; the same labels in all.
      path: of the PNG.
      chance: label -> accuracy of guessing in percent, drawn as a dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(rows[0].accuracy)
    figure = Figure(figsize=(2.2 + 2.2 * len(labels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["#b8b8b8", "#9ecae1", "#3182bd", "#e6550d", "#31a354", "#756bb1"]
    width = 0.84 / len(rows)
    places = np.arange(len(labels))
    for i, row in enumerate(rows):
        left = places + (i - (len(rows) - 1) / 2) * width
        bars = axes.bar(
            left, [row.accuracy[label] for label in labels], 0.94 * width, color=colors[i % 6], label=row.name
        )
        axes.bar_label(bars, fmt="%.0f", padding=1, fontsize=9)
    for place, label in zip(places, labels, strict=True):
        if chance:
            line = axes.hlines(
                chance[label], place - 0.46, place + 0.46, colors="black", linestyles="dashed", linewidth=1
            )
            line.set_label("chance" if place == 0 else None)
    axes.set_xticks(places, labels, fontsize=11)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("held-out accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("What a linear readout finds in the frozen features", fontsize=12, loc="left")
    figure.legend(loc="outside lower center", ncols=min(len(rows) + 1, 5), frameon=False)
    figure.savefig(path, dpi=150)


def draw_samples(images: np.ndarray, views: Sequence[np.ndarray], path: str | os.PathLike) -> None:
    """Draws images above the views made of them, one image a column.

    Args:
      images: uint8 `(N, H, W, 3)`.
      views: each float or uint8 `(N, h, w, 3)`; floats in [0, 1].
      path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [("image", images), *((f"view {i + 1}", view) for i, view in enumerate(views))]
    figure = Figure(figsize=(0.9 + len(images), len(rows) * 1.06), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(name, fontsize=10)
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
