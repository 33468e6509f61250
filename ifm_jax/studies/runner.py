"""Runs a study: one process for each run, several at a time, each on its own processor."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.errors import RunError, UsageError
from ifm_jax.process import has_accelerator
from ifm_jax.studies import statistics, worker
from ifm_jax.studies.study import Run, Study, number_of

RESULTS = "results.json"
_COMMAND = (sys.executable, "-m", worker.__name__)
_LOG = "log.txt"  # in a run's directory: what its process printed
_LAST_WORDS = 300  # most characters of a failed run's last line
_MEMORY = 0.9  # share of an accelerator's memory for all its runs together


class Stopped(Exception):  # noqa: N818 (no error: the study is resumed later)
    """A signal stopped the study; the runs under way have saved.

    Attributes:
      signal: the signal.
      done: finished runs.
      total: all runs.
    """

    def __init__(self, number: signal.Signals, done: int, total: int):
        super().__init__(f"stopped by {number.name}: {done} of {total} runs done")
        self.signal, self.done, self.total = number, done, total


def run(
    study: Study, name: str, directory: str | os.PathLike[str], *, jobs: int = 0, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Does every run of a study that is not done yet, and writes `results.json`.

    A run that was stopped goes on from its last checkpoint. Every run has one processor, whatever the number of jobs,
    so that its results do not depend on it; on an accelerator the runs under way share the devices and their memory.

    Args:
      study: the study.
      name: its name in the results.
      directory: directory of the study; created if it does not exist.
      jobs: runs at a time; 0: as many as there are processors, or 4 on an accelerator.
      say: prints a line of progress.

    Returns:
      The results.

    Raises:
      UsageError: if the directory holds rows of runs with another config.
      RunError: if runs have failed; all others are done, and in the results.
      Stopped: if a signal stopped the study.
    """
    directory = pathlib.Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--workdir={directory} is not writable ({error.strerror}): pass a writable one") from None
    runs = study.runs()
    rows = {run: row for run in runs if (row := read_row(directory, run)) is not None}
    pending = [run for run in runs if run not in rows]
    jobs = min(jobs or _default_jobs(), max(len(pending), 1))
    sizes = {"source": study.sources, "arm": study.arms, "seed": study.seeds}
    product = " x ".join(number_of(len(each), what) for what, each in sizes.items())
    said = f"{number_of(len(runs), 'run')}: {product}"
    say(f"{said}; {len(rows)} done before, {jobs} at a time.")
    failed: list[str] = []
    if pending:
        with _Pool(directory, jobs) as pool:
            progress = _Progress(pending, len(runs))
            for ended, status, last in pool.run(pending):
                row = read_row(directory, ended) if status == 0 else None
                if row is None:
                    failed.append(f"{ended.directory}: {last or f'status {status}'}")
                    say(f"FAILED {failed[-1]}")
                    continue
                rows[ended] = row
                say(progress.line(ended, row, len(rows), pool.under_way))
            if pool.stopped_by is not None:
                write_results(study, name, directory, [rows[run] for run in runs if run in rows])
                raise Stopped(pool.stopped_by, len(rows), len(runs))
    results = write_results(study, name, directory, [rows[run] for run in runs if run in rows])
    if failed:
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed, the others are done; the first: {failed[0]} (all of it in "
            f"{directory / failed[0].partition(':')[0] / _LOG}); the same command tries them again"
        )
    return results


def read_row(directory: pathlib.Path, run: Run) -> dict[str, Any] | None:
    """Returns the row of a finished run, or None if it is not finished.

    Args:
      directory: directory of the study.
      run: the run. Its row is in its own directory; where that is gone, in the study's results.json.

    Raises:
      UsageError: if the row is of another config.
    """
    path = directory / run.directory / worker.ROW
    row = files.read_json(path, "delete it to do the run again")
    if row is None:
        path, key = directory / RESULTS, (run.source, run.arm, run.seed)
        found = files.read_json(path, "delete it, and keep the directories of the runs") or {}
        row = next((row for row in found.get("rows", ()) if (row["source"], row["arm"], row["seed"]) == key), None)
    if row is not None and row.get("config_sha256") != run.config_sha256:
        raise UsageError(
            f"{path} has the row of {run.directory} with another config: expected that of this study; pass another "
            f"--workdir, or delete {path} to do the run again"
        )
    return row


def write_results(study: Study, name: str, directory: pathlib.Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes `results.json` and returns its contents.

    Args:
      study: the study.
      name: its name.
      directory: directory of the study.
      rows: rows of the finished runs.
    """
    results = {
        "study": name,
        "question": study.question,
        "date": datetime.date.today().isoformat(),
        "device": ", ".join(sorted({row["device"] for row in rows})),
        "versions": rows[-1]["versions"] if rows else None,
        "commit": ", ".join(sorted({str(row["commit"]) for row in rows})),
        "runs": len(study.runs()),
        "rows": list(rows),
        "comparisons": statistics.compare(rows, study.comparisons),
    }
    files.write_json(directory / RESULTS, results)
    return results


def read_results(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of a study's `results.json`.

    Raises:
      UsageError: if there is none.
    """
    path = pathlib.Path(directory) / RESULTS
    results = files.read_json(path, "run the study again, which does not repeat finished runs")
    if results is None or "rows" not in results:
        raise UsageError(f"{path} does not exist: expected the results of a study; run it without --report first")
    return results


def _default_jobs() -> int:
    if has_accelerator():
        return 4
    return len(_processors()) or os.cpu_count() or 1


def _processors() -> list[int]:
    """The processors that this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@dataclasses.dataclass
class _Process:
    """A run under way: its process, and the pipe that tells it to stop by closing."""

    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]


class _Pool:
    """Processes that each do one run.

    Args:
      directory: directory of the study.
      jobs: processes at a time.

    Attributes:
      stopped_by: the signal that stopped the pool; None: none has.
    """

    def __init__(self, directory: pathlib.Path, jobs: int):
        self.stopped_by: signal.Signals | None = None
        self._directory, self._jobs = directory, jobs
        self._under_way: dict[int, _Process] = {}
        self._ended: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not the main thread: its owner decides
                    self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_):
        for each in self._under_way.values():
            each.stdin.close()
        for each in self._under_way.values():
            each.process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: types.FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number)
        self._ended.put(None)  # reentrant, as SimpleQueue documents

    @property
    def under_way(self) -> list[Run]:
        """The runs that are being done."""
        return [each.run for each in self._under_way.values()]

    def run(self, runs: Sequence[Run]) -> Iterator[tuple[Run, int, str]]:
        """Does runs; yields each with its exit status and its last line, as it ends; stops early after a signal."""
        pending, free = list(runs), list(range(self._jobs))
        while (pending or self._under_way) and self.stopped_by is None:
            while pending and free:
                self._start(pending.pop(0), free.pop(0))
            ended = self._ended.get()
            if ended is None:
                break
            slot, status = ended
            done = self._under_way.pop(slot)
            done.stdin.close()
            free.append(slot)
            yield done.run, status, _last_line(self._directory / done.run.directory / _LOG)

    def _start(self, run: Run, slot: int) -> None:
        """Starts a run in a process of its own session, which a terminal's Ctrl-C does not reach."""
        processors = _processors()
        mine = () if has_accelerator() or not processors else (processors[slot % len(processors)],)
        order = worker.Order(run.source, run.arm, configs.to_dict(run.config), str(self._directory), mine, slot)
        log = self._directory / run.directory / _LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / self._jobs:.3f}"} if self._jobs > 1 else {}
        with log.open("ab") as output:
            process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                env=share | dict(os.environ),
            )
        assert process.stdin is not None  # a pipe, as requested
        with contextlib.suppress(BrokenPipeError):  # it has ended at once: its exit status tells
            process.stdin.write(json.dumps(dataclasses.asdict(order)).encode() + b"\n")
        self._under_way[slot] = _Process(run, slot, process, process.stdin)
        threading.Thread(target=lambda: self._ended.put((slot, process.wait())), daemon=True).start()


def _last_line(path: pathlib.Path) -> str:
    """Returns the last line of a log, shortened."""
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:_LAST_WORDS] if lines else ""


class _Progress:
    """Lines of progress, with the time that is left: estimated from the time of a step so far.

    Args:
      pending: runs to do.
      total: runs of the study.
    """

    def __init__(self, pending: Sequence[Run], total: int):
        self._total = total
        self._left = {run: _images(run) for run in pending}
        self._all = sum(self._left.values())
        self._begun = time.monotonic()

    def line(self, ended: Run, row: dict[str, Any], done: int, under_way: Sequence[Run]) -> str:
        """Returns the line of a finished run."""
        self._left.pop(ended, None)
        # How far the runs under way are is not known: they count as half done.
        left = sum(self._left.values()) - sum(self._left[run] for run in under_way) / 2
        seconds = (time.monotonic() - self._begun) * left / max(self._all - left, 1)
        readout = "  ".join(f"{label} {value:.1f}" for label, value in row["readout"].items())
        width = len(str(self._total))
        remaining = f"left {datetime.timedelta(seconds=round(seconds))}" if left else "all done"
        return f"[{done:{width}}/{self._total}] {ended.source}  {ended.arm}  seed {ended.seed}:  {readout}  {remaining}"


def _images(run: Run) -> float:
    """Returns a run's length in images, for the time left."""
    config = run.config
    return config.batch_size * float(config.steps or config.epochs)
