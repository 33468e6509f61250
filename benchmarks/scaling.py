"""What the compiled training step costs as the work grows: one axis at a time from a base case.

    python -m benchmarks.scaling [--json=FILE] [--plot=FILE.png] [--axes=batch,pixels,queue,devices] [--rounds=5]

The axes are the images of a batch, the side of a view in pixels, the size K of the queue, and the devices. The base
case on a CPU is ResNet-8 at 32 px, batch 128, K = 16384 (four minutes on two cores); elsewhere it is ResNet-50 at
224 px, batch 128, K = 65536. The step is that of `benchmarks.train_step`, with IFM, on given views.

For each size: median and quartiles of a step's milliseconds, where every round runs one step of every size in another
order; images/s; floating-point operations, bytes of the arguments and results of all operations, and memory of the
compiled program; compile time. A size that does not fit in memory is left out with a message.

The devices share one global batch, as in a run: images before augmentation are split over them and shuffled for the
keys, and BatchNorm has eight groups. Operations and the collectives of the compiled program are counted per device. If
there are several accelerators, they are timed too. On a CPU, or with one accelerator, a separate process simulates
eight devices; they share this machine's cores, so nothing is timed there.

A row of the results: `axis`, `value`, `case`, `queue_size`, `devices`, `simulated`; `ms`, `quartiles`, `times` and
`images_per_sec` (where timed), `flops`, `bytes accessed`, `bytes` (memory), each for one device; `compile s` (not where
simulated); on the axis of devices also `collectives`, a list as in `benchmarks.tpu_plan`.

Summary: `base`; `axes`: for each axis `from`, `to`, and for `ms`, `flops`, `bytes accessed` and `bytes` the fitted
exponent (`ms_exponent`: cost ~ size ** exponent, least squares of the logarithms) and the factor of the cost when the
size doubles, `ms_per_doubling`; `devices_simulated`; `flops_over_ideal`: operations of all devices over those of one,
at the largest number of devices.

Requires jax, flax, optax and numpy; matplotlib for the picture.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from benchmarks import collectives, command, reporting, train_step
from benchmarks.train_step import Case
from ifm_jax import sharding
from ifm_jax.errors import RunError, UsageError

AXES = ("batch", "pixels", "queue", "devices")
COSTS = ("ms", "flops", "bytes accessed", "bytes")
DEVICES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      base: the case from which one thing at a time is changed.
      batch: batches.
      pixels: sides of a view.
      queue: sizes K, multiples of the base's batch.
      devices: how many share the base's batch.
    """

    base: Case
    batch: tuple[int, ...]
    pixels: tuple[int, ...]
    queue: tuple[int, ...]
    devices: tuple[int, ...] = DEVICES


SMALL = Sizes(
    Case("resnet8", 32, 128, "small_stride2", queue_size=16384),
    batch=(64, 128, 256, 512),
    pixels=(32, 48, 64, 96),
    queue=(4096, 16384, 65536, 262144, 1048576),
)
LARGE = Sizes(
    Case("resnet50", 224, 128, "imagenet", queue_size=65536),
    batch=(32, 64, 128, 256, 512),
    pixels=(96, 128, 160, 192, 224, 288),
    queue=(4096, 16384, 65536, 262144, 1048576),
)


def measure(sizes: Sizes, axes: Sequence[str], rounds: int, say=print) -> list[dict]:
    """Returns a row for each size along the axes `batch`, `pixels` and `queue`, timed on the first device.

    The base case is on each axis and measured once.
    """
    changed = {"batch": "batch", "pixels": "pixels", "queue": "queue_size"}
    points = [
        (axis, value, dataclasses.replace(sizes.base, **{field: value}))
        for axis, field in changed.items()
        if axis in axes
        for value in getattr(sizes, axis)
    ]
    programs = {}
    for case in dict.fromkeys(case for _, _, case in points):
        say(f"{case}, K = {case.queue_size} ...")
        if (program := _fitting(case, say)) is not None:
            programs[case] = program
    times = _times({case: run for case, (run, _) in programs.items()}, rounds)
    return [
        {"axis": axis, "value": value} | _row(case, 1, programs[case][1], times[case])
        for axis, value, case in points
        if case in programs
    ]


def over_devices(sizes: Sizes, rounds: int, say=print) -> list[dict]:
    """Returns a row for each number of devices that there are, timed only if they are not simulated."""
    devices, simulated = jax.devices(), jax.default_backend() == "cpu"
    case = dataclasses.replace(sizes.base, bn_groups=max(sizes.devices))
    runs, known = {}, {}
    for count in (count for count in sizes.devices if count <= len(devices)):
        say(f"{case}, {count} {'simulated ' if simulated else ''}devices ...")
        step = train_step.make_step(case, "ifm", sharding.make_mesh(devices[:count]))
        if simulated:
            program = train_step.lower(case, step, "uint8").compile()
            known[count] = train_step.known(program)
        else:
            runs[count], known[count], program = train_step.ours(case, "ifm", devices[:count], "uint8")
        exchanged = collectives.read(program.as_text(), count) if count > 1 else []
        known[count]["collectives"] = [dataclasses.asdict(one) for one in exchanged]
    times = _times(runs, rounds)
    return [
        {"axis": "devices", "value": count} | _row(case, count, known[count], times.get(count), simulated)
        for count in known
    ]


def simulated_devices() -> list[dict]:
    """Returns the rows of `over_devices` from a process with eight simulated ones.

    Raises:
      RunError: if it failed.
    """
    environment = dict(os.environ)
    # How many there are is settled before JAX starts. Nothing is computed there, so that LLVM need not optimize.
    options = f"--xla_force_host_platform_device_count={max(DEVICES)} --xla_backend_optimization_level=0"
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {options}"}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "devices.json"
        child = [sys.executable, "-m", "benchmarks.scaling", "--axes=devices", f"--json={path}"]
        root = pathlib.Path(__file__).resolve().parent.parent
        done = subprocess.run(child, env=environment, cwd=root, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines() or ["no message"]
            raise RunError(f"the process with simulated devices ended with status {done.returncode}: {last[-1]}")
        return json.loads(path.read_text())["results"]


def _fitting(case: Case, say):
    """Returns what `train_step.ours` does; None, and says so, for a case that does not fit the memory."""
    try:
        run, known, _ = train_step.ours(case)
        run()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(f"{case}, K = {case.queue_size}: left out, it does not fit in memory")
        return None
    return run, known


def _times(runs: dict, rounds: int) -> dict:
    """Returns the milliseconds of every round by name; two rounds before them are not counted."""
    times = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in random.Random(number).sample(list(runs), len(runs)):
            begun = time.perf_counter()
            runs[name]()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - begun))
    return times


def _row(case: Case, devices: int, known: dict, times: list[float] | None, simulated: bool = False) -> dict:
    row = {"case": str(case), "queue_size": case.queue_size, "devices": devices, "simulated": simulated}
    if times:
        low, median, high = np.percentile(times, (25, 50, 75)).tolist()
        row |= {"ms": median, "quartiles": [low, high], "times": times, "images_per_sec": case.batch / median * 1e3}
    return row | known


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns p of cost ~ size ** p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def summarize(rows: list[dict]) -> dict:
    """Returns the summary; see the module's docstring."""
    axes, found = {}, {}
    for row in rows:
        axes.setdefault(row["axis"], []).append(row)
    for axis, points in axes.items():
        of_axis = {"from": points[0]["value"], "to": points[-1]["value"]}
        for cost in COSTS:
            known = [(row["value"], row[cost]) for row in points if row.get(cost)]
            if len(known) > 1:
                of_axis[f"{cost}_exponent"] = exponent(*zip(*known, strict=True))
                of_axis[f"{cost}_per_doubling"] = 2 ** of_axis[f"{cost}_exponent"]
        found[axis] = of_axis
    summary = {"axes": found}
    counted = [row for row in axes.get("devices", ()) if row.get("flops")]
    if counted:
        summary["devices_simulated"] = counted[0]["simulated"]
        summary["flops_over_ideal"] = counted[-1]["flops"] * counted[-1]["value"] / counted[0]["flops"]
    return summary


def exchanged(row: dict) -> str:
    """Returns the collectives of a row as text: how many of each kind, and their bytes."""
    kinds: dict[str, list[int]] = {}
    for one in row.get("collectives") or ():
        total = kinds.setdefault(one["kind"], [0, 0])
        total[0] += one["count"]
        total[1] += one["bytes"]
    return ", ".join(f"{count} {kind} ({size / 1e6:.3g} MB)" for kind, (count, size) in kinds.items()) or "none"


TITLES = {
    "batch": "Images of a batch",
    "pixels": "Side of a view, pixels",
    "queue": "Size K of the queue",
    "devices": "Devices that share the batch",
}


def draw(made: dict, path: str | os.PathLike) -> None:
    """Draws a panel for each axis: time and operations relative to the smallest size, both scales logarithmic.

    Args:
      made: the report.
      path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    axes = [axis for axis in AXES if any(row["axis"] == axis for row in made["results"])]
    figure = Figure(figsize=(3.6 * len(axes), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"A training step over sizes, {made['device']}; base case: {made['summary'].get('base', 'not recorded')}"
    )
    for panel, axis in zip(np.atleast_1d(figure.subplots(1, len(axes))), axes, strict=True):
        rows = [row for row in made["results"] if row["axis"] == axis]
        for cost, label, style in (("ms", "time", "o-"), ("flops", "operations", "s--")):
            known = [(row["value"], row[cost]) for row in rows if row.get(cost)]
            if known:
                values, costs = zip(*known, strict=True)
                panel.plot(values, np.asarray(costs) / costs[0], style, label=label)
        simulated = any(row["simulated"] for row in rows)
        panel.set_title("operations of a device; simulated, no times" if simulated else "", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        values = [row["value"] for row in rows]
        panel.set_xticks(values, [f"{v // 1024}k" if v >= 4096 else str(v) for v in values])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel(TITLES[axis])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.axes[0].set_ylabel("relative to the smallest")
    figure.savefig(path, dpi=120)


def print_report(made: dict) -> None:
    """Prints the tables."""
    columns = {"value": ",d", "ms": ".1f", "images_per_sec": ".0f", "flops": lambda value: f"{value / 1e9:.2f} G"}
    columns |= {"bytes accessed": lambda value: f"{value / 1e9:.2f} GB", "bytes": lambda v: f"{v / 2**20:.0f} MiB"}
    columns |= {"compile s": ".1f"}
    for axis in AXES:
        rows = [row for row in made["results"] if row["axis"] == axis]
        if not rows:
            continue
        title = f"{TITLES[axis]}; base: {made['summary'].get('base')}"
        if axis == "devices":
            rows = [row | {"collectives": exchanged(row)} for row in rows]
            title += "; each device's" + ("; simulated devices, which say nothing of time" * rows[0]["simulated"])
            columns = columns | {"collectives": str}
        there = {name: how for name, how in columns.items() if any(row.get(name) is not None for row in rows)}
        reporting.print_table(title, rows, there)
    slopes = [{"axis": axis} | found for axis, found in made["summary"]["axes"].items()]
    columns = {"axis": "", "from": ",d", "to": ",d"} | {f"{cost}_exponent": ".2f" for cost in COSTS}
    reporting.print_table("Exponents: cost ~ size ** exponent", slopes, columns)


def _check_plot(path: str | None) -> None:
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--plot={path}: matplotlib is not installed: pip install matplotlib, or leave --plot out")
    folder = pathlib.Path(path).absolute().parent
    if pathlib.Path(path).suffix != ".png" or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--plot={path} cannot be written: expected FILE.png in an existing, writable folder")


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    _check_plot(_PLOT.value)
    axes = _AXES.value
    for axis in axes:
        if axis not in AXES:
            raise UsageError(f"--axes={axis}: expected some of {', '.join(AXES)}")

    def say(line: str) -> None:
        print(line, flush=True)

    cpu = jax.default_backend() == "cpu"
    sizes = SMALL if cpu else LARGE
    rows = measure(sizes, axes, _ROUNDS.value, say)
    if "devices" in axes and len(jax.devices()) > 1:
        rows += over_devices(sizes, _ROUNDS.value, say)
    elif "devices" in axes:
        say(f"{SMALL.base}, up to {max(DEVICES)} simulated devices, in a process of their own ...")
        rows += simulated_devices()
    summary = {"base": f"{sizes.base}, K = {sizes.base.queue_size}"} | summarize(rows)
    made = reporting.report("scaling", rows, summary)
    print_report(made)
    reporting.write(made, _JSON.value)
    if _PLOT.value:
        draw(made, _PLOT.value)
    return 0


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
    _PLOT = flags.DEFINE_string("plot", None, "Draw the report into this PNG file.")
    _AXES = flags.DEFINE_list("axes", list(AXES), "What grows, one at a time.")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of timings of each quantity.", lower_bound=1)
    command.run(main)
