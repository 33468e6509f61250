"""Devices and hosts: the mesh, the two placements, multi-host start-up.

One global program: the step is written for the global batch on one device, `jax.jit` places it. Images are split along
the one mesh axis, `data`; parameters, queue and optimiser state are on every device.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"

# Seconds without a sign of life after which a process is taken for dead, and the others end.
_HEARTBEAT_TIMEOUT = 30
PEER_ENDED = (
    "another process of the run has ended, or cannot be reached: see its own message; the same command on all hosts "
    "goes on from the last checkpoint"
)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a multi-host run; does nothing on a single host.

    To be called before the first JAX computation. Without arguments a cluster is recognised by what its launcher sets
    (Cloud TPU pod, SLURM, Open MPI, JAX_COORDINATOR_ADDRESS), and JAX finds the rest itself.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many processes take part.
      process_id: which one this is, 0 ... num_processes - 1.

    Raises:
      ValueError: if only some of the three are given.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: "
            "give all three or none of them"
        )
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT)
    elif _in_cluster():
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT)
    else:
        return
    # JAX notes a SIGTERM for whoever asks it, which before the loop nobody does; the loop has a way of its own.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_in_one_line_on_abort()


def _end_in_one_line_on_abort() -> None:
    """Makes the end of a process whose peer has died one with a message and status 1.

    JAX's runtime learns of it in a thread of its own and aborts, whatever Python is doing (on TPUs it is waiting for
    the peer, for ever); it takes no callback (that of jaxlib 0.10 cannot be called: std::bad_cast). So the signal of
    the abort is caught, beneath Python, whose own handlers would have to wait for the main thread.
    """

    def end(_):
        os.write(sys.__stderr__.fileno(), f"\n{os.path.basename(sys.argv[0])}: {PEER_ENDED}\n".encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _kept_alive.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_kept_alive: list = []


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


def place(tree, placement: NamedSharding):
    """Returns host arrays, the same on every process, as global arrays of that placement; not a collective."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placement, lambda index, x=x: x[index]), tree)


def place_everywhere(mesh: Mesh, tree):
    """Returns host arrays, the same on every process, as global arrays that are whole on every device."""
    placement = replicated(mesh)
    return jax.device_put(tree, placement) if jax.process_count() == 1 else place(tree, placement)
