"""Trajectories against PyTorch's in float64, by method and number of ranks: the table of docs/parity.md.

    python -m benchmarks.parity_sweep [--json=FILE] [--only=NAME]

Runs five steps of ResNet-18 at 64 px, batch 8, dim 128, with a queue of 24 that wraps, and two steps of ResNet-50. Each
of the twelve combinations of method and number of ranks uses one value of every other option (schedule, weight decay,
start, number of simulated devices), so that every value of an option occurs with every method. Requires PyTorch and
torchvision, and takes about ten minutes on two CPU cores.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import tempfile
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import torch
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import command
from ifm_jax.runs import loading
from ifm_jax.torch_interop import replay
from references.moco import Reference, learning_rate, random_views

BATCH, SIZE, DIM, QUEUE = 8, 64, 128, 24
LR, EPOCHS, EPOCH_STEPS, MILESTONES, KEY_MOMENTUM = 0.03, 4, 2, (1, 2), 0.99
RTOL = 1e-9

METHODS = {
    "moco": ("moco", 0.1, 1.0),
    "ifm 0.1, 1": ("ifm", 0.1, 1.0),
    "ifm 0.05, 0.5": ("ifm", 0.05, 0.5),
    "ifm_only 0.2": ("ifm_only", 0.2, 1.0),
}

_GROUPS = {
    "losses": ("loss", "loss_clean", "loss_ifm"),
    "grad_norm": ("grad_norm",),
    "embeddings": ("first/",),
    "weights": ("final/encoder",),
    "queue": ("final/queue",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A trajectory."""

    name: str
    arch: str
    method: str
    ranks: int
    schedule: str
    weight_decay: float
    resumed: bool
    devices: int
    steps: int = 5


def cases() -> list[Case]:
    """Returns the trajectories."""
    found = []
    for i, method in enumerate(METHODS):
        for j, ranks in enumerate((1, 2, 4)):
            found.append(
                Case(
                    name=f"{method}, W={ranks}",
                    arch="resnet18",
                    method=method,
                    ranks=ranks,
                    schedule=("cosine", "step")[(i + j) % 2],
                    weight_decay=(1e-4, 0.05)[(i + (j + 1) // 2) % 2],
                    resumed=(i // 2 + j) % 2 == 1,
                    devices=(1, 2, 4, 8)[(i + j) % 4],
                )
            )
    return [*found, Case("ResNet-50, W=2", "resnet50", "ifm 0.1, 1", 2, "cosine", 1e-4, True, 1, steps=2)]


def follow(case: Case, folder: pathlib.Path) -> dict:
    """Trains both ways; returns a row."""
    method, epsilon, alpha = METHODS[case.method]
    reference = Reference(
        case.arch,
        DIM,
        QUEUE,
        world=case.ranks,
        method=method,
        epsilon=epsilon,
        alpha=alpha,
        momentum=KEY_MOMENTUM,
        weight_decay=case.weight_decay,
    )
    epoch = int(case.resumed)
    if case.resumed:
        reference.run(random_views(EPOCH_STEPS, BATCH, SIZE, world=case.ranks, seed=7), LR)
    reference.save_checkpoint(folder / "start.pth.tar", epoch)
    views = random_views(case.steps, BATCH, SIZE, world=case.ranks, seed=1)
    rates = [learning_rate(LR, epoch + i // EPOCH_STEPS, EPOCHS, case.schedule, MILESTONES) for i in range(case.steps)]
    expected = reference.run(views, rates)

    start = loading.read(folder / "start.pth.tar")
    config = start.config
    config.model.bn_groups, config.moco.momentum, config.epochs = case.ranks, KEY_MOMENTUM, EPOCHS
    config.ifm.method, config.ifm.epsilon, config.ifm.alpha = method, epsilon, alpha
    config.optim.lr, config.optim.schedule, config.optim.milestones = LR, case.schedule, MILESTONES
    begun = time.perf_counter()
    found = replay.replay(config, start, views, steps_per_epoch=EPOCH_STEPS, devices=jax.devices()[: case.devices])
    seconds = time.perf_counter() - begun

    comparisons = replay.compare(found, expected, rtol=RTOL, atol=0.0)
    row = {**dataclasses.asdict(case), "holds": all(c.holds for c in comparisons), "seconds": seconds}
    statistics = [c for c in comparisons if c.name.endswith(("running_mean", "running_var"))]
    for group, names in _GROUPS.items():
        of_group = [c for c in comparisons if c.name.startswith(names) and c not in statistics]
        row[group] = max(c.max_rel for c in of_group)
    return row | {"statistics": max(c.max_rel for c in statistics)}


def main(arguments: list[str]) -> int:
    """Runs the sweep; returns 1 if a trajectory does not hold."""
    command.refuse_arguments(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if _ONLY.value and _ONLY.value not in case.name:
                continue
            rows.append(follow(case, pathlib.Path(folder)))
            print(f"{case.name}: {'holds' if rows[-1]['holds'] else 'DIFFERS'}", flush=True)
    columns = ["name", "schedule", "weight_decay", "resumed", "devices", *_GROUPS, "statistics", "holds"]
    table = Table(title="Largest relative error", title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        errors = (*_GROUPS, "statistics")
        table.add_row(*(f"{row[name]:.0e}" if name in errors else str(row[name]) for name in columns))
    Console(width=140).print(table)
    if _JSON.value:
        report = {
            "benchmark": "parity_sweep",
            "date": datetime.date.today().isoformat(),
            "device": platform.machine(),
            "versions": {"jax": jax.__version__, "torch": torch.__version__},
            "results": rows,
            "summary": {"worst": max(max(row[name] for name in (*_GROUPS, "statistics")) for row in rows)},
        }
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "Write the rows to this JSON file.")
    _ONLY = flags.DEFINE_string("only", None, "Run only trajectories whose name contains this text.")
    command.run(main)
