"""The same training with 1, 2 and 4 processes of 1, 2 and 4 devices each: checks that the results are the same.

    python -m benchmarks.topologies [--json=FILE] [--only=PROCESSESxDEVICES]

Real processes connect like the hosts of a pod (jax.distributed, here on the loopback interface; collectives by Gloo),
each with several simulated CPU devices. Every topology takes three steps with 16 images on a small network, in float64,
once on Trifeature and once on a folder of JPEGs; the smallest and the largest also in float32. Their metrics.jsonl are
compared with those of one process with one device. In float64 a figure may differ by a relative 1e-10. In float32,
where the order of a sum matters and the steps amplify it, it may differ by 1e-5 in the first step. The exit status is 1
if one differs by more. Takes 17 minutes on one processor.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError
from ifm_jax.runs import metrics_log, training

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOPOLOGIES = [(processes, devices) for processes in (1, 2, 4) for devices in (1, 2, 4)]
FIELDS = ("loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm")
STEPS = 3
RTOL = {"float64": 1e-10, "float32": 1e-5}


def start(
    program: Sequence[str],
    processes: int,
    devices: int,
    environment: Mapping[str, str],
    own: Mapping[int, Sequence[str]] | None = None,
) -> list[subprocess.Popen]:
    """Starts the processes of one run.

    Args:
      program: Python's arguments, the same for all.
      processes: how many; one does not look for others.
      devices: simulated ones, of each process.
      environment: of each process.
      own: further arguments of some of them, by number.
    """
    count = f" --xla_force_host_platform_device_count={devices}"
    environment = {**environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": environment.get("XLA_FLAGS", "") + count}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    started = []
    for number in range(processes):
        arguments = [*program, *(own or {}).get(number, ())]
        if processes > 1:
            arguments += [f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={number}"]
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(processes: Sequence[subprocess.Popen], seconds: float = 600.0) -> tuple[list[int], list[str], list[str]]:
    """Returns exit statuses, stdout and stderr of processes, which are killed if they take longer than that."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *map(list, zip(*outputs, strict=True))


def difference(ours: pathlib.Path, theirs: pathlib.Path, steps: int | None = None) -> dict[str, float]:
    """Returns the largest relative difference of each field of two runs' metrics.jsonl.

    Args:
      ours: a workdir.
      theirs: another.
      steps: how many of the first to look at; None: all.

    Raises:
      RunError: if they are not of the same steps.
    """
    records = [metrics_log.read(workdir / "metrics.jsonl")[:steps] for workdir in (ours, theirs)]
    numbers = [[record["step"] for record in lines] for lines in records]
    if numbers[0] != numbers[1] or not numbers[0]:
        raise RunError(f"{ours} and {theirs} do not have the same steps: {numbers[0]} and {numbers[1]}")
    a, b = (np.array([[record[name] for name in FIELDS] for record in lines]) for lines in records)
    largest = np.maximum(np.abs(a), np.abs(b))
    relative = np.abs(a - b) / np.where(largest == 0, 1.0, largest)
    return dict(zip(FIELDS, relative.max(axis=0).tolist(), strict=True))


def make_images(folder: pathlib.Path, count: int) -> None:
    """Writes random JPEGs of 40 px, of two classes, as an image folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        path = folder / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), image):
            raise RunError(f"{path} cannot be written")


def config(source: str, dtype: str, images: pathlib.Path) -> Config:
    """Returns the config of a run: three steps of 16 images on `trifeature` or on the `folder` of images."""
    made = Config()
    made.model.arch, made.model.stem, made.model.width = "resnet8", "small_stride2", 4
    made.model.bn_groups, made.model.compute_dtype = 2, dtype
    made.moco.queue_size, made.moco.dim, made.moco.momentum = 64, 8, 0.9
    made.moco.queue_beyond_images = True
    made.data.image_size = 32
    if source == "folder":
        made.data.source, made.data.augmentation = f"folder:{images}", "moco_v2"
    else:
        made.data.augmentation = "trifeature"
        made.data.trifeature.train_size, made.data.trifeature.test_size = 48, 32
    made.batch_size, made.epochs, made.steps, made.log_every = 16, 1, STEPS, 1
    return made


def train(folder: pathlib.Path, runs: Sequence[str]) -> None:
    """Is one of the processes of a topology: trains each of the runs `SOURCE-DTYPE`, with the others."""
    _JOIN_HOSTS()
    for run in runs:
        training.train(config(*run.split("-"), folder.parent / "images"), folder / run, quiet=True)


def follow(folder: pathlib.Path, processes: int, devices: int, runs: Sequence[str]) -> None:
    """Trains on a topology, each run in a workdir of its name below `folder`.

    Raises:
      RunError: if a process fails.
    """
    program = ["-m", "benchmarks.topologies", f"--folder={folder}", f"--runs={','.join(runs)}"]
    # A program that takes three steps is not worth optimizing.
    flags_ = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    statuses, _, errors = finish(start(program, processes, devices, os.environ | {"XLA_FLAGS": flags_}))
    for number, (status, error) in enumerate(zip(statuses, errors, strict=True)):
        if status:
            said = (error.strip().splitlines() or ["nothing"])[-1]
            raise RunError(f"process {number} of {processes}, of {devices} devices, ended with status {status}: {said}")


def compare(folder: pathlib.Path, reference: pathlib.Path, run: str) -> dict:
    """Returns the fields of a row: how far a run is from the reference's, and whether that is near enough."""
    source, dtype = run.split("-")
    found = difference(folder / run, reference / run, None if dtype == "float64" else 1)
    field = max(found, key=found.get)
    row = {"source": source, "dtype": dtype, "largest_difference": found[field], "of": field}
    return row | {"fields": found, "same": found[field] <= RTOL[dtype]}


def chosen() -> list[tuple[int, int]]:
    """Returns the topologies to compare with one process of one device.

    Raises:
      UsageError: for one that the batch cannot be split over, or that is none.
    """
    if _ONLY.value is None:
        return TOPOLOGIES[1:]
    known = {f"{processes}x{devices}": (processes, devices) for processes, devices in TOPOLOGIES[1:]}
    if _ONLY.value not in known:
        raise UsageError(f"--only={_ONLY.value}: expected one of {', '.join(known)}")
    return [known[_ONLY.value]]


def main(arguments: list[str]) -> int:
    """Trains on all topologies, compares, reports; returns the exit status."""
    command.refuse_arguments(arguments)
    if _RUNS.value:
        train(pathlib.Path(_FOLDER.value), _RUNS.value)
        return 0
    reporting.check_path(_JSON.value)
    double, single = (["trifeature-" + dtype, "folder-" + dtype] for dtype in ("float64", "float32"))
    both = [*single, *double]  # float64 comes last: it stays on in its process
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        make_images(pathlib.Path(parent) / "images", 48)
        reference = pathlib.Path(parent) / "1x1"
        follow(reference, 1, 1, both)
        for processes, devices in chosen():
            folder = pathlib.Path(parent) / f"{processes}x{devices}"
            runs = both if (processes, devices) == TOPOLOGIES[-1] else double
            follow(folder, processes, devices, runs)
            for run in runs:
                rows.append({"processes": processes, "devices": devices, **compare(folder, reference, run)})
                print(json.dumps({name: value for name, value in rows[-1].items() if name != "fields"}), flush=True)
    reporting.print_table(
        f"{STEPS} steps; against one process of one device",
        rows,
        {
            "processes": "d",
            "devices": "d",
            "source": "",
            "dtype": "",
            "largest_difference": ".1e",
            "of": "",
            "same": "",
        },
    )
    worst = {
        dtype: max((row["largest_difference"] for row in rows if row["dtype"] == dtype), default=None) for dtype in RTOL
    }
    same = all(row["same"] for row in rows)
    reporting.write(reporting.report("topologies", rows, {"worst": worst, "same": same}), _JSON.value)
    return 0 if same else 1


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
    _ONLY = flags.DEFINE_string(
        "only", None, "Run only this topology besides 1x1, for example 4x2: processes x devices of each."
    )
    _RUNS = flags.DEFINE_list("runs", None, "Internal, for a started process: the SOURCE-DTYPE runs to train.")
    _FOLDER = flags.DEFINE_string("folder", None, "Internal, for a started process: folder of the images and workdirs.")
    _JOIN_HOSTS = command.define_hosts()
    command.run(main)
