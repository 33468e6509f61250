"""Several processes: a run on two of them is the run of one."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest

import ifm_jax.start
from ifm_jax import checkpoint, metrics, sharding, snapshot
from ifm_jax.errors import UsageError
from tests.test_command_line import ROOT, SMALL, environment

DOUBLE = "--config.model.compute_dtype=float64"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(workdir, *arguments, of_process_1=()) -> list[subprocess.Popen]:
    """Starts the two processes, each of two devices."""
    env = environment()
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    hosts = [f"--workdir={workdir}", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments, *of_its_own, *hosts, f"--process_id={i}"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, of_its_own in enumerate(((), of_process_1))
    ]


def finish(processes) -> tuple[list[int], list[str], list[str]]:
    """Returns exit statuses, stdout and stderr of both."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *map(list, zip(*outputs, strict=True))


def wait_for_lines(log, count, processes):
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def one_process(workdir, *arguments):
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"--workdir={workdir}"]
    one = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert one.returncode == 0, one.stderr


def assert_the_same_run(ours, theirs, steps):
    records = [metrics.read(workdir / "metrics.jsonl") for workdir in (ours, theirs)]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == list(range(1, steps + 1))
    for a, b in zip(*records, strict=True):
        for name in ("loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-10), (name, a["step"])


@pytest.mark.usefixtures("x64")
def test_two_processes_of_two_devices_are_one_process(tmp_path):
    statuses, outputs, errors = finish(start(tmp_path / "two", *SMALL, DOUBLE))
    assert statuses == [0, 0], errors
    assert "4 cpu devices" in outputs[0]
    assert "step" not in outputs[1]  # only the first process speaks
    one_process(tmp_path / "one", *SMALL, DOUBLE)
    assert_the_same_run(tmp_path / "two", tmp_path / "one", 8)

    # What two processes have saved together is what one has, and one process can read it.
    states = [snapshot.read(tmp_path / name).state for name in ("one", "two")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(a).max())


def test_stopped_then_killed_then_finished_it_is_the_run_of_one_process(tmp_path):
    """On a folder of images: a SIGTERM that one of them gets stops both; one killed, the other ends; and on it goes."""
    rng = np.random.default_rng(0)
    for number in range(64):
        image = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
    flags = [*SMALL, DOUBLE, f"--config.data.source=folder:{tmp_path / 'images'}", "--config.data.augmentation=moco_v2"]
    flags += ["--config.epochs=1000", "--config.checkpoint_every=2"]
    two = tmp_path / "two"
    log = two / "metrics.jsonl"

    processes = start(two, *flags)
    wait_for_lines(log, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, outputs, errors = finish(processes)
    assert statuses == [128 + signal.SIGTERM] * 2, errors
    stopped = len(metrics.read(log))
    assert all(f"Stopped by SIGTERM after step {stopped} of 4000" in output for output in outputs)
    assert checkpoint.steps(two / "checkpoints")[-1] == stopped

    # Process 0 holds what the processes meet in; its end is the harder one.
    processes = start(two, *flags)
    wait_for_lines(log, stopped + 2, processes)
    killed = time.monotonic()
    processes[0].kill()
    statuses, _, errors = finish(processes)
    assert time.monotonic() - killed < 60  # promised
    assert statuses == [-signal.SIGKILL, 1]
    assert "train.py: another process of the run has ended" in errors[1]

    # Nobody hangs where the two are not the same run.
    statuses, _, errors = finish(start(two, *flags, of_process_1=["--config.ifm.epsilon=0.3"]))
    assert statuses == [2, 2]
    for error in errors:
        assert error.startswith("train.py: the processes differ in ifm.epsilon: 0.1 on process 0, 0.3 on process 1: st")

    steps = len(metrics.read(log)) + 2
    statuses, outputs, errors = finish(start(two, *flags, f"--config.steps={steps}"))
    assert statuses == [0, 0], errors
    assert "Going on after step" in outputs[0]
    one_process(tmp_path / "one", *flags, f"--config.steps={steps}")
    assert_the_same_run(two, tmp_path / "one", steps)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"facts": {"seed": 0}}, {"facts": {"seed": 0}}], None),
        ([{"facts": {"seed": 0}}, {"facts": {"seed": 1}}], "differ in seed: 0 on process 0, 1 on process 1: start all"),
        ([{"facts": {"seed": 0}}, {"error": "no images"}], "process 1 cannot start: no images"),
    ],
)
def test_hosts_that_disagree_do_not_start(monkeypatch, answers, message):
    """The first is this one; what the second says is made up."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "gather_text", lambda text: said.append(text) or list(map(json.dumps, answers)))
    with contextlib.nullcontext() if message is None else pytest.raises(UsageError, match=message):
        assert ifm_jax.start.together(lambda: "opened", lambda _: {"seed": 0}) == "opened"
    assert said == [json.dumps(answers[0])]

    def fails():
        raise UsageError("a folder is missing")

    with pytest.raises(UsageError, match="a folder is missing"):  # and the others are told
        ifm_jax.start.together(fails)
    assert json.loads(said[1]) == {"error": "a folder is missing"}


def test_a_single_process_joins_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sharding.initialize()
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # inside an allocation, not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_launchers_are_recognised(monkeypatch, variables, expected):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: joined.append(a))
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "TPU_WORKER_HOSTNAMES",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sharding.initialize()
    assert joined == ([()] if expected else [])


def test_half_of_the_three_is_refused():
    with pytest.raises(ValueError, match="num_processes=2, process_id=None: give all three or none"):
        sharding.initialize("localhost:1", 2)


def test_a_batch_lies_split_over_the_devices():
    mesh = sharding.make_mesh(jax.devices()[:4])
    batch = sharding.put_batch(mesh, {"query": np.zeros((8, 2), np.uint8)})
    assert [shard.data.shape for shard in batch["query"].addressable_shards] == [(2, 2)] * 4
