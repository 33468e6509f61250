"""The pictures of a study: effects with their intervals, what trades one label for another, and loss against error."""

import dataclasses
import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from ifm_jax import files
from ifm_jax.runs.curves import BLUE, GREEN, GREY, INK, ORANGE, SKY
from ifm_jax.studies import statistics
from ifm_jax.studies.statistics import Rows
from ifm_jax.studies.study import MEAN, WORST

# Safe for color-blind readers (Okabe and Ito). With five markers, 40 arms look different.
_COLORS = (BLUE, ORANGE, GREEN, "#cc79a7", SKY, "#e69f00", INK, GREY)
_MARKERS = "os^Dv"
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MOST_ARMS = 24  # more names would be larger than the picture
_MOST_BESIDE = 3  # sources side by side
_PALE = "#bbbbbb"
_OBJECTIVES = {"infonce": "InfoNCE", "ifm": "IFM", "ifm_only": "IFM only"}
AXES = ("temperature", "beta", "epsilon")
_X_LABELS = {
    "temperature": "temperature",
    "beta": "hardness of the negatives, beta",
    "epsilon": "perturbation budget, epsilon",
}
# What else must agree between two arms for their difference to be that of an axis.
_SETTING = ("method", "batch_size", "queue_size", "steps", "optimizer", "lr")
_SETTING_TEXTS = {"batch_size": "batch {}", "queue_size": "queue {}", "steps": "{} steps", "lr": "lr {}"}


@dataclasses.dataclass(frozen=True)
class Series:
    """The arms of a source that differ in nothing but one axis.

    Attributes:
      source: name of the source.
      axis: "temperature", "beta" or "epsilon".
      setting: method, batch size, length and so on, which all of them share.
      objective: "infonce", "ifm" or "ifm_only".
      alpha: weight of the shifted loss; None where it plays no part.
      others: the two other axes and their values.
      points: value on the axis -> runs, in the order of the axis. InfoNCE is at epsilon 0.
    """

    source: str
    axis: str
    setting: dict[str, Any]
    objective: str
    alpha: float | None
    others: dict[str, float]
    points: dict[float, list[Mapping[str, Any]]]


def find_series(rows: Rows) -> list[Series]:
    """Returns the series of at least two points among the runs of a study, for the axes in the order of `AXES`.

    Of several arms that agree in all that a row says of them, the first is taken.
    """
    return [series for axis in AXES for series in _along(rows, axis) if len(series.points) > 1]


def _along(rows: Rows, axis: str) -> list[Series]:
    found: dict[tuple[Any, ...], Series] = {}
    for clean in (False, True):  # InfoNCE comes last: it is where the series of IFM begin
        for row in rows:
            values = {name: float(row[name]) for name in AXES}
            objective = row["objective"]
            alpha = row.get("alpha") if objective == "ifm" else None
            if objective == "infonce":
                values["epsilon"] = 0.0  # whatever the field says, it plays no part
            if (objective == "infonce") != clean:
                continue
            setting = {name: row.get(name) for name in _SETTING}
            others = {name: values[name] for name in AXES if name != axis}
            same = (row["source"], *setting.values(), *others.values())
            if axis == "epsilon" and clean:
                joined = [series for key, series in found.items() if key[:-2] == same]
            else:
                key = (*same, objective, alpha)
                new = Series(row["source"], axis, setting, objective, alpha, others, {})
                joined = [found.setdefault(key, new)]
            for series in joined:
                point = series.points.setdefault(values[axis], [])
                if not point or point[0]["arm"] == row["arm"]:
                    point.append(row)
    return [
        dataclasses.replace(series, points={x: series.points[x] for x in sorted(series.points)})
        for series in found.values()
    ]


def draw_effects(rows: Rows, comparisons: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draws each comparison's mean difference with its 95 % interval, and the difference of each pair as a pale dot.

    Confirmatory comparisons come first and have filled marks. An interval that is much wider than the differences
    themselves, as that of two pairs, ends in an arrow at the edge; its numbers stand beside it. The sources stand one
    below the other.

    Args:
      rows: the runs of the study.
      comparisons: entries from `statistics.compare`.
      path: path of the PNG file, which is replaced atomically.

    Returns:
      Whether there was something to draw.
    """
    if not comparisons:
        return False
    _draw_comparisons(rows, comparisons, path, beside=False)
    return True


def draw_summary(rows: Rows, comparisons: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draws the comparisons of the mean and of the worst label alone, the sources side by side; else as `draw_effects`.

    Returns:
      Whether it was drawn: not if it would show nothing, or the same as `draw_effects`, or more sources than fit.
    """
    found = [entry for entry in comparisons if entry["label"] in (MEAN, WORST)]
    if len(found) in (0, len(comparisons)) or len({entry["source"] for entry in found}) > _MOST_BESIDE:
        return False
    _draw_comparisons(rows, found, path, beside=True)
    return True


def _draw_comparisons(
    rows: Rows, comparisons: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], beside: bool
) -> None:
    """Draws a panel for each source, beside each other or one below the other."""
    entries = _by_name(comparisons)
    sources = list(dict.fromkeys(entry["source"] for entry in entries))
    of_sources = [[entry for entry in entries if entry["source"] == source] for source in sources]
    lists = [_lines_of(of_source, 40 if beside else 76) for of_source in of_sources]
    heights = [sum(height for _, height in lines) + 0.3 for lines in lists]
    inches = 0.25
    if beside:
        figure, canvas = _figure(6.0 * len(sources), inches * max(heights) + 2.0)
        panels = figure.subplots(1, len(sources), squeeze=False)[0]
    else:
        figure, canvas = _figure(9.5, inches * sum(heights) + 0.75 * len(sources) + 1.3)
        panels = figure.subplots(len(sources), 1, squeeze=False, height_ratios=heights)[:, 0]
    pairs = [
        [
            list(statistics.differences(rows, entry["source"], entry["a"], entry["b"], entry["label"]).values())
            for entry in of_source
        ]
        for of_source in of_sources
    ]
    limits = [_limit(list(zip(*each, strict=True))) for each in zip(of_sources, pairs, strict=True)]
    if max(limits) < 3 * min(limits):  # one scale for all sources, unless it would hide the effects of one
        limits = [max(limits)] * len(limits)
    for axes, source, lines, of_source, limit in zip(panels, sources, lists, pairs, limits, strict=True):
        _draw_source(axes, lines, of_source, limit)
        axes.set_title(_wrapped(source, 40 if beside else 70), loc="left", fontsize=12, color=INK)
    text = "difference in points of held-out accuracy\nright: mean [95 % interval], pairs above 0 of all pairs"
    for axes in panels if beside else panels[-1:]:
        axes.set_xlabel(text, fontsize=10, color=INK)
    style: dict[str, Any] = {"marker": "o", "color": BLUE, "linewidth": 2}
    marks = [
        Line2D([], [], label="confirmatory: fixed before the runs", **style),
        Line2D([], [], label="exploratory", **style | {"color": GREY, "markerfacecolor": "white"}),
        Line2D([], [], label="one pair of runs", marker="o", color=SKY, linestyle="", markersize=3.5, alpha=0.7),
    ]
    if all(entry["pairs"] == 1 for entry in entries):
        del marks[2]
    if not any(entry["confirmatory"] for entry in entries):
        del marks[0]
    elif all(entry["confirmatory"] for entry in entries):
        del marks[1]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK)
    _save(canvas, path)


def _draw_source(
    axes: Axes,
    lines: Sequence[tuple[str | Mapping[str, Any], float]],
    pairs: Sequence[Sequence[float]],
    limit: float,
) -> None:
    """Draws the comparisons of a source, with their numbers on the right.

    Args:
      axes: the panel.
      lines: from `_lines_of`.
      pairs: for each comparison the differences of its pairs.
      limit: end of the x axis.
    """
    places: list[float] = []
    shown: list[Mapping[str, Any]] = []
    top = 0.0
    for content, size in lines:
        if isinstance(content, str):
            axes.text(
                0.008,
                top + size - 0.25,
                content,
                transform=axes.get_yaxis_transform(),
                va="bottom",
                fontsize=9.5,
                color=INK,
                weight="bold",
                linespacing=1.15,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
        else:
            places.append(top + size / 2)
            shown.append(content)
        top += size
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for place, entry, of_entry in zip(places, shown, pairs, strict=True):
        _draw_effect(axes, place, entry, of_entry, limit)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(top + 0.2, -0.1)
    axes.set_yticks(places, [entry["label"] for entry in shown])
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(places, [_numbers(entry) for entry in shown])
    for each in (axes, right):
        each.spines[:].set_visible(False)
        each.tick_params(colors=INK, labelsize=9, length=0)
        each.tick_params(axis="y", pad=8)  # room for an arrow
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(_PALE)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _by_name(comparisons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the entries with all those of one name together, in the order of `statistics.confirmatory_first`."""
    ordered = statistics.confirmatory_first(comparisons)
    names = dict.fromkeys(entry["name"] for entry in ordered)
    return [entry for name in names for entry in ordered if entry["name"] == name]


def _lines_of(entries: Sequence[Mapping[str, Any]], width: int) -> list[tuple[str | Mapping[str, Any], float]]:
    """Returns the lines of a panel, with their heights: the name of each comparison above its entries.

    Args:
      entries: the comparisons.
      width: letters of a line.
    """
    lines: list[tuple[str | Mapping[str, Any], float]] = []
    last = None
    for entry in entries:
        if entry["name"] != last:
            last = entry["name"]
            text = _wrapped(entry["name"], width)
            lines.append((text, 0.55 + 0.65 * (1 + text.count("\n"))))
        lines.append((entry, 0.85))
    return lines


def _limit(entries: Sequence[tuple[Mapping[str, Any], Iterable[float]]]) -> float:
    """Returns the end of the x axis: all dots fit, and the intervals, unless so few pairs make them enormous."""
    dots = max((abs(value) for _, pairs in entries for value in pairs), default=0.0)
    ends = [max(map(abs, entry["ci95"])) for entry, _ in entries if entry["ci95"]]
    widest = max((end for end in ends if end <= 2 * dots), default=0.0)
    return 1.08 * max(dots, widest) or 1.0


def _draw_effect(axes: Axes, place: float, entry: Mapping[str, Any], pairs: Sequence[float], limit: float) -> None:
    color = BLUE if entry["confirmatory"] else GREY
    # Beside the line, which would hide them, and on both sides, since equal ones would hide each other.
    heights = [place + (0.2 if number % 2 else -0.2) for number in range(len(pairs))]
    if len(pairs) > 1:
        axes.scatter(pairs, heights, s=11, color=SKY, alpha=0.6, linewidths=0, zorder=2)
    if entry["ci95"]:
        low, high = entry["ci95"]
        axes.hlines(place, max(low, -limit), min(high, limit), color=color, linewidth=2, zorder=3)
        for cut, x, marker in ((low < -limit, -limit, "<"), (high > limit, limit, ">")):
            if cut:
                axes.plot(x, place, marker, color=color, markersize=6, clip_on=False, zorder=4)
    face = color if entry["confirmatory"] else "white"
    style = {"color": color, "markerfacecolor": face, "markersize": 7, "markeredgewidth": 1.6}
    axes.plot(entry["mean"], place, "o", zorder=5, **style)


def _numbers(entry: Mapping[str, Any]) -> str:
    text = f"{entry['mean']:+z.1f}"
    if entry["ci95"]:
        text += " [{:+.1f}, {:+.1f}]".format(*entry["ci95"])  # -0.0: on which side of 0 it ends
    return (text + f"  {entry['positive']}/{entry['pairs']}").replace("-", "−")


def draw_trade_offs(rows: Rows, path: str | os.PathLike[str]) -> bool:
    """Draws the readout of each label against temperature, hardness and epsilon, with standard errors over seeds.

    As in figures 3 and 6 of Robinson et al. (2021): what improves one label at another's cost shows as lines that
    cross. Each line joins arms that differ in nothing else, see `find_series`. A panel has at most four of them, those
    with the most points; its legend counts the others.

    Args:
      rows: the runs of the study.
      path: path of the PNG file, which is replaced atomically.

    Returns:
      Whether there was something to draw.
    """
    found = find_series(rows)
    if not found:
        return False
    labels = _labels(rows)
    lines, columns = _lines_of_panels(found)
    settings = [line[0][0].setting for _, line in lines]
    varied = {name for name in _SETTING if len({setting[name] for setting in settings}) > 1}
    height = 1 + lines[-1][0]
    figure, canvas = _figure(1.4 + 4.3 * columns, 4.0 * height + 0.6)
    free = [list(axes_row) for axes_row in figure.subplots(height, columns, squeeze=False)]
    for number, line in lines:
        first = free[number][0]
        for panel in line:
            axes = free[number].pop(0)
            if axes is not first:
                axes.sharey(first)
            _draw_panel(axes, panel, labels, rows)
        title = ", ".join([line[0][0].source, *_setting_texts(line[0][0].setting, varied)])
        first.set_title(_wrapped(title, 42 * len(line)), loc="left", fontsize=12, color=INK)
        first.set_ylabel("held-out accuracy, %", color=INK)
    for axes in itertools.chain(*free):
        axes.set_axis_off()
    marks = [
        Line2D([], [], color=color, marker=marker, linewidth=2, label=label)
        for label, (color, marker) in labels.items()
    ]
    figure.legend(handles=marks, **_below(list(labels), figure))
    _save(canvas, path)
    return True


def _lines_of_panels(found: Sequence[Series]) -> tuple[list[tuple[int, list[list[Series]]]], int]:
    """Returns the panels of each setting, one for each axis, with the row they are in, and the number of columns.

    Settings with a single panel share rows, so that few of them leave no page of blanks.
    """
    settings: dict[tuple[Any, ...], dict[str, list[Series]]] = {}
    for series in found:
        settings.setdefault((series.source, *series.setting.values()), {}).setdefault(series.axis, []).append(series)
    panels = [[of[axis] for axis in AXES if axis in of] for of in settings.values()]
    columns = max(min(3, len(panels)), *map(len, panels))
    lines: list[tuple[int, list[list[Series]]]] = []
    row, used = 0, 0
    for line in panels:
        if used and used + len(line) > columns:
            row, used = row + 1, 0
        lines.append((row, line))
        used += len(line)
    return lines, columns


def _draw_panel(axes: Axes, panel: Sequence[Series], labels: Mapping[str, tuple[str, str]], rows: Rows) -> None:
    axis = panel[0].axis
    chosen = sorted(panel, key=_priority)[: len(_LINES)]
    varied = {name for name in (*AXES, "alpha") if len({row.get(name) for row in rows}) > 1}
    ticks = sorted({x for series in chosen for x in series.points})
    log = axis == "temperature"
    texts = []
    for series, line in zip(chosen, _LINES, strict=False):
        xs = list(series.points)
        for number, (label, (color, marker)) in enumerate(labels.items()):
            aside = 0.012 * (number - (len(labels) - 1) / 2)  # or error bars would lie on each other
            points = [
                [value for row in runs if (value := row["readout"].get(label)) is not None]
                for runs in series.points.values()
            ]
            known = [(x, *statistics.mean_and_stderr(values)) for x, values in zip(xs, points, strict=True) if values]
            if not known:
                continue
            axes.errorbar(
                [
                    x * (ticks[-1] / ticks[0]) ** aside if log else x + aside * (ticks[-1] - ticks[0])
                    for x, _, _ in known
                ],
                [mean for _, mean, _ in known],
                [math.nan if stderr is None else stderr for _, _, stderr in known],
                color=color,
                linestyle=line,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                elinewidth=1.2,
                capsize=2.5,
            )
        texts.append(Line2D([], [], color=INK, linestyle=line, linewidth=1.8, label=_series_text(series, varied)))
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(_X_LABELS[axis], color=INK)
    axes.margins(x=0.07, y=0.12)
    _plain(axes)
    axes.tick_params(labelleft=True)
    more = len(panel) - len(chosen)
    title = f"{more} more series in results.md" if more else None
    legend = axes.legend(
        handles=texts,
        title=title,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),  # below the axis, where no line is
        ncols=2 if max(len(str(text.get_label())) for text in texts) < 26 else 1,
        fontsize=8.5,
        frameon=False,
        handlelength=3.2,
    )
    legend.get_title().set_fontsize(8.5)


def _priority(series: Series) -> tuple[float, ...]:
    """Returns what decides which series are drawn: the longest, of the plainest loss, InfoNCE before IFM."""
    others = series.others
    return -len(series.points), others.get("beta", 0.0), others.get("temperature", 0.0), others.get("epsilon", 0.0)


def _series_text(series: Series, varied: set[str]) -> str:
    """Returns what the arms of a series share and those of other series may not."""
    name = _OBJECTIVES[series.objective]
    if series.objective != "infonce" and series.axis != "epsilon":
        name += f" {series.others['epsilon']:g}"
    if series.alpha is not None and "alpha" in varied:
        name += f", alpha {series.alpha:g}"
    for axis in ("temperature", "beta"):
        if axis in series.others and axis in varied:
            name += f", {axis} {series.others[axis]:g}"
    return name


def _setting_texts(setting: Mapping[str, Any], varied: set[str]) -> list[str]:
    return [
        _SETTING_TEXTS.get(name, "{}").format(f"{value:g}" if isinstance(value, float) else value)
        for name, value in setting.items()
        if name in varied and value is not None
    ]


def draw_loss_against_error(rows: Rows, path: str | os.PathLike[str]) -> bool:
    """Draws each run's error of the readout against its loss, in a panel for each label of each source.

    As in figure 2 of Robinson et al. (2021): a lower loss need not come with a lower error.

    Args:
      rows: the runs of the study, colored by arm; if there are more arms than colors and marks can tell apart, by
        objective and temperature.
      path: path of the PNG file, which is replaced atomically.

    Returns:
      Whether there was something to draw.
    """
    if not rows:
        return False
    sources = list(dict.fromkeys(row["source"] for row in rows))
    of_source = {source: list(_labels([row for row in rows if row["source"] == source])) for source in sources}
    names = [row["arm"] for row in rows]
    if len(set(names)) > _MOST_ARMS:
        names = [f"{_OBJECTIVES[row['objective']]}, temperature {row['temperature']:g}" for row in rows]
    arms = list(dict.fromkeys(names))
    columns = min(4, max(1, *(len(labels) for labels in of_source.values())))
    panels: list[tuple[str, str] | None] = []  # None: nothing, so that each source begins a line
    for source, labels in of_source.items():
        panels += [(source, label) for label in labels] + [None] * (-len(labels) % columns)
    lines = len(panels) // columns
    legend = -(-len(arms) // _legend_columns(arms, 1 + 3.2 * columns))
    figure, canvas = _figure(1 + 3.2 * columns, 3.1 * lines + 0.5 + 0.22 * legend)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=True):
        if panel is None:
            axes.set_axis_off()
            continue
        source, label = panel
        for number, arm in enumerate(arms):
            points = [
                (row["loss_clean"], 100 - row["readout"][label])
                for row, name in zip(rows, names, strict=True)
                if (row["source"], name) == (source, arm) and label in row["readout"]
            ]
            color, marker = _style(number)
            axes.plot(
                [loss for loss, _ in points],
                [error for _, error in points],
                marker,
                color=color,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                alpha=0.85,
            )
        axes.set_title(_wrapped(f"{source}: {label}", 34), loc="left", fontsize=11, color=INK)
        axes.set_xlabel("loss without IFM's shift", color=INK)
        axes.set_ylabel("readout error, %", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.08)
        _plain(axes)
    marks = [
        Line2D([], [], color=_style(number)[0], marker=_style(number)[1], linestyle="", label=_wrapped(arm, 70))
        for number, arm in enumerate(arms)
    ]
    figure.legend(handles=marks, **_below(arms, figure))
    _save(canvas, path)
    return True


def _labels(rows: Rows) -> dict[str, tuple[str, str]]:
    """Returns the labels in the order in which they are met, with their color and marker."""
    names = dict.fromkeys(label for row in rows for label in row["readout"])
    return {name: _style(number) for number, name in enumerate(names)}


def _style(number: int) -> tuple[str, str]:
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    """Returns a figure and its canvas, without touching any state of matplotlib."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    return figure, FigureCanvasAgg(figure)


def _save(canvas: FigureCanvasAgg, path: str | os.PathLike[str]) -> None:
    with files.replacing(path) as temporary:
        canvas.print_png(temporary)


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_PALE)


def _below(names: Sequence[str], figure: Figure) -> dict[str, Any]:
    """Returns the arguments of a legend below the panels."""
    columns = _legend_columns(names, figure.get_figwidth())
    style = {"frameon": False, "fontsize": 9.5, "labelcolor": INK}
    return {"loc": "outside lower center", "ncols": columns, **style}


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Returns how many names fit side by side in a figure of that many inches."""
    longest = min(70, max(map(len, names)))
    return max(1, min(len(names), math.floor(width / (0.55 + 0.085 * longest))))


def _wrapped(text: str, width: int) -> str:
    # A dollar sign would begin a formula.
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")
