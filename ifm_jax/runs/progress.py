"""The live progress of a run: a bar on a terminal, a line an epoch elsewhere. Imports rich only for a terminal."""

from __future__ import annotations

import collections
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from ifm_jax.process import Output

if TYPE_CHECKING:
    import rich.console
    import rich.live
    import rich.table
    import rich.text

_REFRESH_PER_SECOND = 4
_SPEED_WINDOW = 60.0  # seconds over which the speed for the time left is measured
_SILENCE = 600.0  # most seconds without a plain line, in long epochs
_BAR_WIDTHS = (10, 40)  # columns: fields are dropped before the bar gets shorter; it never gets longer
_FOUND = ("knn", "linear")  # held-out accuracy in percent, by evaluations during the run


class Progress:
    """Live progress of a run: a bar on a terminal, elsewhere plain lines.

        with Progress(total_steps=256, epochs=8) as progress:
            progress.message("compiling the training step")
            for step in range(1, 257):
                ...
                progress.update(step, record if step % 10 == 0 else None)

    On a terminal: epoch, bar, step, loss, contrast accuracy, gain, learning rate, images/s, time elapsed and time left,
    if the width allows. The gain is that of the last evaluation: for each label, or for more than three the mean and
    the least, the linear readout minus that before training, in points. Other output appears above the bar. `update`
    only stores the numbers; a thread draws them, four times a second. The time left follows from the speed of the last
    minute, and the clock starts at the first update, so compilation does not count.

    Elsewhere: a plain line for the first logged record, for the first in or after the end of each epoch, for the last,
    and at least one every ten minutes. What an evaluation found (`knn`, `linear`) is in the line of its record; the bar
    keeps showing it.

    Args:
      total_steps: last step of the run.
      epochs: number of epochs in the whole recipe.
      start_step: step from which the run continues; 0 for a new run.
      steps_per_epoch: default: `total_steps / epochs`; needed when the run ends before its recipe does.
      full_step: step at which MoCo's queue is full of real keys; until then, the filled share is shown.
      verbose: print a plain line for every logged record.
      file: stream to write to; default: standard output. A bar is drawn if it is a terminal.
      console: a rich console to write to instead of `file`.
      clock: returns the time in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        epochs: float,
        start_step: int = 0,
        steps_per_epoch: float | None = None,
        full_step: int = 0,
        verbose: bool = False,
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
        self._found: dict[str, float] = {}  # by the last evaluation
        self._gain = ""
        self._verbose = verbose
        self._printed: tuple[int, float] | None = None  # epoch and time of the last plain line
        self._began = clock()
        self._samples: collections.deque[tuple[float, int]] = collections.deque()  # (time, step), about one per second
        self._ends: float | None = None  # time on `clock`
        self._live: rich.live.Live | None = None

    @property
    def closed(self) -> bool:
        """Whether the reader of the output has closed it; later lines are lost."""
        return self._file.closed_by_reader

    def __enter__(self) -> Progress:
        if self._console is None and _is_terminal(self._file):
            import rich.console

            # Output has no base class, but all attributes of its stream.
            self._console = rich.console.Console(file=self._file)  # pyrefly: ignore[bad-argument-type]
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
        """Records that a step is done. This takes microseconds on a terminal, and elsewhere if there is no record.

        Args:
          step: the step just done (1 for the first).
          record: logged record of the step, as in `metrics.jsonl`; None: nothing was logged.
        """
        now = self._clock()
        self._step = step
        if not self._samples or now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, step))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _SPEED_WINDOW:
            self._samples.popleft()
        began, first = self._samples[0]
        # Steps are dispatched before they are computed: below a second the speed means nothing.
        if now - began >= 1.0 and step > first:
            self._ends = now + (self._total - step) * (now - began) / (step - first)
        if record is None:
            return
        self._record = dict(record)
        self._found |= {name: record[name] for name in _FOUND if record.get(name) is not None}
        self._gain = _gain(record) or self._gain
        if self._live is None and self._is_due(now):
            fields = self._fields()
            for name in (*_FOUND, "gain"):  # a line has what is new; a bar has what is known
                if name not in record:
                    fields.pop(name, None)
            names = ("step", "epoch", "loss", "acc1", *_FOUND, "gain", "queue", "lr", "rate", "left")
            line = "  ".join(_labeled(*fields[name]) for name in names if name in fields)
            print(line, file=self._file, flush=True)

    def _is_due(self, now: float) -> bool:
        """Whether the present record gets a plain line; if so, it is counted as printed."""
        epoch = math.floor(self._step / self._steps_per_epoch + 1e-9)
        due = (
            self._verbose
            or self._printed is None
            or epoch > self._printed[0]
            or self._step >= self._total
            or any(name in self._record for name in _FOUND)
            or now - self._printed[1] >= _SILENCE
        )
        if due:
            self._printed = epoch, now
        return due

    def message(self, text: str) -> None:
        """Prints a line: above the bar on a terminal, elsewhere between the plain lines."""
        if self._live is not None and self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def _fields(self) -> dict[str, tuple[str, str]]:
        """Returns name -> (label, value), both as text, for everything known so far."""
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
        fields |= {name: (name, f"{value:.1f} %") for name, value in self._found.items()}
        if self._gain:
            fields["gain"] = ("gain", self._gain)
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

        names = ("step", "loss", "acc1", *_FOUND, "gain", "queue", "lr", "rate", "elapsed", "left")
        order = [name for name in names if name in fields]
        assert self._console is not None  # only a console draws the line
        available = self._console.width

        def width() -> int:
            """Returns the columns of all but the bar: the fields, two between them, one on each side of the bar."""
            return sum(len(_labeled(*fields[name])) + 2 for name in ("epoch", *order)) - 2

        least_first = ("elapsed", "rate", "lr", "queue", *_FOUND, "gain", "acc1", "loss", "left")
        for name in least_first:
            wanted = 0 if name == "left" else _BAR_WIDTHS[0]  # the time left matters more than the bar
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
    """Replaces `Progress` where nothing is shown: on request, and on all hosts but the first."""

    closed = False

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Does nothing."""

    def message(self, text: str) -> None:
        """Does nothing."""


def _is_terminal(file: Output) -> bool:
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _gain(record: Mapping[str, Any]) -> str:
    """Returns what an evaluation found to have been gained since the start; empty if there was no evaluation."""
    if record.get("gain") is None:
        return ""
    gains = {name.partition("/")[2]: value for name, value in record.items() if name.startswith("gain/")}
    if len(gains) > 3:
        least = min(gains, key=lambda label: gains[label])
        return f"{record['gain']:+.1f}, least {least} {gains[least]:+.1f}"
    return ", ".join(f"{label} {value:+.1f}" for label, value in gains.items()) or f"{record['gain']:+.1f}"


def _labeled(label: str, value: str) -> str:
    return f"{label} {value}" if label else value


def _duration(seconds: float) -> str:
    """Returns a time as h:mm:ss."""
    seconds = max(round(seconds), 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
