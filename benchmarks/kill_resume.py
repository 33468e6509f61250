"""Kills a run repeatedly and compares its final state with that of an undisturbed run.

    python -m benchmarks.kill_resume [--kills=20] [--steps=300] [--json=FILE]

Kills `python train.py` on a small network, with a checkpoint every few steps, with SIGKILL at random moments: while it
starts, compiles, steps and saves. Each time the same command resumes the run; the last time it finishes. Then
metrics.jsonl (except the two fields that measure time) and every array of the last checkpoint must equal those of an
uninterrupted run, bit for bit. Takes about 15 s per kill on two processors. The exit status is 1 if they differ.
"""

import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax.errors import RunError
from ifm_jax.runs import checkpoint, metrics_log
from ifm_jax.runs.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLOCK = ("images_per_sec", "data_wait")
RUN = (
    *("--config.model.width=4", "--config.moco.queue_size=64", "--config.moco.dim=8"),
    *("--config.data.trifeature.train_size=64", "--config.data.trifeature.test_size=32", "--config.batch_size=16"),
    *("--config.log_every=1", "--config.checkpoint_every=5"),
)

_KILLS = flags.DEFINE_integer("kills", 20, "Number of times to kill the run.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments at which the run is killed.")
_JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")


def start(workdir: pathlib.Path, steps: int, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Returns the run as a process; what it says goes to train.log beside its workdir."""
    epochs = -(-steps // 4)  # of four steps
    arguments = [*RUN, f"--config.epochs={epochs}", f"--config.steps={steps}", f"--workdir={workdir}"]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments], stdout=log, stderr=log, env=environment
        )


def finish(workdir: pathlib.Path, steps: int, environment: dict[str, str] | None = None) -> float:
    """Runs to the end; returns the seconds it took.

    Raises:
      RunError: if it fails.
    """
    begun = time.monotonic()
    if status := start(workdir, steps, environment).wait():
        last = workdir.with_suffix(".log").read_text().strip().splitlines()[-1]
        raise RunError(f"the run ended with status {status}: {last}")
    return time.monotonic() - begun


def kill(
    workdir: pathlib.Path, steps: int, after: float, at_line: int = 0, environment: dict[str, str] | None = None
) -> dict:
    """Starts or goes on with the run and kills it `after` seconds, counted from its line `at_line` of metrics on.

    Returns:
      What it was doing then, and the steps it has gone on from and saved.

    Raises:
      RunError: if it failed before.
    """
    before = checkpoint.steps(workdir / "checkpoints")
    log, lines = workdir.with_suffix(".log"), workdir / "metrics.jsonl"
    offset = log.stat().st_size if log.exists() else 0
    began = time.monotonic()
    process = start(workdir, steps, environment)

    def words() -> str:
        return log.read_bytes()[offset:].decode(errors="replace")

    # Lines there may be of the kill before, until this process cuts them off.
    while at_line and process.poll() is None:
        if "\nstep " in words() and lines.read_bytes().count(b"\n") >= at_line:
            break
        time.sleep(0.005)
    try:
        status = process.wait(timeout=after)
        if status:
            raise RunError(f"the run ended with status {status}: see {log}")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        status = process.wait()
    seconds = time.monotonic() - began
    said = words()
    # Whether it is stepping its own words say; what lies half-written before that is from the kill before.
    saving = any((workdir / "checkpoints").glob("*tmp*")) if (workdir / "checkpoints").is_dir() else False
    stepping = "\nstep " in said
    doing = "save" if stepping and saving else "step" if stepping else "compile" if "Compiling" in said else "start"
    if status == 0:
        doing = "ended"
    after_steps = checkpoint.steps(workdir / "checkpoints")
    return {
        "seconds": seconds,
        "doing": doing,
        "resumed_from": before[-1] if before else 0,
        "checkpoint": after_steps[-1] if after_steps else 0,
    }


def compare(ours: pathlib.Path, theirs: pathlib.Path, steps: int) -> dict:
    """Returns how far two finished runs differ: lines of metrics, and arrays of the last checkpoint."""
    records = [
        [{name: value for name, value in record.items() if name not in CLOCK} for record in metrics_log.read(path)]
        for path in (ours / "metrics.jsonl", theirs / "metrics.jsonl")
    ]
    states = [jax.tree.leaves(checkpoint.read(path / "checkpoints" / str(steps)).state) for path in (ours, theirs)]
    return {
        "lines": len(records[0]),
        "lines_differ": abs(len(records[0]) - len(records[1])) + sum(a != b for a, b in zip(*records, strict=False)),
        "arrays": len(states[0]),
        "arrays_differ": sum(not np.array_equal(a, b) for a, b in zip(*states, strict=True)),
    }


def main(arguments: list[str]) -> int:
    """Kills, compares, reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    rows, random_ = [], random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "killed"
        finish(pathlib.Path(folder) / "first", 4)  # fills the compilation cache
        begun = time.monotonic()
        finish(pathlib.Path(folder) / "second", 4)
        start_up = time.monotonic() - begun
        finish(whole, _STEPS.value)
        for number in range(_KILLS.value):
            # A third of them while it starts and compiles; the others somewhere in its share of the steps, on the way
            # to them, in a step or a save.
            if number % 3 == 0:
                moment = {"after": random_.uniform(0.1, start_up)}
            else:
                line = round(_STEPS.value * (number + random_.random()) / (_KILLS.value + 1))
                moment = {"after": random_.uniform(0.0, 0.3), "at_line": max(line, 1)}
            rows.append({"kill": number + 1, **kill(killed, _STEPS.value, **moment)})
            print(rows[-1], flush=True)
        finish(killed, _STEPS.value)
        found = compare(killed, whole, _STEPS.value)
        damaged = Workdir(killed).damaged.exists()
    reporting.print_table(
        f"{_STEPS.value} steps, killed {_KILLS.value} times",
        rows,
        {"kill": "d", "seconds": ".1f", "doing": "", "resumed_from": "d", "checkpoint": "d"},
    )
    phases = {phase: sum(row["doing"] == phase for row in rows) for phase in ("start", "compile", "step", "save")}
    summary = {"kills": sum(phases.values()), "killed_while": phases, "steps": _STEPS.value, **found}
    summary["damaged_checkpoints"] = damaged
    same = not (found["lines_differ"] or found["arrays_differ"])
    print(f"{found['lines']} lines of metrics, {found['arrays']} arrays: {'the same' if same else 'they differ'}")
    reporting.write(reporting.report("kill_resume", rows, summary | {"same": same}), _JSON.value)
    return 0 if same else 1


if __name__ == "__main__":
    command.run(main)
