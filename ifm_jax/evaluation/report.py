"""Readouts as a table and as a picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import rich.console
import rich.table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ifm_jax.evaluation.linear import Result
from ifm_jax.evaluation.readout import Readouts


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


def print_linear(results: Sequence[Result], console: rich.console.Console | None = None) -> None:
    """Prints the results of linear evaluation: a table for each label, a line for each classifier."""
    console = console or rich.console.Console()
    for result in results:
        title = f"Linear evaluation of {result.label!r} ({result.protocol} protocol): {result.test_images:,} images, "
        table = rich.table.Table(title=title + f"{result.classes} classes, held-out accuracy in percent")
        columns = ["lr", "weight decay", "top-1", "top-5", "best top-1", "in epoch"]
        aside = result.best.holdout_top1 is not None
        for column in [*columns, *(["set aside", "chosen"] if aside else [])]:
            table.add_column(column, justify="right")
        for number, head in enumerate(result.heads):
            cells = [f"{head.lr:g}", f"{head.weight_decay:g}", f"{head.top1:.2f}", f"{head.top5:.2f}"]
            cells += [f"{head.best_top1:.2f}", str(head.best_epoch)]
            if aside:
                cells += [f"{head.holdout_top1:.2f}", "*" if number == result.chosen else ""]
            table.add_row(*cells, style="bold" if number == result.chosen and aside else None)
        console.print(table)


def draw_similarities(found: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the histograms of the cosine similarities of positives and of negatives.

    Args:
      found: result of `evaluate.diagnose`.
      path: path of the PNG file.
    """
    figure, axes = _figure(8, 4)
    edges = np.asarray(found["edges"])
    for kind, color in (("negative", "#3182bd"), ("positive", "#e6550d")):
        counts = np.asarray(found[f"{kind}_histogram"], float)
        density = counts / max(counts.sum(), 1) / np.diff(edges)
        text = f"{kind}s, mean {found[f'{kind}_mean']:.3f}"
        axes.stairs(density, edges, fill=True, color=color, alpha=0.55, label=text)
    axes.set_xlabel("cosine similarity of two embeddings")
    axes.set_ylabel("density")
    axes.set_xlim(-1, 1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Views of the same image, and of different ones", fontsize=12, loc="left")
    figure.savefig(path, dpi=150)


def draw_map(
    points: np.ndarray, labels: Mapping[str, tuple[np.ndarray, Sequence[str]]], path: str | os.PathLike[str]
) -> None:
    """Draws images as points, once for each label, in the colors of its classes.

    Args:
      points: `(N, 2)`.
      labels: name -> int `(N,)`, and the names of the classes.
      path: path of the PNG file.
    """
    figure, grid = _figure(1 + 5.5 * len(labels), 6, len(labels))
    for axes, (name, (classes, names)) in zip(np.atleast_1d(grid), labels.items(), strict=True):
        few = len(names) <= 20
        colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if few else "hsv"]
        for number, text in enumerate(names):
            chosen = points[classes == number]
            color = colors(number) if few else colors(number / len(names))
            axes.scatter(*chosen.T, s=4, color=color, linewidths=0, label=text if few else None)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name, fontsize=12, loc="left")
        if few:
            axes.legend(markerscale=3, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float, columns: int = 1):
    """Returns a figure and its axes, without touching any state of matplotlib."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def draw_readouts(
    rows: Sequence[Readouts],
    path: str | os.PathLike[str],
    chance: dict[str, float] | None = None,
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draws grouped bars, a group for each label and a bar for each run, with the accuracy on top.

    Args:
      rows: readouts of each run, all with the same labels.
      path: path of the PNG file.
      chance: label -> accuracy of guessing in percent, drawn as a dashed line.
      errors: run -> label -> standard error in points, drawn as an error bar.
    """
    labels = list(rows[0].accuracy)
    figure = Figure(figsize=(2.2 + 2.2 * len(labels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["#b8b8b8", "#9ecae1", "#3182bd", "#e6550d", "#31a354", "#756bb1"]
    width = 0.84 / len(rows)
    places = np.arange(len(labels))
    for i, row in enumerate(rows):
        left = places + (i - (len(rows) - 1) / 2) * width
        of_row = (errors or {}).get(row.name)
        bars = axes.bar(
            left,
            [row.accuracy[label] for label in labels],
            0.94 * width,
            yerr=[of_row[label] for label in labels] if of_row else None,
            color=colors[i % 6],
            label=row.name,
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


def draw_samples(images: np.ndarray, views: Sequence[np.ndarray], path: str | os.PathLike[str]) -> None:
    """Draws images above the views made of them, one image a column.

    Args:
      images: uint8 `(N, H, W, 3)`.
      views: each float or uint8 `(N, h, w, 3)`; floats in [0, 1].
      path: path of the PNG file.
    """
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
