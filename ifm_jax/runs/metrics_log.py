"""`metrics.jsonl`: the record of a run, one JSON object per logged step.

TensorBoard events, curves and the progress line derive from it and can be lost without harm. Of several hosts only the
first one writes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ifm_jax import files
from ifm_jax.errors import UsageError

FIELDS = (
    *("step", "epoch", "loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm"),
    *("images_per_sec", "data_wait"),
)
"""The fields of a line of `metrics.jsonl`, in their order there; other fields of a record follow them."""

_GROUPS = ("train", "eval", "probe", "diagnostics")
# The groups of what an evaluation during pre-training adds to a line, also for single labels (`knn/shape`).
_GROUP_OF = {"knn": "eval", "linear": "eval", "gain": "eval", "knn_gain": "eval", "effective_rank": "diagnostics"}


class MetricsLog:
    """`metrics.jsonl`, opened for a run that continues after step `last_step`.

    Lines of an earlier process beyond that step, and a last line that it left incomplete, are cut off first, so that no
    step appears twice. The cut is atomic (a new file replaces the old one), happens only if there is something to cut,
    and leaves all other lines unchanged, byte for byte.

    Args:
      path: path of the file, which is created if it does not exist; its folder must exist. Also an attribute.
      last_step: step of the checkpoint from which the run continues; 0 for a new run.

    Raises:
      UsageError: if a line in the middle of the file is not a record.
    """

    def __init__(self, path: str | os.PathLike[str], last_step: int = 0):
        self.path = pathlib.Path(path)
        kept: list[tuple[bytes, dict[str, Any]]] = []
        if self.path.exists():
            kept = [(line, record) for line, record in _parse(self.path) if record["step"] <= last_step]
            content = b"".join(line for line, _ in kept)
            if content != self.path.read_bytes():
                with files.replacing(self.path) as temporary, temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        self._last_step = max((record["step"] for _, record in kept), default=0)
        self._file = self.path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record as one line and flushes it to the operating system.

        Floats are written in full precision (the shortest text that reads back as the same float64). NumPy and JAX
        scalars are written as Python numbers.

        Args:
          record: fields of the record, at least `step`; those in `FIELDS` come first, in that order.

        Raises:
          ValueError: if a number is not finite (JSON has no such numbers), or the step is not beyond the last one.
        """
        names = [name for name in FIELDS if name in record] + [name for name in record if name not in FIELDS]
        plain = {name: record[name].item() if hasattr(record[name], "item") else record[name] for name in names}
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} at step {plain.get('step')}: {self.path} accepts only finite numbers"
                )
        if not isinstance(plain.get("step"), int) or plain["step"] <= self._last_step:
            raise ValueError(
                f"step {plain.get('step')} cannot follow step {self._last_step} in {self.path}: "
                "each record needs an integer step larger than the previous one"
            )
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last_step = plain["step"]

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def grouped(record: Mapping[str, Any], group: str = "train") -> dict[str, float]:
    """Returns the numbers of a record under the names that TensorBoard and other views show.

    A name gets its group in front: `train/loss`, `eval/knn/shape`, `diagnostics/effective_rank`, `probe/val_acc1`. A
    name that begins with a group stays unchanged.

    Args:
      record: name -> value. `step`, `epoch` and values that are no numbers are left out.
      group: group of names that have none of their own. In "probe" all names are the probe's.
    """
    named: dict[str, float] = {}
    for name, value in record.items():
        value = value.item() if hasattr(value, "item") else value
        if name in ("step", "epoch") or not isinstance(value, int | float):
            continue
        first = name.partition("/")[0]
        if first in _GROUPS:
            named[name] = value
        else:
            named[f"{_GROUP_OF.get(first, group) if group == 'train' else group}/{name}"] = value
    return named


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`: one dict per record, in the order of the file.

    If the last line is incomplete (because the run is still writing or was killed), it is left out.

    Args:
      path: path of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      UsageError: if a line before the last is not a record.
    """
    return [record for _, record in _parse(pathlib.Path(path))]


def _parse(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns the lines of the file, each with its newline, and their records, without a broken last line."""
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
                "delete that line"
            ) from None
        parsed.append((line + b"\n", record))
    return parsed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
