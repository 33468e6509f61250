"""Devices and hosts: the mesh, the two placements, multi-host start-up.

There is one global program: the step is written for the global batch on one device, and `jax.jit` places it. Images are
split along the only mesh axis, `data`; parameters, queue and optimizer state are on every device.
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
from jax._src import distributed  # no public API gives the coordinator's client (tests/test_private_apis.py)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # read by JAX

# Seconds without a heartbeat after which a process counts as dead and the others end.
_HEARTBEAT_TIMEOUT = 30
# Seconds within which the processes must connect: when started by hand, and by a launcher, whose nodes may become ready
# one after another.
_BY_HAND_WITHIN, _LAUNCHED_WITHIN = 80.0, 280.0
# Messages of the runtime and of collective libraries about a peer, but not, for example, about exhausted memory.
_OF_A_PEER = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Cc]oordination service|[Hh]eartbeat|another task died"
    "|Connection (closed|reset|refused)|Socket closed"
)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a multi-host run; does nothing on a single host.

    Call this before the first JAX computation. Without arguments a cluster is detected from its launcher's environment
    (Cloud TPU pod, SLURM, Open MPI, JAX_COORDINATOR_ADDRESS), and JAX detects the rest itself.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, 0 ... num_processes - 1.

    Raises:
      ValueError: if only some of the three are given, if one is impossible, or if processes were given different
        numbers.
      TimeoutError: if the processes do not connect; the only option then is to end this one.
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
    # JAX catches SIGTERM for later queries, which nobody makes before the loop; the loop has its own handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if num_processes is not None:
        _compare_num_processes(num_processes)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    """Raises a `ValueError` for an invalid coordinator address or an impossible process number."""
    host, _, port = coordinator.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator={coordinator}: expected HOST:PORT of process 0, with a port from 1 to 65535 and an IPv6 "
            "address in []"
        )
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: expected at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id}: expected 0 to {num_processes - 1}, for num_processes={num_processes}"
        )


def _join(seconds: float, **options: Any) -> None:
    """Joins the other processes, or raises a `TimeoutError`.

    At its own time limit JAX aborts instead of raising, and while it waits it handles no signals. So it gets a longer
    limit and waits in a thread.
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
            f"the processes of the run did not find each other within {seconds:g} s{given}: start all of them by then, "
            "with the same coordinator and num_processes and different process_ids, and open the coordinator's port to "
            "all their hosts"
        )
    if failures:
        raise failures[0]


def _bind_address(coordinator: str) -> str | None:
    """Returns the address at which process 0 listens: only the one that the others were given.

    Returns None, which means all addresses, if that address is not known to be this host's own: behind NAT, in a
    container, or where the host's own name resolves to the loopback interface, as on Debian.

    Raises:
      ValueError: if process 0 cannot listen at its port.
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
                    reason = f"process 0 cannot listen there ({error.strerror}): choose another port"
                    raise ValueError(f"coordinator={coordinator}: {reason}") from None
                continue
        return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
    return None


def _compare_num_processes(num_processes: int) -> None:
    """Raises a `ValueError` on all processes if they were given different numbers. Process 0's have all joined."""
    client, folder = distributed.global_state.client, "ifm_jax/num_processes/"
    assert client is not None  # the processes have joined
    client.key_value_set(f"{folder}{process_index()}", str(num_processes))
    client.wait_at_barrier("ifm_jax/num_processes", 60_000)
    given = {int(key.rpartition("/")[2]): int(value) for key, value in client.key_value_dir_get(folder)}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{value} to process {number}" for number, value in sorted(given.items())[:8])
        raise ValueError(f"the processes were given different num_processes: {said}; pass the same to all of them")


def process_index() -> int:
    """Returns the number of this process; unlike JAX's own function it starts no devices, which needs all processes."""
    return distributed.global_state.process_id


def is_of_a_peer(error: Exception) -> bool:
    """Returns whether JAX raised this error because another process of the run has ended or cannot be reached."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return bool(_OF_A_PEER.search(str(error)))
    return isinstance(error, ValueError) and "Gloo" in str(error)  # JAX's translation of a computation's UNKNOWN status


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
    # Auto axes: the compiler propagates placements; with Explicit axes every array would need its own.
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the placement that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Makes the compiler split an array's leading axis over the devices; for use in a compiled program.

    Args:
      x: array of any rank above 0.
      mesh: mesh of the devices; None: returns `x` unchanged.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, split(mesh))


def on_every_device(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Makes the compiler put the whole array on every device; arguments as for `split_rows`."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, replicated(mesh))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Builds global arrays, split over the devices, from each process's own part of a batch.

    Args:
      mesh: mesh from `make_mesh`.
      batch: arrays `(N / processes, ...)`; process p holds the rows from p N / processes on.

    Returns:
      Arrays `(N, ...)`.
    """
    placement = split(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, placement)
    return {name: jax.make_array_from_process_local_data(placement, value) for name, value in batch.items()}


def gather_text(text: str) -> list[str]:
    """Returns the texts of all processes, by process; a collective."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([mine.size], np.int32)).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def wait_for_all(what: str) -> None:
    """Returns once every process has called it; call this before a computation that some may reach late.

    Each process compiles for itself, and only process 0 finds its program in the cache. Gloo, which connects CPUs,
    gives up after 30 s of waiting in the first collective. This function waits through the coordinator instead, up to a
    day; a process that ends meanwhile still ends the others.

    Args:
      what: name of the barrier, the same on all processes.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # here, since a step alone does not need Orbax

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=24 * 3600 * 1000)


def maximum_over_hosts(mesh: Mesh) -> Callable[[np.ndarray], jax.Array] | None:
    """Returns a function for the elementwise maximum of its argument over all processes; None if there is only one.

    The function is a minimal collective; it returns at once, like all computations.
    """
    if jax.process_count() == 1:
        return None
    placement, own = split(mesh), mesh.local_mesh.size
    maximum = jax.jit(lambda rows: rows.max(axis=0), out_shardings=replicated(mesh))

    def vote(values: np.ndarray) -> jax.Array:
        return maximum(jax.make_array_from_process_local_data(placement, np.tile(values, (own, 1))))

    return vote


def place(tree: Any, placement: NamedSharding) -> Any:
    """Puts host arrays, the same on every process, into global arrays of a placement; not a collective."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placement, lambda index, x=x: x[index]), tree)


def place_key(mesh: Mesh, rng: jax.Array) -> jax.Array:
    """Puts a random key, the same on every process, on every device."""
    return jax.random.wrap_key_data(place_everywhere(mesh, np.asarray(jax.random.key_data(rng))))


def place_everywhere(mesh: Mesh, tree: Any) -> Any:
    """Puts host arrays, the same on every process, into global arrays that are whole on every device."""
    placement = replicated(mesh)
    return jax.device_put(tree, placement) if jax.process_count() == 1 else place(tree, placement)
