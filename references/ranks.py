"""Real processes for the references: W ranks over gloo, which read a start and views and write what came out."""

import argparse
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns the flags that every reference has; each adds its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("start", "views", "out"):
        made.add_argument(f"--{name}", required=True)
    made.add_argument("--world", type=int, default=2)
    made.add_argument("--arch", default="resnet18")
    made.add_argument("--dim", type=int, default=128)
    made.add_argument("--width", type=int, default=64, help="channels of the first stage")
    for name, value in {"lr": 0.03, "weight-decay": 1e-4, "sgd-momentum": 0.9}.items():
        made.add_argument(f"--{name}", type=float, default=value)
    return made


def start(train: Callable[[int, str, argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Runs `train(rank, store, options)` in `options.world` processes, and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        # Forked, as nothing has run yet in this process: importing torch and torchvision takes longer than the steps.
        torch.multiprocessing.start_processes(train, (store, options), nprocs=options.world, start_method="fork")


def join(rank: int, store: str, options: argparse.Namespace) -> None:
    """Joins the other ranks; each has its own seed and one thread."""
    torch.set_num_threads(1)
    if loopback := [name for _, name in socket.if_nameindex() if name.startswith("lo")]:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    # A file instead of a port to meet at: no other process can take it in between.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.world)
    torch.manual_seed(1000 + rank)


def read_views(rank: int, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], int, int, slice]:
    """Returns the recorded views, their steps, the images N of a step, and which of them are this rank's."""
    with np.load(options.views) as file:
        views = dict(file)
    steps, N = views["query"].shape[:2]
    return views, steps, N, slice(rank * N // options.world, (rank + 1) * N // options.world)


def finish(
    rank: int,
    options: argparse.Namespace,
    module: nn.Module,
    results: Mapping[str, Sequence[float]],
    first: Mapping[str, np.ndarray],
) -> None:
    """Writes series, first embeddings and the final state, rank 0 for all, and leaves the other ranks."""
    if rank == 0:
        final = {f"final/{name}": value.numpy() for name, value in module.state_dict().items()}
        np.savez(options.out, **{name: np.asarray(values) for name, values in results.items()}, **first, **final)
    dist.barrier()
    dist.destroy_process_group()
