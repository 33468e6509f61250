"""TensorBoard event files, derived from `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

_Numbers: TypeAlias = "Sequence[float] | np.ndarray"


class TensorBoardLog:
    """Scalars in TensorBoard event files, written without TensorFlow.

    A run that continues after step `last_step` opens its own file, whose first event tells TensorBoard to drop all
    later steps of earlier files, so that no step is shown twice.

    Events are written by the calling thread. tensorboardX's `SummaryWriter` hands them to a thread; once an error (such
    as a full disk) has ended that thread, the run waits for it forever. Here the caller gets the error.

    Args:
      directory: directory of the event files; created if it does not exist.
      last_step: step of the checkpoint from which the run continues; 0 for a new run.
      flush_every: seconds after which the next record forces all data to disk.
    """

    def __init__(self, directory: str | os.PathLike[str], last_step: int = 0, flush_every: float = 10.0):
        with _without_torch():
            # An undocumented interface (tests/test_private_apis.py): the classes that its own writer uses.
            from tensorboardX import event_file_writer
            from tensorboardX.proto import event_pb2, summary_pb2
        events: Any = event_pb2  # protobuf creates their classes during import
        summaries: Any = summary_pb2
        self._event, self._summary, self._histogram = events.Event, summaries.Summary, summaries.HistogramProto
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The name has the time in seconds, and opening overwrites: the number protects the old file from a quick
        # restart.
        number = len(list(directory.glob("events.out.tfevents.*")))
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), filename_suffix=f".{number}")
        start = events.SessionLog(status=events.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=last_step + 1, session_log=start))
        self._writer.flush()
        self._flush_every, self._flushed, self._closed = flush_every, time.monotonic(), False

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds every number of a record except `step` and `epoch` as the scalar `train/<name>` of that step.

        A name that already has a group (`probe/acc`) stays unchanged.

        Args:
          step: step of the data.
          record: name -> number; other values are skipped.
        """
        values = []
        for name, value in record.items():
            value = value.item() if hasattr(value, "item") else value
            if name not in ("step", "epoch") and isinstance(value, int | float):
                tag = name if "/" in name else f"train/{name}"
                values.append(self._summary.Value(tag=tag, simple_value=value))
        self._write(step, values)

    def write_histograms(self, step: int, histograms: Mapping[str, tuple[_Numbers, _Numbers]]) -> None:
        """Adds histograms of that step.

        Args:
          step: step of the data.
          histograms: name -> edges of the bins, `(bins + 1,)`, and their counts, `(bins,)`.
        """
        values = []
        for name, (edges, counts) in histograms.items():
            centers = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
            weighted = [count * center for count, center in zip(counts, centers, strict=True)]
            histo = self._histogram(
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(weighted),
                sum_squares=sum(each * center for each, center in zip(weighted, centers, strict=True)),
                bucket_limit=list(edges[1:]),
                bucket=list(counts),
            )
            values.append(self._summary.Value(tag=name, histo=histo))
        self._write(step, values)

    def _write(self, step: int, values: list[Any]) -> None:
        summary = self._summary(value=values)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed >= self._flush_every:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Forces everything to disk and closes the file; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch while tensorboardX is imported, which would load it for seconds without using it."""
    hidden = "torch" not in sys.modules
    if hidden:
        # None marks a module as missing for Python; the dict's type does not allow it.
        sys.modules["torch"] = None  # pyrefly: ignore[unsupported-operation]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
