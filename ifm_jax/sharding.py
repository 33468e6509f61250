"""Devices and hosts: the mesh, the two placements, multi-host start-up.

One global program: the step is written for the global batch on one device, `jax.jit` places it. Images are split along
the one mesh axis, `data`; parameters, queue and optimizer state are on every device.
"""

import errno
import ipaddress
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordinator's client, which nothing public gives (tests/test_private_apis.py)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # of JAX, which goes by it

# Seconds without a sign of life after which a process is taken for dead, and the others end.
_HEARTBEAT_TIMEOUT = 30
# Seconds within which the processes must have found each other: started by hand, and by a launcher, whose nodes may be
# ready one after another.
_BY_HAND_WITHIN, _LAUNCHED_WITHIN = 80.0, 280.0
# What the runtime and the libraries that carry collectives say of a peer; not, for one, that memory is exhausted.
_OF_A_PEER = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Cc]oordination service|[Hh]eartbeat|another task died"
    "|Connection (closed|reset|refused)|Socket closed"
)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a multi-host run; does nothing on a single host.

    To be called before the first JAX computation. Without arguments a cluster is recognized by what its launcher sets
    (Cloud TPU pod, SLURM, Open MPI, JAX_COORDINATOR_ADDRESS), and JAX finds the rest itself.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many processes take part.
      process_id: which one this is, 0 ... num_processes - 1.

    Raises:
      ValueError: if only some of the three are given, or one that cannot be, or others to other processes.
      TimeoutError: if the processes do not find each other; this one can only be ended then.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: "
            "give all three or none of them"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check(coordinator, num_processes, process_id)
        listen = _bind_address(coordinator) if process_id == 0 and _BIND not in os.environ else None
        _join(
            _BY_HAND_WITHIN,
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            coordinator_bind_address=listen,
        )
    elif _in_cluster():
        _join(_LAUNCHED_WITHIN)
    else:
        return
    # JAX notes a SIGTERM for whoever asks it, which before the loop nobody does; the loop has a way of its own.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if num_processes is not None:
        _compare_num_processes(num_processes)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    """Raises a `ValueError` for a place to meet that is none, or a number that no process has."""
    host, _, port = coordinator.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator={coordinator}: expected HOST:PORT of process 0, a port of 1 to 65535, an IPv6 address in []"
        )
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: expected at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id}: expected 0 to {num_processes - 1}, num_processes={num_processes}")


def _join(seconds: float, **options: Any) -> None:
    """Joins the other processes, or raises a `TimeoutError`.

    JAX's own time limit is longer: it does not raise at its end but aborts, and while it waits for the others it hears
    no signal. So it waits in a thread.
    """
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **options,
                initialization_timeout=int(seconds) + 60,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        given = "".join(f", {name}={options[name]}" for name in ("num_processes", "process_id") if name in options)
        raise TimeoutError(
            f"the processes of the run did not find each other within {seconds:g} s{given}: expected all of them to be "
            "started by then, with the same coordinator and num_processes, each with a process_id of its own, and the "
            "coordinator's port open to all their hosts"
        )
    if failures:
        raise failures[0]


def _bind_address(coordinator: str) -> str | None:
    """Returns where process 0 is to listen: nowhere but at the address that the others were given.

    None, which is everywhere, where that address is not known to be this host's own: behind NAT, in a container, or
    where the host's name is one of the loopback interface for itself alone, as Debian has it.

    Raises:
      ValueError: if its port cannot be listened at.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, _, _, _, address in found:
        if not loopback and ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            continue
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    reason = f"process 0 cannot listen there ({error.strerror}): give another port"
                    raise ValueError(f"coordinator={coordinator}: {reason}") from None
                continue
        return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
    return None


def _compare_num_processes(num_processes: int) -> None:
    """Raises a `ValueError`, on all processes, where they were given different numbers; process 0's have come."""
    client, folder = distributed.global_state.client, "ifm_jax/num_processes/"
    assert client is not None  # the processes have joined
    client.key_value_set(f"{folder}{process_index()}", str(num_processes))
    client.wait_at_barrier("ifm_jax/num_processes", 60_000)
    given = {int(key.rpartition("/")[2]): int(value) for key, value in client.key_value_dir_get(folder)}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{value} to process {number}" for number, value in sorted(given.items())[:8])
        raise ValueError(f"different num_processes were given: {said}; give all of them the same")


def process_index() -> int:
    """Returns which process this is; unlike JAX's own it starts no devices, which is a matter of all processes."""
    return distributed.global_state.process_id


def is_of_a_peer(error: Exception) -> bool:
    """Returns whether this is what JAX raises when another process of the run has ended, or cannot be reached."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return bool(_OF_A_PEER.search(str(error)))
    return isinstance(error, ValueError) and "Gloo" in str(error)  # as JAX translates the UNKNOWN of a computation


def _in_cluster() -> bool:
    """Whether a launcher of several processes has started this one."""
    env = os.environ
    return (
        "JAX_COORDINATOR_ADDRESS" in env
        or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or (int(env.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in env)
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1
    )


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the one-dimensional mesh `("data",)` over `devices` (all of them, on all hosts, if None)."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: the compiler propagates placements; with Explicit ones every array would have to carry its own.
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement "the whole array on every device"."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the placement "the leading axis split over the devices"."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Has the compiler split an array's leading axis over the devices; inside a compiled program.

    Args:
      x: array of any rank above 0.
      mesh: the devices; None: `x` stays as it is.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, split(mesh))


def on_every_device(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Has the compiler put a whole array on every device; arguments as for `split_rows`."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, replicated(mesh))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays, split over the devices, of each process's own part of a batch.

    Args:
      mesh: from `make_mesh`.
      batch: arrays `(N / processes, ...)`; process p holds rows p N / processes and on.

    Returns:
      Arrays `(N, ...)`.
    """
    placement = split(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, placement)
    return {name: jax.make_array_from_process_local_data(placement, value) for name, value in batch.items()}


def gather_text(text: str) -> list[str]:
    """Returns the texts that all processes call this with, by process; a collective."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([mine.size], np.int32)).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def wait_for_all(what: str) -> None:
    """Returns once every process has called it; to be called before a computation that not all may reach soon.

    The processes compile by themselves, and only process 0 finds its program in the cache; Gloo, which connects CPUs,
    gives up after 30 s of waiting in the first collective. This waits through the coordinator instead, a day if need
    be; a process that ends meanwhile ends the others as ever.

    Args:
      what: the same on all processes; a name for it.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # a step alone does without Orbax

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=24 * 3600 * 1000)


def maximum_over_hosts(mesh: Mesh) -> Callable[[np.ndarray], jax.Array] | None:
    """Returns the function that gives the elementwise maximum of what each process calls it with; None on one.

    A collective as small as there is; it returns at once, as all computations do.
    """
    if jax.process_count() == 1:
        return None
    placement, own = split(mesh), mesh.local_mesh.size
    maximum = jax.jit(lambda rows: rows.max(axis=0), out_shardings=replicated(mesh))

    def vote(values: np.ndarray) -> jax.Array:
        return maximum(jax.make_array_from_process_local_data(placement, np.tile(values, (own, 1))))

    return vote


def place(tree: Any, placement: NamedSharding) -> Any:
    """Returns host arrays, the same on every process, as global arrays of that placement; not a collective."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placement, lambda index, x=x: x[index]), tree)


def place_key(mesh: Mesh, rng: jax.Array) -> jax.Array:
    """Returns a random key, the same on every process, as one that is on every device."""
    return jax.random.wrap_key_data(place_everywhere(mesh, np.asarray(jax.random.key_data(rng))))


def place_everywhere(mesh: Mesh, tree: Any) -> Any:
    """Returns host arrays, the same on every process, as global arrays that are whole on every device."""
    placement = replicated(mesh)
    return jax.device_put(tree, placement) if jax.process_count() == 1 else place(tree, placement)
