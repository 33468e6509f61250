"""Does one run of a study in a process of its own: `python -m ifm_jax.studies.worker`.

The order, one JSON object in a line, comes on standard input, which stays open: when it closes, the study has ended or
has been killed, and the run stops and saves.
"""

if __name__ == "__main__":  # before JAX is imported, which counts the processors
    import json
    import os
    import sys

    _given = json.loads(sys.stdin.readline())
    if _given["processors"]:
        os.sched_setaffinity(0, _given["processors"])

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import filelock
import jax
import numpy as np

from ifm_jax import assembly, files, process
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError
from ifm_jax.evaluation import comparison
from ifm_jax.runs import metrics_log, training
from ifm_jax.runs.workdir import Workdir
from ifm_jax.studies.study import Run, config_sha256

ROW = "row.json"  # in a run's directory, once it is finished
_PACKAGES = ("ifm_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
# A killed study's worker saves before it ends and holds its workdir so long.
_WAIT_FOR_THE_LAST = 120.0  # seconds
# Fields that decide neither the first weights nor the images that are read out.
_AFTER_THE_START = (
    *("ifm", "hard", "optim", "eval", "linear", "batch_size", "epochs", "steps", "moco.temperature"),
    *("moco.queue_size", "moco.momentum", "moco.shuffle_bn", "simclr.temperature", "data.augment", "model.bn_groups"),
)


@dataclasses.dataclass(frozen=True)
class Order:
    """What a worker is told to do.

    Attributes:
      source: name of the run's source.
      arm: name of its arm.
      config: its config, by `config.to_dict`.
      study: directory of the study.
      processors: numbers of the processors to run on; empty: any.
      device: number of the accelerator, modulo how many there are.
    """

    source: str
    arm: str
    config: dict[str, Any]
    study: str
    processors: tuple[int, ...] = ()
    device: int = 0


def work(order: Order) -> int:
    """Trains the run, or what is left of it, reads it out and writes its row; returns the exit status.

    The status is 0 if the row is written, and 128 + the signal's number if the run was stopped and saved.
    """
    run = Run(order.source, order.arm, configs.from_dict(order.config))
    directory = pathlib.Path(order.study) / run.directory
    config = assembly.resolve(run.config)
    assembly.configure_jax(config.model.compute_dtype)
    local = jax.local_devices()
    devices = [local[order.device % len(local)]]
    _wait_for(directory)
    outcome = training.train(run.config, directory, devices=devices)
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    readout = comparison.read_out_workdir(directory, devices=devices).accuracy
    untrained = _untrained(config, pathlib.Path(order.study), devices)
    records = metrics_log.read(Workdir(directory).metrics)
    row = describe(run) | summarize(records, config.batch_size)
    row |= {"readout": readout, "untrained": untrained} | environment(devices[0])
    files.write_json(directory / ROW, row)
    return 0


def describe(run: Run) -> dict[str, Any]:
    """Returns the fields of a row that its config decides."""
    config, moco = run.config, run.config.method == "moco"
    return {
        "source": run.source,
        "arm": run.arm,
        "method": config.method,
        "objective": config.ifm.objective,
        "epsilon": config.ifm.epsilon if config.ifm.objective != "infonce" else 0.0,
        "alpha": config.ifm.alpha,
        "temperature": configs.temperature(config),
        "beta": config.hard.beta,
        "seed": config.seed,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "queue_size": config.moco.queue_size if moco else None,
        "optimizer": config.optim.name,
        "lr": config.optim.lr,
        "config_sha256": run.config_sha256,
    }


def summarize(records: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Returns what a run's metrics come to.

    Args:
      records: the run's metrics, one mapping for each logged step.
      batch_size: images in a step.

    Returns:
      `steps`; the means of `loss_clean` and `acc1` over the last tenth of the steps, as one batch's are noisy; the mean
      of `grad_norm` over the run; `seconds`, the time of all steps.
    """
    steps = records[-1]["step"]
    last = [record for record in records if record["step"] > 0.9 * steps]

    def mean(name: str, over: Sequence[Mapping[str, Any]]) -> float:
        return float(np.mean([record[name] for record in over]))

    return {
        "steps": steps,
        "loss_clean": mean("loss_clean", last),
        "acc1": mean("acc1", last),
        "grad_norm": mean("grad_norm", records),
        "seconds": steps * batch_size / mean("images_per_sec", records),
    }


def environment(device: jax.Device | None = None) -> dict[str, Any]:
    """Returns the code and the machine that made a row: `commit`, `device`, `versions`, `date`."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    kind = platform.machine() if device is None or device.platform == "cpu" else device.device_kind
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "device": kind, "versions": versions, "date": date}


def commit() -> str | None:
    """Returns the commit of the package's checkout, with `+` if the package has changed since; None without one."""
    package = pathlib.Path(__file__).resolve().parents[1]
    try:

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()

        if pathlib.Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None  # the repository around the environment that it is installed in
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _untrained(config: Config, study: pathlib.Path, devices: list[jax.Device]) -> dict[str, float]:
    """Returns the readouts of the network that a run starts from; runs that start alike share them."""
    start, plain = configs.from_dict(configs.to_dict(config)), Config()
    for name in _AFTER_THE_START:
        configs.set_field(start, name, configs.get_field(plain, name))
    path = study / "untrained" / f"{config_sha256(start)[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        found = files.read_json(path, "delete it")
        if found is None:
            found = {"readout": comparison.read_out_untrained(config, devices).accuracy}
            files.write_json(path, found)
    return found["readout"]


def _wait_for(directory: pathlib.Path) -> None:
    """Waits until the worker of a study that was killed has left the workdir."""
    until = time.monotonic() + _WAIT_FOR_THE_LAST
    while directory.is_dir():
        try:
            with Workdir(directory).locked():
                return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _end_with_the_study() -> None:
    """Stops this process, as SIGTERM does, when standard input closes."""

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _main(order: Order) -> int:
    """Does the run; a failure is the last line on standard error, which is the run's log."""
    _end_with_the_study()
    process.keep_memory()
    try:
        return work(order)
    except (UsageError, RunError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(_main(Order(**_given)))  # pyrefly: ignore[unbound-name] (the same condition as above)
