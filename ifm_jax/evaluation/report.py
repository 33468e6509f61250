"""Readouts as a table and as a picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
import rich.console
import rich.table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from ifm_jax.evaluation.linear import Result, has_top5
from ifm_jax.evaluation.readout import Readouts

SAME, OTHER = "#0072b2", "#d55e00"  # safe for color-blind readers (Okabe and Ito)
PANEL = "#e9e9e9"  # behind points: white and yellow ones can be seen


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


def beside(found: Mapping[str, float]) -> str:
    """Returns what an accuracy is to be compared with, as text: chance, the most frequent class, the untrained network.

    Args:
      found: `chance`, `majority` and, if it was evaluated, `untrained_top1`, in percent.
    """
    text = f"chance {found['chance']:.2f} %, always the most frequent class {found['majority']:.2f} %"
    untrained = found.get("untrained_top1")
    return text if untrained is None else f"{text}, untrained network {untrained:.2f} %"


def print_linear(
    results: Sequence[Result],
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Prints the results of linear evaluation: a table for each label, a line for each classifier.

    Args:
      results: results of all labels.
      baselines: label -> as for `beside`; None: none.
      console: None: the terminal.
    """
    console = console or rich.console.Console()
    for result in results:
        title = f"Linear evaluation of {result.label!r} ({result.protocol} protocol): {result.test_images:,} images, "
        table = rich.table.Table(title=title + f"{result.classes} classes, held-out accuracy in percent")
        top5 = has_top5(result.classes)
        columns = ["lr", "weight decay", "top-1", *(["top-5"] if top5 else []), "best top-1", "in epoch"]
        aside = result.best.holdout_top1 is not None
        for column in [*columns, *(["set aside", "chosen"] if aside else [])]:
            table.add_column(column, justify="right")
        for number, head in enumerate(result.heads):
            cells = [f"{head.lr:g}", f"{head.weight_decay:g}", f"{head.top1:.2f}"]
            cells += [*([f"{head.top5:.2f}"] if top5 else []), f"{head.best_top1:.2f}", str(head.best_epoch)]
            if aside:
                cells += [f"{head.holdout_top1:.2f}", "*" if number == result.chosen else ""]
            table.add_row(*cells, style="bold" if number == result.chosen and aside else None)
        console.print(table)
        if baselines:
            console.print(f"To compare with: {beside(baselines[result.label])}.", highlight=False, soft_wrap=True)


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
    points: np.ndarray,
    labels: Mapping[str, tuple[np.ndarray, Sequence[str]]],
    path: str | os.PathLike[str],
    title: str = "",
    chosen: np.ndarray | None = None,
    pictures: np.ndarray | None = None,
) -> None:
    """Draws images as points, once for each label, in the colors of its classes; without labels once.

    Classes that are named after colors have these colors. Up to 20 classes are named in a legend beside the points.

    Args:
      points: `(N, 2)`.
      labels: name -> int `(N,)`, and the names of the classes.
      path: path of the PNG file.
      title: title of the picture.
      chosen: points to draw as pictures, int `(M,)`; None: none.
      pictures: their images, uint8 `(M, H, W, 3)`.
    """
    columns = max(1, len(labels))
    figure, grid = _figure(max(8.0, 6.2 * columns) if labels else 9.0, 6.4 if labels else 9.0, columns)
    every = np.atleast_1d(grid)
    size = float(np.clip(12000 / max(1, len(points)), 6, 40))
    for axes, (name, (classes, names)) in zip(every, labels.items(), strict=False):
        axes.set_facecolor(PANEL)
        colors = class_colors(names)
        few = len(names) <= 20
        for number, text in enumerate(names):
            of_class = points[classes == number]
            axes.scatter(
                *of_class.T,
                s=size,
                color=colors[number],
                edgecolors="#555555",
                linewidths=0.25,
                label=text if few else None,
            )
        axes.set_title(name if few else f"{name} ({len(names)} classes)", fontsize=12, loc="left")
        if few:
            longest = max(map(len, names))
            axes.legend(
                handletextpad=0.2,
                markerscale=float(np.sqrt(40 / size)),
                fontsize=9 if longest <= 16 else 7,
                frameon=False,
                loc="upper left",
                bbox_to_anchor=(1, 1),
            )
    if not labels:
        every[0].scatter(*points.T, s=size, color="#0072b2", linewidths=0)
    if chosen is not None and pictures is not None:
        for place, picture in zip(points[chosen], pictures, strict=True):
            zoom = 72 * 0.4 / picture.shape[0]  # 0.4 inches
            box = AnnotationBbox(OffsetImage(picture, zoom=zoom), tuple(place), pad=0.1, bboxprops={"linewidth": 0.4})
            every[0].add_artist(box)
        every[0].margins(0.07)
    for axes in every:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def class_colors(names: Sequence[str]) -> list[Any]:
    """Returns a color for each class: the one that it is named after, if all classes are named after colors."""
    named = [matplotlib.colors.CSS4_COLORS.get(name.lower()) for name in names]
    if all(named):
        return named
    if len(names) > 20:
        return [matplotlib.colormaps["hsv"](number / len(names)) for number in range(len(names))]
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [colors(number) for number in range(len(names))]


def thumbnails(points: np.ndarray, most: int = 150, across: int = 17) -> np.ndarray:
    """Chooses points that can be drawn as pictures without hiding each other, `across` of them side by side.

    Args:
      points: `(N, 2)`.
      most: number of pictures.
      across: pictures that fit across the map.

    Returns:
      int `(M,)`, indices of points.
    """
    extent = np.maximum(points.max(axis=0) - points.min(axis=0), 1e-9)
    scaled = (points - points.min(axis=0)) / extent * across
    chosen: list[int] = []
    for index, point in enumerate(scaled):
        if len(chosen) < most and (np.abs(scaled[chosen] - point).max(axis=1) >= 1).all():
            chosen.append(index)
    return np.array(chosen, int)


def draw_neighbors(
    queries: np.ndarray,
    neighbors: Sequence[np.ndarray],
    similarity: np.ndarray,
    agree: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draws images, a row for each, with their nearest neighbors and the cosine similarities.

    With one label the frame of a neighbor tells whether it has the query's class; with several a bar for each label
    below the picture does.

    Args:
      queries: uint8 `(Q, H, W, 3)`.
      neighbors: for each query uint8 `(k, H, W, 3)`.
      similarity: `(Q, k)`.
      agree: label -> bool `(Q, k)`, whether the neighbor has the query's class; empty without labels.
      path: path of the PNG file.
      title: title of the picture.
    """
    rows, k = similarity.shape
    figure = Figure(figsize=(max(1.15 * (k + 1), 6.5), 1.32 * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, k + 1, squeeze=False)
    for row in range(rows):
        for column, axes in enumerate(grid[row]):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if not column:
                axes.imshow(queries[row])
                if not row:
                    axes.set_title("image", fontsize=9)
                continue
            axes.imshow(neighbors[row][column - 1])
            axes.set_title(f"{similarity[row, column - 1]:.3f}", fontsize=9, pad=3)
            right_ones = [bool(each[row, column - 1]) for each in agree.values()]
            if len(right_ones) == 1:
                axes.spines[:].set(visible=True, linewidth=3.5, color=SAME if right_ones[0] else OTHER)
            for number, one in enumerate(right_ones if len(right_ones) > 1 else []):
                left, right = (number + 0.04) / len(right_ones), (number + 0.96) / len(right_ones)
                axes.plot(
                    [left, right],
                    [-0.07, -0.07],
                    color=SAME if one else OTHER,
                    linewidth=4,
                    solid_capstyle="butt",
                    transform=axes.transAxes,
                    clip_on=False,
                )
    if agree:
        same = f"same {next(iter(agree))}" if len(agree) == 1 else f"same as on the left (bars: {', '.join(agree)})"
        handles = [
            Line2D([], [], color=color, linewidth=5, label=text) for color, text in ((SAME, same), (OTHER, "another"))
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
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
