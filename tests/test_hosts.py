"""Several processes: a run on two of them is the run of one."""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifm_jax.runs.hosts
from benchmarks import topologies
from benchmarks.topologies import finish
from ifm_jax import sharding
from ifm_jax.errors import UsageError
from ifm_jax.runs import checkpoint, loading, loop, metrics_log, training
from ifm_jax.runs.progress import Silence
from ifm_jax.runs.workdir import Workdir
from tests.test_command_line import ROOT, SMALL, environment

DOUBLE = "--config.model.compute_dtype=float64"


def start(workdir, *arguments, of_process_1=()):
    """Starts the two processes, each of two devices."""
    program = [str(ROOT / "train.py"), *arguments, f"--workdir={workdir}"]
    return topologies.start(program, 2, 2, environment(), own={1: of_process_1})


def wait_for_lines(log, count, processes):
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_the_same_as_on_one_device(two, one, steps):
    """Trains with the config of a finished run on one device of this process, and compares."""
    config = Workdir(two).read_config()
    config.steps = steps
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction is decay ** count
        training.train(config, one, devices=jax.devices()[:1], quiet=True)
    assert [record["step"] for record in metrics_log.read(two / "metrics.jsonl")] == list(range(1, steps + 1))
    found = topologies.difference(two, one)
    assert max(found.values()) <= 1e-10, found


def assert_saved_alike(two, one):
    """What two processes have saved together is what one has, and one process can read it."""
    states = [loading.read(path).state for path in (one, two)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(a).max())


@pytest.mark.hosts
@pytest.mark.usefixtures("x64")
def test_two_processes_of_two_devices_are_one_process(tmp_path):
    """SimCLR, evaluated while it trains; MoCo in the next test, and the long form in benchmarks/topologies.py."""
    flags = ("--config.method=simclr", "--config.simclr.dim=8", "--config.steps=4", "--config.eval.every=1")
    statuses, outputs, errors = finish(start(tmp_path / "two", *SMALL, DOUBLE, *flags))
    assert statuses == [0, 0], errors
    assert "4 cpu devices" in outputs[0]
    assert "step" not in outputs[1]  # only the first process speaks
    assert_the_same_as_on_one_device(tmp_path / "two", tmp_path / "one", 4)
    assert_saved_alike(tmp_path / "two", tmp_path / "one")
    readouts = [
        {name: value for name, value in metrics_log.read(tmp_path / run / "metrics.jsonl")[-1].items() if "/" in name}
        for run in ("two", "one")
    ]
    assert readouts[0].keys() >= {"knn/shape", "linear/texture", "gain/color"}
    assert readouts[0] == readouts[1]


@pytest.mark.hosts
@pytest.mark.usefixtures("x64")
def test_stopped_then_killed_then_finished_it_is_the_run_of_one_process(tmp_path):
    """On a folder of images: a SIGTERM to one stops both; one killed or failed, the other ends; and on it goes."""
    topologies.make_images(tmp_path / "images", 64)
    shutil.copytree(tmp_path / "images", tmp_path / "images_1")  # of process 1, which has a disk of its own
    flags = [
        *SMALL,
        DOUBLE,
        f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.augmentation=moco_v2",
    ]
    flags += ["--config.epochs=1000", "--config.checkpoint_every=2"]
    two = tmp_path / "two"
    log = two / "metrics.jsonl"

    processes = start(two, *flags)
    wait_for_lines(log, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, outputs, errors = finish(processes)
    assert statuses == [128 + signal.SIGTERM] * 2, errors
    stopped = len(metrics_log.read(log))
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

    # Only process 1 meets too many images that it cannot read.
    saved = checkpoint.steps(two / "checkpoints")[-1]
    processes = start(two, *flags, of_process_1=[f"--config.data.source=folder:{tmp_path / 'images_1'}"])
    wait_for_lines(log, saved + 2, processes)
    failed = time.monotonic()
    for path in (tmp_path / "images_1").rglob("*.jpg"):
        path.write_bytes(b"")
    statuses, _, errors = finish(processes)
    assert time.monotonic() - failed < 60  # promised
    assert statuses == [1, 1]
    assert "train.py: another process of the run has ended" in errors[0]
    assert errors[1].startswith("train.py: ")
    assert "cannot be read" in errors[1]
    assert len(errors[1].strip().splitlines()) == 1
    last = checkpoint.steps(two / "checkpoints")[-1]
    assert last > saved

    # Nobody hangs where the two are not the same run.
    statuses, _, errors = finish(start(two, *flags, of_process_1=["--config.ifm.epsilon=0.3"]))
    assert statuses == [2, 2]
    for error in errors:
        assert error.startswith("train.py: the processes differ in ifm.epsilon: 0.1 on process 0, 0.3 on process 1: st")

    steps = len(metrics_log.read(log)) + 2
    statuses, outputs, errors = finish(start(two, *flags, f"--config.steps={steps}"))
    assert statuses == [0, 0], errors
    assert f"Resuming after step {last}" in outputs[0]
    assert "4 cpu devices" in outputs[0]
    assert_the_same_as_on_one_device(two, tmp_path / "one", steps)
    assert_saved_alike(two, tmp_path / "one")


class Votes:
    """What `sharding.maximum_over_hosts` is to loops in threads of one process."""

    def __init__(self, hosts):
        self.cast = [[] for _ in range(hosts)]
        self.condition = threading.Condition()

    def of(self, host):
        def vote(values):
            with self.condition:
                self.cast[host].append(values)
                self.condition.notify_all()
                return Outcome(self, len(self.cast[host]) - 1)

        return vote


class Outcome:
    """Known once every host has voted, as the result of a collective."""

    def __init__(self, votes, number):
        self.votes, self.number = votes, number

    def __array__(self, dtype=None, copy=None):
        with self.votes.condition:
            assert self.votes.condition.wait_for(lambda: min(map(len, self.votes.cast)) > self.number, timeout=60)
            return np.max([cast[self.number] for cast in self.votes.cast], axis=0)


def test_hosts_whose_clocks_differ_save_the_same_steps(monkeypatch):
    clock, one = threading.local(), jnp.ones(())
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    )
    votes = Votes(2)
    saved = collections.defaultdict(list)

    def host(number):
        clock.now = 0.0

        def step(state, batch):
            clock.now += (1.0, 1.5)[number]
            return state + 1, {"loss": one}

        loop.run(
            step,
            0,
            itertools.repeat(loop.Call(None)),
            first=0,
            last_step=30,
            recorder=loop.Recorder(None, None, Silence(), 1, 1, 100, pathlib.Path("curves.png")),
            stop=loop.StopSignals(Silence()),
            save=saved[number].append,
            checkpoint_every=1000,
            checkpoint_seconds=7.0,
            vote=votes.of(number),
        )

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(host, range(2)))
    # Seven seconds are five steps of the faster clock; all know of it two steps later.
    assert saved == {0: [7, 14, 21, 28, 30], 1: [7, 14, 21, 28, 30]}


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
        assert ifm_jax.runs.hosts.together(lambda: "opened", lambda _: {"seed": 0}) == "opened"
    assert said == [json.dumps(answers[0])]

    def fails():
        raise UsageError("a folder is missing")

    with pytest.raises(UsageError, match="a folder is missing"):  # and the others are told
        ifm_jax.runs.hosts.together(fails)
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
def test_launchers_are_recognized(monkeypatch, variables, expected):
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost", 2, 0), "coordinator=localhost: expected HOST:PORT of process 0, with a port from 1 to 65535"),
        (("localhost:", 2, 0), "coordinator=localhost:: expected HOST:PORT"),
        ((":1234", 2, 0), "coordinator=:1234: expected HOST:PORT"),
        (("localhost:port", 2, 0), "coordinator=localhost:port: expected HOST:PORT"),
        (("localhost:0", 2, 0), "coordinator=localhost:0: expected HOST:PORT"),
        (("localhost:99999", 2, 0), "coordinator=localhost:99999: expected HOST:PORT"),
        (("::1:1234", 2, 0), "an IPv6 address in "),
        (("localhost:1234", 0, 0), "num_processes=0: expected at least 1"),
        (("localhost:1234", 2, 2), "process_id=2: expected 0 to 1, for num_processes=2"),
        (("localhost:1234", 2, -1), "process_id=-1: expected 0 to 1, for num_processes=2"),
    ],
)
def test_a_place_to_meet_that_is_none_is_refused(monkeypatch, given, message):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    with pytest.raises(ValueError, match=message):
        sharding.initialize(*given)


def test_process_0_listens_nowhere_but_where_it_is_told(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(
            ValueError, match=r"process 0 cannot listen there \(Address already in use\): choose another"
        ):
            sharding._bind_address(f"127.0.0.1:{port}")
    assert sharding._bind_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    assert sharding._bind_address(f"localhost:{port}") in (f"127.0.0.1:{port}", f"[::1]:{port}")
    # An address of another machine, in front of NAT; a name that nobody knows; one that is this host's on itself alone.
    assert sharding._bind_address(f"192.0.2.1:{port}") is None
    assert sharding._bind_address(f"name.invalid:{port}") is None
    loopback = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: loopback)
    assert sharding._bind_address(f"node0:{port}") is None


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: never.wait())
    monkeypatch.setattr(sharding, "_BY_HAND_WITHIN", 0.1)
    with pytest.raises(TimeoutError, match=r"each other within 0.1 s, num_processes=2, process_id=1: start all"):
        sharding.initialize("localhost:1234", 2, 1)
    never.set()


@pytest.mark.hosts
def test_processes_that_were_told_different_numbers_all_refuse():
    """And process 0 has listened at its address alone."""
    code = """
import re, sys
from ifm_jax import sharding
port, own, number = map(int, sys.argv[1:])
try:
    sharding.initialize(f"127.0.0.1:{port}", own, number)
except ValueError as error:
    print(error)
if number == 0:
    lines = open("/proc/net/tcp").readlines() + open("/proc/net/tcp6").readlines()
    print([line.split()[1] for line in lines if re.search(rf":{port:04X} \\S+ 0A ", line)], flush=True)
sys.stdout.flush()
import os, time
time.sleep(1.0 if number == 0 else 0.0)
os._exit(0)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(own), str(number)],
            cwd=ROOT,
            env=environment() | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, own in enumerate((2, 3))
    ]
    statuses, outputs, errors = finish(started, 120.0)
    assert statuses == [0, 0], errors
    expected = (
        "the processes were given different num_processes: 2 to process 0, 3 to process 1; pass the same to all of them"
    )
    first, listens = outputs[0].strip().splitlines()
    assert first == outputs[1].strip() == expected
    assert re.fullmatch(rf"\['(0{{16}}FFFF0000)?0100007F:{port:04X}'\]", listens)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the following tasks are unhealthy"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
        (ValueError("a barrier"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_only_what_is_of_a_peer_is_said_to_be(error, expected):
    assert sharding.is_of_a_peer(error) == expected


def test_a_batch_lies_split_over_the_devices():
    mesh = sharding.make_mesh(jax.devices()[:4])
    batch = sharding.put_batch(mesh, {"views": np.zeros((8, 2), np.uint8)})
    assert [shard.data.shape for shard in batch["views"].addressable_shards] == [(2, 2)] * 4
