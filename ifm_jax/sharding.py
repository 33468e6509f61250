"""Devices and hosts: the mesh, the two placements, multi-host start-up.

One global program: the step is written for the global batch on one device, `jax.jit` places it. Images are split along
the one mesh axis, `data`; parameters, queue and optimiser state are on every device.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


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
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _in_cluster():
        jax.distributed.initialize()


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
