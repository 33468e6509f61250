"""TensorBoard event files: a view of `metrics.jsonl`, with the config and the pictures of the run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ifm_jax import config as configs
from ifm_jax.runs import metrics_log

if TYPE_CHECKING:
    import numpy as np

    from ifm_jax.config import Config

_Numbers: TypeAlias = "Sequence[float] | np.ndarray"


class TensorBoardLog:
    """Scalars, histograms, pictures and the config in TensorBoard event files, written without TensorFlow.

    A run that continues after step `last_step` opens its own file, whose first event tells TensorBoard to drop all
    later steps of earlier files, so that no step is shown twice.

    Events are written by the calling thread. tensorboardX's `SummaryWriter` hands them to a thread; once an error (such
    as a full disk) has ended that thread, the run waits for it forever. Here the caller gets the error.

    Args:
      directory: directory of the event files; created if it does not exist.
      last_step: step of the checkpoint from which the run continues; 0 for a new run; None: add to the run's events
        without dropping any, as an evaluation does.
      flush_every: seconds after which the next record forces all data to disk.
    """

    def __init__(self, directory: str | os.PathLike[str], last_step: int | None = 0, flush_every: float = 10.0):
        with _without_torch():
            # An undocumented interface (tests/test_private_apis.py): the classes that its own writer uses.
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2, summary_pb2
        events: Any = event_pb2  # protobuf creates their classes during import
        summaries: Any = summary_pb2
        self._make: Any = summary
        self._event, self._summary, self._histogram = events.Event, summaries.Summary, summaries.HistogramProto
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The name has the time in seconds, and opening overwrites: the number protects the old file from a quick
        # restart.
        number = len(list(directory.glob("events.out.tfevents.*")))
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), filename_suffix=f".{number}")
        if last_step is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=last_step + 1, session_log=start))
        self._writer.flush()
        self._flush_every, self._flushed, self._closed = flush_every, time.monotonic(), False

    def write(self, step: int, record: Mapping[str, Any], group: str = "train") -> None:
        """Adds every number of a record except `step` and `epoch` as a scalar of that step.

        Args:
          step: step of the data.
          record: name -> number; other values are skipped.
          group: group of names without one; see `metrics_log.grouped`.
        """
        named = metrics_log.grouped(record, group)
        self._write(step, [self._summary.Value(tag=name, simple_value=value) for name, value in named.items()])

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

    def write_config(self, step: int, config: Config, metrics: Sequence[str] = ("train/loss", "eval/linear")) -> None:
        """Adds the config as a text (JSON) and as hyperparameters.

        Args:
          step: step after which this config holds.
          config: resolved config.
          metrics: names of the scalars that stand beside the hyperparameters.
        """
        values = configs.to_dict(config)
        text = f"```json\n{json.dumps(values, indent=2)}\n```"
        self._write(step, list(self._make.text("config", text).value))
        flat = {name: _number_or_text(value) for name, value in configs.flatten(values).items()}
        for summary in self._make.hparams(flat, dict.fromkeys(metrics)):
            self._write(step, list(summary.value))

    def write_picture(self, step: int, name: str, path: str | os.PathLike[str]) -> None:
        """Adds a PNG file as the image of that name and step; its bytes are copied as they are.

        Args:
          step: step of the data.
          name: name of the image, with its group.
          path: path of the PNG file.
        """
        content = pathlib.Path(path).read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # in the first chunk of a PNG
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._write(step, [self._summary.Value(tag=name, image=image)])

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


def _number_or_text(value: Any) -> Any:
    """Returns a config's value as TensorBoard's hyperparameters take it; None, which has no type there, as "none"."""
    return value if isinstance(value, bool | int | float | str) else "none" if value is None else json.dumps(value)


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
