"""What a run says about itself: `metrics.jsonl`, TensorBoard events, `curves.png` and the live progress line.

`metrics.jsonl` is the record of the run; the other three are views of it and may be lost without loss.
On several hosts only the first one writes: the others make no log and use `Silence` for `Progress`.

The libraries behind the views (rich, tensorboardX, matplotlib) are imported where they are used.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ifm_jax import files
from ifm_jax.errors import UsageError
from ifm_jax.process import Output

if TYPE_CHECKING:
    import rich.console
    import rich.table
    import rich.text

FIELDS = (
    *("step", "epoch", "loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm"),
    *("images_per_sec", "data_wait"),
)
"""The fields of a line of `metrics.jsonl`, in their order there; whatever else a record holds follows them."""


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


class MetricsLog:
    """`metrics.jsonl`, opened for a run that goes on after step `last_step`.

    What an earlier process wrote beyond that step, and the half line it may have died on, is cut off first, so that the
    steps written next are there once. The cut is atomic (a new file takes the old one's place), is only made where
    there is something to cut, and leaves every line that stays as it is, byte for byte.

    Args:
        path: the file; it is created where there is none, its folder must exist.
        last_step: the step of the checkpoint the run goes on from; 0 for a run from the start.

    Raises:
        UsageError: if a line in the middle of the file is not a record.
    """

    def __init__(self, path: str | os.PathLike, last_step: int = 0):
        self._path = pathlib.Path(path)
        kept = []
        if self._path.exists():
            kept = [(line, record) for line, record in _parse(self._path) if record["step"] <= last_step]
            content = b"".join(line for line, _ in kept)
            if content != self._path.read_bytes():
                with files.replacing(self._path) as temporary, temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        self._last_step = max((record["step"] for _, record in kept), default=0)
        self._file = self._path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record as one line and hands it to the operating system.

        Floats are written in full precision (the shortest text that reads back as the same float64). Scalars of numpy
        and JAX are taken as the Python number they hold.

        Args:
            record: at least `step`; the fields of `FIELDS` come first, in that order.

        Raises:
            ValueError: if a number is not finite (JSON has no such numbers), or the step is not beyond the last one.
        """
        names = [name for name in FIELDS if name in record] + [name for name in record if name not in FIELDS]
        plain = {name: record[name].item() if hasattr(record[name], "item") else record[name] for name in names}
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} at step {plain.get('step')}: {self._path} takes finite numbers only"
                )
        if not isinstance(plain.get("step"), int) or plain["step"] <= self._last_step:
            raise ValueError(
                f"step {plain.get('step')} cannot follow step {self._last_step} in {self._path}: "
                "each record needs an integer step beyond the one before it"
            )
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last_step = plain["step"]

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`: one dict a record, in the order of the file.

    The last line may be half-written (by a run that goes on, or that was killed); it is left out then.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        UsageError: if a line before the last is not a record.
    """
    return [record for _, record in _parse(pathlib.Path(path))]


def _parse(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns the lines of the file, each with its newline and the record it holds, but not a broken last one."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_constant=_refuse)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("no integer field 'step'")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UsageError(
                f"{path}, line {number}: expected a JSON object with an integer 'step', found {line[:40]!r} ({error}); "
                "remove that line"
            ) from None
        parsed.append((line + b"\n", record))
    return parsed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


class TensorBoardLog:
    """Scalars in TensorBoard event files, written without TensorFlow.

    A run that goes on after step `last_step` opens a file of its own, whose first event tells TensorBoard to forget
    what earlier files hold beyond that step: no step is shown twice.

    Events are written by the calling thread. tensorboardX's `SummaryWriter` hands them to a thread, and once that one
    has died of an error (a full disk), the run waits for it for ever; here the error is raised where it happens.

    Args:
        directory: where the event files go; created where missing.
        last_step: the step of the checkpoint the run goes on from; 0 for a run from the start.
        flush_every: seconds after which what was written is forced to disk with the next record.
    """

    def __init__(self, directory: str | os.PathLike, last_step: int = 0, flush_every: float = 10.0):
        with _without_torch():
            from tensorboardX import event_file_writer
            from tensorboardX.proto import event_pb2, summary_pb2
        self._event, self._summary, self._histogram = event_pb2.Event, summary_pb2.Summary, summary_pb2.HistogramProto
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Named by the second, and opened by overwriting: the number saves the file before from a restart that quick.
        number = len(list(directory.glob("events.out.tfevents.*")))
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), filename_suffix=f".{number}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=last_step + 1, session_log=start))
        self._writer.flush()
        self._flush_every, self._flushed, self._closed = flush_every, time.monotonic(), False

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds every number of a record except `step` and `epoch` as the scalar `train/<name>` of that step.

        A name that already has a group (`probe/acc`) keeps it.

        Args:
            step: the step they belong to.
            record: name -> number; other values are passed over.
        """
        values = []
        for name, value in record.items():
            value = value.item() if hasattr(value, "item") else value
            if name not in ("step", "epoch") and isinstance(value, int | float):
                tag = name if "/" in name else f"train/{name}"
                values.append(self._summary.Value(tag=tag, simple_value=value))
        self._write(step, values)

    def write_histograms(self, step: int, histograms: Mapping[str, tuple[Sequence[float], Sequence[int]]]) -> None:
        """Adds histograms of that step.

        Args:
            step: the step they belong to.
            histograms: name -> edges of the bins, `(bins + 1,)`, and their counts, `(bins,)`.
        """
        values = []
        for name, (edges, counts) in histograms.items():
            centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
            weighted = [count * centre for count, centre in zip(counts, centres, strict=True)]
            histo = self._histogram(
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(weighted),
                sum_squares=sum(each * centre for each, centre in zip(weighted, centres, strict=True)),
                bucket_limit=list(edges[1:]),
                bucket=list(counts),
            )
            values.append(self._summary.Value(tag=name, histo=histo))
        self._write(step, values)

    def _write(self, step: int, values: list) -> None:
        summary = self._summary(value=values)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed >= self._flush_every:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Forces everything to disk and closes the file; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch while tensorboardX is imported: it loads torch wherever it is installed, for seconds, for nothing."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


# ----------------------------------------------------------------------------------------------------------------------
# curves.png

_MAX_POINTS = 2000
BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"  # told apart by all eyes (Okabe and Ito)
INK, GREY = "#333333", "#8a8a8a"
# What a picture shows: for each panel its label and its curves, as field, text and colour.
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
    path: str | os.PathLike,
    panels: Panels = PRETRAINING,
    *,
    chance: float | None = None,
) -> None:
    """Draws `curves.png`: loss, accuracy and learning rate over the steps; the legends tell the latest values.

    A long run's noisy curves are drawn pale, their running mean (over a fiftieth of the run) on top. At most 2000
    points a curve are drawn. The picture takes the place of the old one at once; no state of matplotlib is touched.

    Args:
        records: as `read` returns them; fields that are missing are not drawn. Without records nothing is drawn.
        path: the PNG file, 1080 x 1080 px.
        panels: what it shows; a panel without any value is left out.
        chance: the loss by chance, InfoNCE's, drawn as a dashed line among the losses; None: no line.
    """
    if not records:
        return
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    probe = panels is PROBE
    figure = Figure(figsize=(9, 9), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    found = {name for record in records for name, value in record.items() if value is not None}
    panels = [panel for panel in panels if found & {name for name, _, _ in panel[1]}] or panels[:1]
    ratios = [1 if label == "learning rate" else 2 for label, _ in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.09, right=0.975, top=0.935, bottom=0.06, hspace=0.09)

    count = len(records)
    drawn = np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(int))
    steps = np.array([record["step"] for record in records], dtype=float)
    window = count // 50
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for name, text, color in curves:
            values = [record.get(name) for record in records]
            if all(value is None for value in values):
                continue
            values = np.array([math.nan if value is None else value for value in values], dtype=float)
            known = np.flatnonzero(np.isfinite(values))
            if len(known) < count:  # found now and then, as by an evaluation
                style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.8}
                axis.plot(steps[known], values[known], label=f"{text}  {_latest(name, values[known[-1]])}", **style)
                continue
            # Under MoCo total and InfoNCE are the same curve: the upper one dashed lets the lower one show.
            style = {"color": color, "linestyle": (0, (4, 2)) if name == "loss_clean" else "-"}
            text = f"{text}  {_latest(name, values[-1])}"
            if window >= 2 and name != "lr":
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
        if axis.lines:
            axis.legend(loc="best", fontsize=9.5, labelcolor=INK, framealpha=0.85, edgecolor="none")
        if label != "loss":
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


def _latest(name: str, value: float) -> str:
    if "acc" in name:
        return f"{value:.1f} %"
    return f"{value:.3g}" if name == "lr" else f"{value:.4f}"


def _running_mean(values, window: int):
    """Returns the mean of up to `window` values before and after each value, over fewer of them at the ends."""
    import numpy as np

    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    # Symmetric towards the ends, or a slope would be bent there; but not down to a single noisy value.
    reach = np.clip(np.minimum(centre, len(values) - 1 - centre), window // 4, window)
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), math.nan)


# ----------------------------------------------------------------------------------------------------------------------
# The live progress line

_REFRESH_PER_SECOND = 4
_SPEED_WINDOW = 60.0  # seconds: how far back the speed is measured from which the time left follows
_BAR_WIDTHS = (10, 40)  # columns: fields give way before the bar is shorter, and it grows no longer


class Progress:
    """How far a run is, live: a bar on a terminal, elsewhere a plain line for each logged record.

        with Progress(total_steps=256, epochs=8) as progress:
            progress.message("compiling the training step")
            for step in range(1, 257):
                ...
                progress.update(step, record if step % 10 == 0 else None)

    On a terminal: epoch, bar, step, loss, contrast accuracy, learning rate, images/s, time elapsed and time left, as
    many of them as the width allows. What is printed meanwhile appears above the bar. `update` only notes the numbers;
    a thread draws them, four times a second. The time left follows from the speed of the last minute, and the clock
    starts at the first update, so that compilation does not count.

    Args:
        total_steps: the step the run ends with.
        epochs: the epochs of the whole recipe.
        start_step: the step the run goes on from; 0 for a run from the start.
        steps_per_epoch: `total_steps / epochs` where not given; needed when the run ends before its recipe does.
        full_step: the step at which MoCo's queue is full of real keys; how full it is is shown until then.
        file: where to write; standard output where not given. A bar is drawn if it is a terminal.
        console: a rich console to write to instead of `file`.
        clock: what time it is, in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        epochs: float,
        start_step: int = 0,
        steps_per_epoch: float | None = None,
        full_step: int = 0,
        file: TextIO | None = None,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._epochs = total_steps, start_step, epochs
        self._full_step = full_step
        self._steps_per_epoch = steps_per_epoch or max(total_steps, 1) / epochs
        self._clock = clock
        self._file = Output(console.file if console is not None else (file if file is not None else sys.stdout))
        self._console = console
        self._record: Mapping[str, Any] = {}
        self._began = clock()
        self._samples: collections.deque[tuple[float, int]] = collections.deque()  # (time, step), about one a second
        self._ends: float | None = None  # by the clock
        self._live = None

    @property
    def closed(self) -> bool:
        """Whether the reader of what is written has closed it; the lines since then went nowhere."""
        return self._file.closed_by_reader

    def __enter__(self) -> Progress:
        if self._console is None and _is_terminal(self._file):
            import rich.console

            self._console = rich.console.Console(file=self._file)
        if self._console is not None and self._console.is_interactive:
            from rich.live import Live

            self._live = Live(console=self._console, get_renderable=self._line, refresh_per_second=_REFRESH_PER_SECOND)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Notes that a step is done. Costs microseconds on a terminal, and elsewhere without a record.

        Args:
            step: the step just done (1 for the first).
            record: what was logged at it, as in `metrics.jsonl`, or None if nothing was.
        """
        now = self._clock()
        self._step = step
        if not self._samples or now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, step))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _SPEED_WINDOW:
            self._samples.popleft()
        began, first = self._samples[0]
        # Steps are dispatched ahead of being computed: below a second the speed means nothing.
        if now - began >= 1.0 and step > first:
            self._ends = now + (self._total - step) * (now - began) / (step - first)
        if record is None:
            return
        self._record = dict(record)
        if self._live is None:
            fields = self._fields()
            names = ("step", "epoch", "loss", "acc1", "queue", "lr", "rate", "left")
            line = "  ".join(_labelled(*fields[name]) for name in names if name in fields)
            print(line, file=self._file, flush=True)

    def message(self, text: str) -> None:
        """Prints a line: above the bar on a terminal, elsewhere between the plain lines."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def _fields(self) -> dict[str, tuple[str, str]]:
        """Returns name -> (label, value), both as text, of everything known so far."""
        now, record = self._clock(), self._record
        fields = {"step": ("step", f"{self._step}/{self._total}")}
        epoch = record.get("epoch", self._step / self._steps_per_epoch)
        fields["epoch"] = ("epoch", f"{epoch:.2f}/{self._epochs:g}")
        formats = {
            "loss": lambda value: f"{value:.4f}",
            "acc1": lambda value: f"{value:.1f} %",
            "lr": lambda value: f"{value:.4f}" if value >= 0.001 else f"{value:.1e}",
        }
        for name, as_text in formats.items():
            if record.get(name) is not None:
                fields[name] = (name, as_text(record[name]))
        if self._step < self._full_step:
            fields["queue"] = ("queue", f"{100 * self._step // self._full_step} % real")
        rate = record.get("images_per_sec")
        if rate is not None:
            fields["rate"] = ("", f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2f} images/s")
        fields["elapsed"] = ("", _duration(now - self._began))
        if self._step >= self._total:
            fields["left"] = ("left", _duration(0))
        elif self._ends is not None:
            fields["left"] = ("left", _duration(self._ends - now))
        return fields

    def _line(self) -> rich.table.Table:
        """Returns the line with the bar, fitted to the terminal's present width."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        fields = self._fields()
        current = min(max(math.ceil(self._step / self._steps_per_epoch - 1e-9), 1), math.ceil(self._epochs))
        fields["epoch"] = ("epoch", f"{current:>{len(f'{self._epochs:g}')}}/{self._epochs:g}")
        fields["step"] = ("", f"{self._step:>{len(str(self._total))}}/{self._total}")
        if "acc1" in fields:
            fields["acc1"] = ("acc1", f"{fields['acc1'][1]:>6}")
        if self._step >= self._total:
            fields["left"] = ("done in", fields.pop("elapsed")[1])
        elif not self._samples:
            fields["left"] = ("", "first step to come")
        else:
            fields.setdefault("left", ("left", "-:--:--"))

        order = [name for name in ("step", "loss", "acc1", "queue", "lr", "rate", "elapsed", "left") if name in fields]
        available = self._console.width

        def width() -> int:
            """Returns the columns of all but the bar: the fields, two between them, one on each side of the bar."""
            return sum(len(_labelled(*fields[name])) + 2 for name in ("epoch", *order)) - 2

        for name in ("elapsed", "rate", "lr", "queue", "acc1", "loss", "left"):  # the last to go is the most telling
            wanted = 0 if name == "left" else _BAR_WIDTHS[0]  # rather no bar than no time
            if width() + wanted > available and name in order:
                order.remove(name)
        bar_width = min(available - width(), _BAR_WIDTHS[1])
        row: list[Any] = [Text.assemble(("epoch ", "dim"), (fields["epoch"][1], "bold"), " ")]
        if bar_width >= 4:
            row.append(ProgressBar(total=max(self._total, 1), completed=self._step, width=bar_width))
        parts = [" "]
        for name in order:
            label, value = fields[name]
            parts += [(f"{label} ", "dim") if label else "", (value, "bold" if name == "loss" else ""), "  "]
        row.append(Text.assemble(*parts[:-1]))
        line = Table.grid()
        for _ in row:
            line.add_column(no_wrap=True)
        line.add_row(*row)
        return line


class Silence:
    """Takes the place of `Progress` where nothing is to be shown: on request, and on all hosts but the first."""

    closed = False

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Does nothing."""

    def message(self, text: str) -> None:
        """Does nothing."""


def _is_terminal(file: TextIO) -> bool:
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _labelled(label: str, value: str) -> str:
    return f"{label} {value}" if label else value


def _duration(seconds: float) -> str:
    """Returns a time as h:mm:ss."""
    seconds = max(round(seconds), 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
