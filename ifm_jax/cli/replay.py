"""Trains from a checkpoint on recorded views and compares with a reference, quantity by quantity.

    ifm-jax replay --start=FILE.pth.tar --views=views.npz --reference=reference.npz
    ifm-jax replay --config=configs/x.py --start=DIR --views=views.npz --out=out.npz

The training step is the usual one, but its views come from a file instead of a data source. The default is float64,
because in float32 no two programs stay together for long (docs/parity.md).

views.npz holds `query` and `key` (steps, N, H, W, 3), augmented and normalized; optionally `permutation` (steps, N),
where shuffled key image i is `key[permutation[i]]`; optionally `lr` (steps,).

reference.npz holds any of `loss`, `loss_clean`, `loss_ifm`, `acc1`, `acc5`, `grad_norm`, `queue_ptr` (steps,); the
embeddings of the first step, `first/query` and `first/key` (N, dim); and the final state, `final/<name>`, under
PyTorch's names and in its layout. --out writes all of them.

A quantity holds if the largest absolute error is at most atol + rtol * (largest magnitude in the reference); the
relative error shown is the largest absolute error over that magnitude. Exit status 0 if all hold, 1 if not.
"""

import dataclasses
import json
import pathlib
import time
from typing import TYPE_CHECKING, Any

from ifm_jax import config as configs
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ifm_jax.torch_interop.replay import Comparison


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    start: str = field("", "Checkpoint to start from: a .pth.tar in the original's format, or a run of ifm_jax.")
    views: str = field("", "File of recorded views, .npz.")
    reference: str = field("", "File of reference quantities to compare with, .npz.")
    out: str = field("", "Write this run's quantities to this .npz file.")
    json: str = field("", "Write the comparison to this JSON file.")
    dtype: str = field(
        "float64",
        "Dtype of parameters and arithmetic.",
        choices=("float64", "float32"),
        expected="one of float64, float32",
    )
    rtol: float = field(1e-9, "Tolerance relative to a quantity's largest magnitude.")
    atol: float = field(1e-9, "Absolute tolerance.")
    steps_per_epoch: int | None = field(
        None,
        "Steps in an epoch, for the learning-rate schedule, if the checkpoint does not tell.",
        least=1,
        expected="a positive integer",
    )


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag())  # without --config: the config of the start


def main(given: Given) -> int:
    """Replays; returns the exit status: 0 if all quantities hold, 1 if not."""
    given.refuse_arguments()
    options = given.options
    for name in ("start", "views"):
        if not getattr(options, name):
            raise UsageError(f"--{name} is missing: expected --{name}=FILE; --help describes it")
    for name in ("out", "json"):
        path = getattr(options, name)
        if path and not pathlib.Path(path).absolute().parent.is_dir():
            raise UsageError(f"--{name}={path}: its directory does not exist; create it first")
    import jax
    import numpy as np

    from ifm_jax import assembly
    from ifm_jax.runs import loading, snapshot
    from ifm_jax.torch_interop import replay

    views = replay.load_npz(options.views, "recorded views, query and key")
    replay.check_views(views, options.views)
    reference = replay.load_npz(options.reference, "quantities of a reference") if options.reference else {}
    start = loading.read(options.start)
    config = given.config.over(lambda: configs.from_dict(configs.to_dict(start.config)))
    snapshot.check_config(config, start, options.start)
    assembly.configure_jax()

    begun = time.perf_counter()
    out = replay.replay(config, start, views, dtype=options.dtype, steps_per_epoch=options.steps_per_epoch)
    seconds = time.perf_counter() - begun
    _print_series(out)
    if options.out:
        with open(options.out, "wb") as file:  # keep the name: np.savez would append .npz
            arrays: dict[str, Any] = out  # for savez's type: a name could be one of its options
            np.savez(file, **arrays)
    comparisons = replay.compare(out, reference, options.rtol, options.atol)
    differing = [c.name for c in comparisons if not c.holds]
    if comparisons:
        _print_comparisons(comparisons)
        text = f"{len(differing)} of {len(comparisons)} quantities differ" if differing else "Everything holds"
        print(f"{text} (rtol {options.rtol:g}, atol {options.atol:g}, {options.dtype}).")
    if options.json:
        report = {
            "start": options.start,
            "views": options.views,
            "reference": options.reference or None,
            "dtype": options.dtype,
            "rtol": options.rtol,
            "atol": options.atol,
            "steps": len(views["query"]),
            "devices": jax.device_count(),
            "seconds": seconds,
            "series": {name: out[name].tolist() for name in replay.SERIES},
            "quantities": [c._asdict() for c in comparisons],
            "holds": not differing,
        }
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if differing else 0


def _print_comparisons(comparisons: "list[Comparison]") -> None:
    from rich.console import Console
    from rich.table import Table

    from ifm_jax.torch_interop import replay

    table = Table(title="Against the reference", title_justify="left")
    for name in ("quantity", "max abs error", "max relative error", "verdict"):
        table.add_column(name, justify="left" if name in ("quantity", "verdict") else "right")
    for label, worst, count in replay.summarize(comparisons):
        label += f" (worst of {count}: {worst.name.split('.', 1)[1]})" if count > 1 else ""
        verdict = "holds" if worst.holds else "[red]DIFFERS[/red]"
        table.add_row(label, f"{worst.max_abs:.1e}", f"{worst.max_rel:.1e}", verdict)
    Console().print(table)


def _print_series(out: "dict[str, np.ndarray]") -> None:
    from rich.console import Console
    from rich.table import Table

    from ifm_jax.torch_interop import replay

    table = Table(title="Steps", title_justify="left")
    for name in ("step", *replay.SERIES):
        table.add_column(name, justify="right")
    for step, values in enumerate(zip(*(out[name] for name in replay.SERIES), strict=True), start=1):
        table.add_row(str(step), *(f"{value:.6g}" for value in values))
    Console().print(table)


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
