"""What the loss costs: IFM in closed form against MoCo's, and both against the original's two matrices of logits.

    python -m benchmarks.loss [--json=FILE] [--queries=256,1024] [--keys=4096,65536] [--rounds=21]

Times the loss and its gradient with respect to the queries, for N queries against K keys of 128 numbers, in float32.
Every round runs all variants, each time in another order, so that other load on the machine affects all of them alike.
Milliseconds are medians. Memory is what the compiled program needs besides its arguments; for PyTorch, on CUDA only, it
is the peak beyond them.

Without PyTorch its variants are left out.
"""

import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax import assembly
from ifm_jax.errors import UsageError
from ifm_jax.methods import losses

_JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
_QUERIES = flags.DEFINE_list(
    "queries", None, "Numbers of queries N; default: 256 to 1024 on a CPU, up to 4096 elsewhere."
)
_KEYS = flags.DEFINE_list("keys", None, "Numbers of keys K; default: 4096 to 65536 on a CPU, up to 1048576 elsewhere.")
_ROUNDS = flags.DEFINE_integer("rounds", 21, "Number of timings of each quantity.")

DIM, TEMPERATURE, EPSILON = 128, 0.2, 0.1
REFERENCE = (256, 65536)  # the sizes of the summary


def closed_moco(query, key, queue):
    """MoCo's loss as this package has it."""
    return jnp.mean(losses.info_nce(query, key, queue, TEMPERATURE))


def closed_ifm(query, key, queue):
    """IFM's objective as this package has it."""
    return jnp.mean(losses.ifm_info_nce(query, key, queue, TEMPERATURE, EPSILON))


def matrices_ifm(query, key, queue):
    """IFM's objective as the original has it: two matrices of logits, N x (1 + K)."""
    positive = jnp.sum(query * key, axis=1, keepdims=True)
    negatives = jnp.matmul(query, queue.T, precision=jax.lax.Precision.HIGHEST)

    def cross_entropy(shift):
        logits = jnp.concatenate([positive - shift, negatives + shift], axis=1) / TEMPERATURE
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])

    return (cross_entropy(0.0) + cross_entropy(EPSILON)) / 2


def _of_jax(function: Callable, arrays) -> tuple[Callable[[], None], int]:
    """Returns what computes value and gradient once, and the bytes that it needs."""
    program = jax.jit(jax.value_and_grad(function)).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays)), program.memory_analysis().temp_size_in_bytes


def _of_torch(arrays, ifm: bool) -> tuple[Callable[[], None], int | None]:
    """Returns what computes MoCo's loss, or the original's IFM, with PyTorch once, and its peak of bytes on CUDA."""
    import torch

    cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    query, key, queue = (torch.tensor(np.asarray(array), device="cuda" if cuda else "cpu") for array in arrays)
    query.requires_grad_()
    zeros = torch.zeros(len(query), dtype=torch.long, device=query.device)

    def run():
        query.grad = None
        positive = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
        negatives = torch.einsum("nc,kc->nk", query, queue)
        logits = torch.cat([positive, negatives], dim=1) / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(logits, zeros)
        if ifm:
            harder = torch.cat([positive - EPSILON, negatives + EPSILON], dim=1) / TEMPERATURE
            loss = (loss + torch.nn.functional.cross_entropy(harder, zeros)) / 2
        loss.backward()
        if cuda:
            torch.cuda.synchronize()

    if not cuda:
        return run, None
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return run, torch.cuda.max_memory_allocated() - before


def measure(queries: int, keys: int, rounds: int) -> dict:
    """Returns one row: milliseconds and bytes of every variant at N = `queries`, K = `keys`."""
    rngs = jax.random.split(jax.random.key(0), 3)
    shapes = (queries, DIM), (queries, DIM), (keys, DIM)
    drawn = (jax.random.normal(rng, shape) for rng, shape in zip(rngs, shapes, strict=True))
    arrays = tuple(array / jnp.linalg.norm(array, axis=1, keepdims=True) for array in drawn)
    variants = {
        "MoCo": _of_jax(closed_moco, arrays),
        "IFM": _of_jax(closed_ifm, arrays),
        "two matrices": _of_jax(matrices_ifm, arrays),
    }
    if importlib.util.find_spec("torch"):
        variants["PyTorch MoCo"] = _of_torch(arrays, ifm=False)
        variants["PyTorch original IFM"] = _of_torch(arrays, ifm=True)
    times = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(sorted(variants), len(variants)):
            begun = time.perf_counter()
            variants[name][0]()
            if number:
                times[name].append(1e3 * (time.perf_counter() - begun))
    row = {"queries": queries, "keys": keys}
    for name, (_, needed) in variants.items():
        row |= {f"{name} ms": statistics.median(times[name]), f"{name} bytes": needed}
    # Of the same round each: what the machine does in a round cancels.
    row["IFM / MoCo"] = statistics.median(ifm / moco for ifm, moco in zip(times["IFM"], times["MoCo"], strict=True))
    row["IFM / MoCo memory"] = row["IFM bytes"] / row["MoCo bytes"]
    if "PyTorch MoCo" in times:
        row["PyTorch original / MoCo"] = row["PyTorch original IFM ms"] / row["PyTorch MoCo ms"]
    return row


def _sizes(given: list[str] | None, flag: str, default: list[int]) -> list[int]:
    try:
        sizes = default if given is None else [int(text) for text in given]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--{flag}={','.join(given or [])}: expected sizes of at least 1, such as {default[0]}")
    return sizes


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    small = jax.default_backend() == "cpu"
    queries = _sizes(_QUERIES.value, "queries", [256, 1024] if small else [256, 1024, 4096])
    keys = _sizes(_KEYS.value, "keys", [4096, 65536] if small else [4096, 65536, 262144, 1048576])
    assembly.configure_jax()
    rows = [measure(n, k, _ROUNDS.value) for n in queries for k in keys]
    columns = {"queries": "", "keys": ""} | {name: ".2f" for name in rows[0] if name.endswith(" ms")}
    reporting.print_table("Loss and gradient, milliseconds", rows, columns)
    columns = {"queries": "", "keys": ""} | {name: ".3f" for name in rows[0] if "/" in name}
    reporting.print_table("Ratios", rows, columns)
    main_row = next((row for row in rows if (row["queries"], row["keys"]) == REFERENCE), rows[0])
    summary = {
        "queries": main_row["queries"],
        "keys": main_row["keys"],
        "ifm_over_moco_time": main_row["IFM / MoCo"],
        "ifm_over_moco_memory": main_row["IFM / MoCo memory"],
        "torch_original_over_moco": main_row.get("PyTorch original / MoCo"),
    }
    reporting.write(reporting.report("loss", rows, summary, ["torch"]), _JSON.value)
    return 0


if __name__ == "__main__":
    command.run(main)
