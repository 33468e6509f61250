"""Draws `curves.png`, the metrics of a run as a picture. Imports matplotlib only to draw."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ifm_jax import files

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_MAX_POINTS = 2000
BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"  # safe for color-blind readers (Okabe and Ito)
INK, GREY = "#333333", "#8a8a8a"
_LABEL_COLORS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", SKY)
_EVALUATIONS = "readout accuracy (%)"
_LEGEND = "legend of the evaluations"
_HEIGHTS = {"learning rate": 1.0, _EVALUATIONS: 2.6, _LEGEND: 1.0}  # of panels, relative; others: 2
# The contents of a picture: for each panel its label and its curves, as field, text and color.
Panels = Sequence[tuple[str, Sequence[tuple[str, str, str]]]]
PRETRAINING: Panels = (
    ("loss", (("loss", "total", BLUE), ("loss_clean", "InfoNCE", ORANGE), ("loss_ifm", "shifted (IFM)", GREEN))),
    ("contrast accuracy (%)", (("acc5", "top 5", SKY), ("acc1", "top 1", BLUE))),
    ("learning rate", (("lr", "learning rate", INK),)),
)


PROBE: Panels = (
    ("loss", (("loss", "training", BLUE),)),
    ("held-out accuracy (%)", (("val_acc5", "top 5", SKY), ("val_acc1", "top 1", BLUE))),
    ("learning rate", (("lr", "learning rate", INK),)),
)


def draw_curves(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    panels: Panels = PRETRAINING,
    *,
    chance: float | None = None,
) -> None:
    """Draws `curves.png`: loss, accuracy and learning rate over the steps; the legends show the latest values.

    With more than 30 records the noisy curves are pale, with their running mean on top (over a fiftieth of the run to
    either side, at least two records). A curve has at most 2000 points. The picture replaces the old one atomically;
    matplotlib's global state stays unchanged.

    If the run was evaluated, a panel shows the linear readout and the nearest neighbors of every label, and the linear
    readout before training as a dotted line; its legend, above it, shows the latest values and gains. Of more than six
    labels it shows the six that gained least.

    Args:
      records: records from `read`; missing fields are not drawn. Without records nothing is drawn.
      path: path of the PNG file, 1080 px wide and 1080 px high, 1440 px with evaluations.
      panels: panels of the picture; a panel without any value is left out.
      chance: InfoNCE loss at chance, drawn as a dashed line among the losses; None: no line.
    """
    if not records:
        return
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    probe = panels is PROBE
    found = {name for record in records for name, value in record.items() if value is not None}
    panels = [panel for panel in panels if found & {name for name, _, _ in panel[1]}] or panels[:1]
    evaluated = [record for record in records if record.get("linear") is not None]
    if evaluated:
        panels = [*panels[:-1], (_LEGEND, ()), (_EVALUATIONS, ()), *panels[-1:]]
    labels = _labels_to_draw(evaluated)
    height = 12 if evaluated else 9
    figure = Figure(figsize=(9, height), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ratios = [0.65 if label == _LEGEND and len(labels) < 4 else _HEIGHTS.get(label, 2) for label, _ in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.09, right=0.975, top=1 - 0.585 / height, bottom=0.54 / height, hspace=0.09)

    count = len(records)
    drawn = np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(int))
    steps = np.array([record["step"] for record in records], dtype=float)
    window = max(count // 50, 2) if count > 30 else 0
    for number, (axis, (label, curves)) in enumerate(zip(axes, panels, strict=True)):
        if label == _LEGEND:
            axis.axis("off")
            continue
        if label == _EVALUATIONS:
            _draw_evaluations(axis, axes[number - 1], evaluated, labels)
        for name, text, color in curves:
            values = [record.get(name) for record in records]
            if all(value is None for value in values):
                continue
            values = np.array([math.nan if value is None else value for value in values], dtype=float)
            known = np.flatnonzero(np.isfinite(values))
            if len(known) < count:  # recorded only sometimes, as by an evaluation
                style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.8}
                axis.plot(steps[known], values[known], label=f"{text}  {_latest(name, values[known[-1]])}", **style)
                continue
            # For MoCo the total and InfoNCE are the same curve: the upper one is dashed, so that the lower one shows.
            style = {"color": color, "linestyle": (0, (4, 2)) if name == "loss_clean" else "-"}
            text = f"{text}  {_latest(name, values[-1])}"
            if window and name != "lr":
                axis.plot(steps[drawn], values[drawn], color=color, linewidth=0.8, alpha=0.22)
                axis.plot(steps[drawn], _running_mean(values, window)[drawn], linewidth=2, label=text, **style)
            else:
                marker = {"marker": "o", "markersize": 4} if count <= 30 else {}
                axis.plot(steps[drawn], values[drawn], linewidth=1.8, label=text, **style, **marker)
        if chance is not None and label == "loss":
            axis.axhline(chance, color=GREY, linewidth=1.2, linestyle=(0, (6, 4)), label=f"chance  {chance:.2f}")
        axis.set_ylabel(label, color=INK, fontsize=11)
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9.5, length=0)
        axis.margins(x=0.01)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color("#bbbbbb")
        if axis.lines and label != _EVALUATIONS:
            axis.legend(loc="best", fontsize=9.5, labelcolor=INK, framealpha=0.85, edgecolor="none")
        if label not in ("loss", _EVALUATIONS):
            peak = max((record.get(name) or 0.0 for record in records for name, _, _ in curves), default=0.0)
            axis.set_ylim(0, 1.08 * peak or 1.0)
    figure.align_ylabels(axes)
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
    if count == 1:
        axes[-1].set_xlim(steps[0] - 1, steps[0] + 1)
    axes[-1].set_xlabel("step", color=INK, fontsize=11)
    epoch = records[-1].get("epoch")
    title = f"step {records[-1]['step']}" + ("" if epoch is None else f"   epoch {epoch:.4g}")
    figure.text(0.975, 0.955, title, color=GREY, fontsize=11, ha="right")
    title = "Linear evaluation" if probe else "Contrastive pre-training"
    figure.text(0.09, 0.955, title, color=INK, fontsize=13, weight="bold")
    with files.replacing(path) as temporary:
        canvas.print_png(temporary)


def _labels_to_draw(evaluated: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the labels of the evaluations to draw, those that gained least if there are many; "" for a single one."""
    if not evaluated:
        return []
    last = evaluated[-1]
    labels = [name.partition("/")[2] for name in last if name.startswith("linear/")]
    if len(labels) > len(_LABEL_COLORS):
        least = sorted(labels, key=lambda label: last.get(f"gain/{label}", last[f"linear/{label}"]))
        labels = [label for label in labels if label in least[: len(_LABEL_COLORS)]]
    return labels or [""]


def _draw_evaluations(axis: Axes, strip: Axes, evaluated: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Draws the readouts of each label; the legend goes into the strip above, where it covers nothing."""
    from matplotlib.lines import Line2D

    last = evaluated[-1]
    few: dict[str, Any] = {"marker": "o", "markersize": 4} if len(evaluated) <= 30 else {}
    handles: list[Line2D] = []
    peak, compared = 0.0, False
    for label, color in zip(labels, _LABEL_COLORS, strict=False):
        after = f"/{label}" if label else ""
        for kind, style in (("linear", "-"), ("knn", (0, (4, 2)))):
            known = [(record["step"], record[kind + after]) for record in evaluated if kind + after in record]
            if not known:
                continue
            thin = kind == "knn"
            width, face = (1.2, "white") if thin else (1.8, color)
            (line,) = axis.plot(
                *zip(*known, strict=True), color=color, linestyle=style, linewidth=width, markerfacecolor=face, **few
            )
            gain = last.get(f"{'knn_' if thin else ''}gain{after}")
            text = f"{known[-1][1]:.1f} %" + ("" if gain is None else f" ({gain:+.1f})")
            line.set_label(f"neighbors  {text}" if thin else f"{_short(label or 'linear')}  {text}")
            handles.append(line)
            peak = max(peak, *(value for _, value in known))
            if gain is not None and not thin:
                compared = True
                axis.axhline(known[-1][1] - gain, color=color, linewidth=1.4, linestyle=(0, (1, 1.5)))
                peak = max(peak, known[-1][1] - gain)
    columns = min(len(labels), 3)
    handles += [Line2D([], [], linestyle="", label=" ")] * (2 * (-len(labels) % columns))
    title = "solid: linear readout, dashed: nearest neighbors"
    title += ", dotted: linear readout before training; in brackets: gain since then" if compared else ""
    legend = strip.legend(
        handles=handles,
        title=title,
        title_fontsize=9.5,
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0.0, -0.1),
        borderaxespad=0,
        ncols=columns,
        columnspacing=3,
        fontsize=9.5,
        labelcolor=INK,
        frameon=False,
    )
    legend.get_title().set_color(INK)
    axis.set_ylim(0, 1.08 * peak or 1.0)


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _latest(name: str, value: float) -> str:
    if "acc" in name:
        return f"{value:.1f} %"
    return f"{value:.3g}" if name == "lr" else f"{value:.4f}"


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of up to `window` values before and after each value, and over fewer at the ends."""
    import numpy as np

    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    center = np.arange(len(values))
    # Symmetric near the ends, or a slope would bend there; but never down to a single noisy value.
    reach = np.clip(np.minimum(center, len(values) - 1 - center), max(window // 4, 1), window)
    low, high = np.maximum(center - reach, 0), np.minimum(center + reach + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), math.nan)
