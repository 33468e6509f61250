"""Several processes: a run on two of them is the run of one."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ifm_jax import metrics, sharding
from ifm_jax.evaluation import suppression
from tests.test_command_line import ROOT, SMALL, environment

DOUBLE = "--config.model.compute_dtype=float64"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.usefixtures("x64")
def test_two_processes_of_two_devices_are_one_process(tmp_path):
    env = environment()
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    coordinator = f"--coordinator=localhost:{free_port()}"
    processes = []
    for i in range(2):
        arguments = [
            *SMALL,
            DOUBLE,
            f"--workdir={tmp_path / 'two'}",
            coordinator,
            "--num_processes=2",
            f"--process_id={i}",
        ]
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "4 cpu devices" in outputs[0]
    assert "step" not in outputs[1]  # only the first process speaks

    one = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, DOUBLE, f"--workdir={tmp_path / 'one'}"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr
    theirs, ours = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-10), (name, a["step"])

    # What two processes have saved together is what one has, and one process can read it.
    states = [suppression.restore(tmp_path / name)[1] for name in ("one", "two")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(a).max())


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
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: joined.append(a))
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
