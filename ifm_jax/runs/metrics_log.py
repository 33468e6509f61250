"""`metrics.jsonl`: the record of a run, one JSON object a logged step.

TensorBoard events, curves and the progress line are views of it and may be lost without loss. On several hosts only the
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
"""The fields of a line of `metrics.jsonl`, in their order there; whatever else a record holds follows them."""


class MetricsLog:
    """`metrics.jsonl`, opened for a run that goes on after step `last_step`.

    What an earlier process wrote beyond that step, and the half line it may have died on, is cut off first, so that the
    steps written next are there once. The cut is atomic (a new file takes the old one's place), is only made where
    there is something to cut, and leaves every line that stays as it is, byte for byte.

    Args:
      path: the file; it is created where there is none, its folder must exist. Also an attribute.
      last_step: the step of the checkpoint the run goes on from; 0 for a run from the start.

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
                    f"{name} is {value} at step {plain.get('step')}: {self.path} takes finite numbers only"
                )
        if not isinstance(plain.get("step"), int) or plain["step"] <= self._last_step:
            raise ValueError(
                f"step {plain.get('step')} cannot follow step {self._last_step} in {self.path}: "
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


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
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
