"""Compile plan: what a training step needs on a TPU slice, computed on any machine.

    python -m benchmarks.tpu_plan --config=configs/x.py [--config.field=value] --topology=v5e:4x4
        [--images=1281167] [--fit] [--json=FILE]

libtpu (`pip install -e '.[tpu-plan]'`) compiles for TPUs on a machine without one: the same step that `train.py` would
run, for the recipe's global batch, split over the chips of the topology (v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:8x8 ...).
The plan follows from the compiled program: memory per chip, floating-point operations per chip relative to a perfect
split, the collectives with their bytes, and the time that each resource needs at the chip's published speed.

Memory traffic is counted from the program's text (`benchmarks.traffic`) and excludes arrays in the chip's own memory.
XLA's own count includes them and is two to three times as large.

The times are for planning, not predictions. No step is shorter than its operations at peak speed, and convolutional
networks reach a part of that. The plan excludes latencies of collectives and the reading of images.

A compilation takes minutes. Its results are cached in `$IFM_JAX_CACHE/tpu_plan`, by program, topology and libtpu.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

# Before JAX is imported. Nothing here runs on a TPU: no metadata server is asked, no lock on the device is needed, and
# libtpu's remarks about what this machine is not are kept from the terminal.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from absl import flags

from benchmarks import collectives, command, planning, programs, reporting, traffic
from benchmarks.collectives import Collective
from benchmarks.traffic import Kernel
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      name: as topologies are named after it.
      peak: bfloat16 floating-point operations a second.
      hbm_bytes: size of the memory.
      hbm_bandwidth: bytes a second.
      link: of the interconnect, one way, bytes a second; a chip has two links along each axis.
      axes: of the interconnect.
      ring: an axis closes to a ring if its length is a multiple of this.
      options: of the compiler's topology, so that it has one device a chip, as JAX has on such a machine.
    """

    name: str
    peak: float
    hbm_bytes: float
    hbm_bandwidth: float
    link: float
    axes: int
    ring: int
    options: tuple[tuple[str, Any], ...] = ()


# Peak, memory and its bandwidth: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e. Links and rings: jax-ml/scaling-book,
# tpus.md ("ICI BW/link (one-way, bytes/s)"), which agrees with the documentation's bandwidth a chip (two directions of
# all links) for v5e 400, v5p 1200 and v6e 800 GB/s; for v4 it gives none.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1200e9, 45e9, 3, 4, (("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 50e9, 2, 16),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 100e9, 3, 4),
        Chip("v6e", 918e12, 32 * 2**30, 1600e9, 100e9, 2, 16),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod: a kind of chip, and how many along each axis of the interconnect."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return math.prod(self.shape)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a chip sends when all of them work on one collective.

        Along an axis that is a ring both links are used to the full; along one with two ends, half of that.
        """
        return sum(self.chip.link * (1 if n % self.chip.ring else 2) for n in self.shape if n > 1)

    @staticmethod
    def parse(text: str) -> "Topology":
        """Reads `v5e:4x4`.

        Raises:
          UsageError: if there is no such chip, or the axes do not fit it.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        chip = CHIPS.get(found[1]) if found else None
        shape = tuple(map(int, found[2].split("x"))) if found else ()
        if chip is None or len(shape) != chip.axes or min(shape) < 1:
            raise UsageError(
                f"--topology={text}: expected a chip and its axes: v4:2x2x4, v5e:4x4, v5p:2x2x4 or v6e:4x4, "
                "or another number of chips along them"
            )
        return Topology(chip, shape)


def exchange_seconds(one: Collective, topology: Topology) -> float:
    """Returns the time that a step needs for the collectives of a kind at least.

    A chip sends (n - 1)/n of an array that is gathered or scattered, twice as much for one that is reduced, a
    quarter for an exchange of all with all (half the way around a ring, in both directions). Between some of the
    chips only, one link is counted on.
    """
    whole = one.devices == topology.chips
    bandwidth = topology.bandwidth if whole else topology.chip.link
    factor = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(one.kind, 1.0)
    if one.kind == "collective-permute":
        return one.bytes / topology.chip.link
    return factor * one.bytes * (one.devices - 1) / one.devices / bandwidth


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, for each chip.

    Attributes:
      flops: floating-point operations.
      ideal_flops: of the step as it is written, before it is split and optimized, divided by the chips.
      bytes: of memory traffic.
      hbm_bytes: the most that is in memory: state, batch, what is computed in between, and the program.
      hbm_limit: what the compiler took the memory to be, where it refused the step; None: it did not.
      compile_seconds: what the compilation took.
      collectives: of a step.
      kernels: what runs, in its order.
    """

    flops: float
    ideal_flops: float
    bytes: float
    hbm_bytes: float
    hbm_limit: float | None
    compile_seconds: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...] = ()


def require_libtpu() -> str:
    """Returns the version of libtpu.

    Raises:
      UsageError: if it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("libtpu, the compiler for TPUs, is not installed: in the clone, pip install -e '.[tpu-plan]'")
    return importlib.metadata.version("libtpu")


def devices_of(topology: Topology) -> list[jax.Device]:
    """Returns the absent chips, for a mesh to compile for.

    Raises:
      UsageError: if the compiler is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    version, options = require_libtpu(), dict(topology.chip.options)
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # hosts have four otherwise
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology={topology}: libtpu {version} cannot compile for it: {error}") from None
    if len(devices) != topology.chips:
        raise UsageError(
            f"--topology={topology}: libtpu {version} has {len(devices)} devices for these {topology.chips} chips; "
            "expected one per chip: try another version"
        )
    return devices


def compile_step(config: Config, topology: Topology, epoch_steps: int, say: Callable[[str], None]) -> Compiled:
    """Compiles the training step for a topology, or reads what an earlier compilation of it found.

    Args:
      config: prepared.
      topology: to compile for.
      epoch_steps: updates in an epoch.
      say: told what takes long.

    Raises:
      UsageError: if the compiler knows no such topology.
    """
    version, devices = require_libtpu(), devices_of(topology)
    say(f"Tracing the step of {config.model.arch}, batch {config.batch_size}, for {topology}.")
    lowered = planning.lower(config, devices, epoch_steps)

    def make() -> tuple[dict, str]:
        # XLA's own count for the program as it is written, on one device: what the chips share if nothing is lost.
        written = planning.lower(config, jax.devices("cpu")[:1], epoch_steps)
        found, text = _compile(lowered)
        return found | {"ideal_flops": written.cost_analysis()["flops"] / topology.chips}, text

    found, text = planning.kept("tpu_plan", lowered, (str(topology), version), make, say)
    kernels = traffic.kernels(programs.parse(text)) if text else []
    return Compiled(
        **found,
        bytes=sum(kernel.bytes for kernel in kernels),
        collectives=tuple(collectives.read(text, topology.chips)),
        kernels=tuple(kernels),
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[dict, str]:
    """Returns what the compiler says of the program, and the compiled text; empty if it does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        if refused is None:
            raise
        used, limit = refused
        return {"flops": 0.0, "hbm_bytes": used, "hbm_limit": limit}, ""
    hbm = planning.memory_needed(compiled)
    return {"flops": compiled.cost_analysis()["flops"], "hbm_bytes": hbm, "hbm_limit": None}, compiled.as_text()


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Returns the bytes wanted and had, of the compiler's message that a program does not fit; None: another one."""
    size = r"([\d.]+)([KMGT]?)"
    # Of a program laid out in memory, and of one refused before that, where only what is computed in between counts.
    used = rf"Used {size} of {size} hbm"
    temporaries = rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)"
    found = re.search(used, message) or re.search(temporaries, message)
    if not found:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]


def plan(config: Config, topology: Topology, images: int, say: Callable[[str], None] = print) -> dict:
    """Returns a row: what the step of a config needs on a topology, and how long the recipe takes at the least.

    Args:
      config: as the caller gave it.
      topology: to compile for.
      images: in an epoch.
      say: told what takes long.
    """
    config = planning.prepare(config, topology.chips)
    epoch_steps, steps = planning.steps_of(config, images)
    return {
        "arch": config.model.arch,
        "batch_size": config.batch_size,
        "queue_size": config.moco.queue_size,
        "images": images,
        "steps": steps,
    } | summarize(compile_step(config, topology, epoch_steps, say), topology, config.batch_size, steps)


def summarize(compiled: Compiled, topology: Topology, batch_size: int, steps: int) -> dict:
    """Returns what follows from a compilation and the published figures of the chip.

    Args:
      compiled: by `compile_step`.
      topology: that it is for.
      batch_size: global.
      steps: of the whole recipe.
    """
    chip = topology.chip
    limit = min(chip.hbm_bytes, compiled.hbm_limit or chip.hbm_bytes)
    row = {
        "topology": str(topology),
        "chips": topology.chips,
        "hbm_bytes": compiled.hbm_bytes,
        "hbm_free_bytes": limit - compiled.hbm_bytes,
        "hbm_fits": compiled.hbm_limit is None and compiled.hbm_bytes <= limit,
        "compile_seconds": compiled.compile_seconds,
    }
    if compiled.hbm_limit is not None:
        return row
    exchanged = [dataclasses.asdict(one) | {"seconds": exchange_seconds(one, topology)} for one in compiled.collectives]
    seconds = {
        "compute_seconds": compiled.flops / chip.peak,
        "memory_seconds": compiled.bytes / chip.hbm_bandwidth,
        "interconnect_seconds": sum(one["seconds"] for one in exchanged),
    }
    row |= {
        "flops_per_chip": compiled.flops,
        "flops_over_ideal": compiled.flops / compiled.ideal_flops,
        "bytes_per_chip": round(compiled.bytes),
        "kernels": sum(kernel.runs for kernel in compiled.kernels),
        "estimated_cycles": sum(kernel.cycles for kernel in compiled.kernels),
        "sources": planning.sources(compiled.kernels),
        "collectives": exchanged,
    } | seconds
    steps_seconds = {
        "compute_bound": seconds["compute_seconds"],
        "roofline": max(seconds.values()),
        "without_overlap": sum(seconds.values()),
    }
    return row | planning.durations(steps_seconds, batch_size, steps)


def largest_batch(needed: Callable[[int], tuple[float, bool]], unit: int, start: int, tries: int = 6) -> int | None:
    """Returns the largest batch found to fit, within an eighth of the largest there is.

    What a step needs is nearly a straight line in the batch: the next one to try is where the line through the last
    two meets the limit, kept between what is known to fit and what is known not to.

    Args:
      needed: of a batch: the share of the memory that it takes, and whether it fits. A compilation.
      unit: batches are multiples of this.
      start: the first to try, rounded to such a multiple.
      tries: compilations at the most.

    Returns:
      A multiple of `unit`; None: none that was tried fits.
    """
    good, bad = 0, None  # in units
    tried: dict[int, float] = {}
    candidate = max(start // unit, 1)
    for _ in range(tries):
        share, fits = needed(candidate * unit)
        tried[candidate] = share
        good, bad = (candidate, bad) if fits else (good, candidate)
        if bad is not None and (bad - good <= 1 or bad <= good * 1.125):
            break
        if len(tried) == 1:
            candidate = candidate * 2 if fits else candidate // 2
        else:
            (x1, y1), (x2, y2) = sorted(tried.items())[-2:]
            slope = (y2 - y1) / (x2 - x1)
            candidate = int(x2 + (1.0 - y2) / slope) if slope > 0 else 2 * x2
            candidate = min(candidate, 4 * good) if good else candidate
        candidate = max(candidate, good + max(good // 16, 1))
        if bad is not None:
            candidate = min(candidate, bad - 1)
    return good * unit or None


def fit(config: Config, topology: Topology, images: int, say: Callable[[str], None] = print) -> list[dict]:
    """Returns the rows of the batches that were tried for the largest that fits; the last one is that one, if any.

    The batches are multiples of 8 images a chip and of the BatchNorm groups, the queue the next multiple of the batch.

    Args:
      config: as the caller gave it; its batch is the first to be tried.
      topology: to compile for.
      images: in an epoch.
      say: told what takes long.
    """
    rows: dict[int, dict] = {}

    def needed(batch_size: int) -> tuple[float, bool]:
        changed = configs.from_dict(configs.to_dict(config))
        changed.batch_size = batch_size
        changed.moco.queue_size = math.ceil(config.moco.queue_size / batch_size) * batch_size
        row = rows[batch_size] = plan(changed, topology, max(images, batch_size), say)
        say(f"Batch {batch_size}: {row['hbm_bytes'] / 2**30:.2f} GiB per chip, {planning.fits(row)}.")
        return row["hbm_bytes"] / (row["hbm_bytes"] + row["hbm_free_bytes"]), row["hbm_fits"]

    unit = math.lcm(8 * topology.chips, config.model.bn_groups)
    largest = largest_batch(needed, unit, config.batch_size)
    return sorted(rows.values(), key=lambda row: (row["batch_size"] == largest, row["batch_size"]))


def print_report(made: dict) -> None:
    """Prints the tables."""
    for row in made["results"]:
        print(f"\n{row['topology']}, {row['arch']}, batch {row['batch_size']}, queue {row['queue_size']}")
        print(f"Memory: {row['hbm_bytes'] / 2**30:.2f} GiB per chip: {planning.fits(row)}.")
        if "collectives" in row:
            planning.print_work(row)


def main(arguments: list[str]) -> int:
    """Plans."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    if _TOPOLOGY.value is None:
        raise UsageError("--topology is missing: expected a TPU slice, for example --topology=v5e:4x4")
    topology, config = Topology.parse(_TOPOLOGY.value), _CONFIG()
    require_libtpu()
    images = planning.images_in_epoch(config, _IMAGES.value)

    def say(line: str) -> None:
        print(line, flush=True)

    rows = fit(config, topology, images, say) if _FIT.value else [plan(config, topology, images, say)]
    summary = {name: rows[-1].get(name) for name in planning.SUMMARY}
    if _FIT.value:
        summary["largest_batch"] = rows[-1]["batch_size"] if rows[-1]["hbm_fits"] else None
    made = reporting.report("tpu_plan", rows, summary, others=("libtpu",))
    print_report(made)
    reporting.write(made, _JSON.value)
    return 0


if __name__ == "__main__":
    _CONFIG = command.define_config(default=planning.RECIPE)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4 ...")
    _IMAGES = flags.DEFINE_integer("images", None, "Images in an epoch; default: ImageNet's 1281167.")
    _FIT = flags.DEFINE_bool("fit", False, "Search for the largest global batch that fits.")
    _JSON = flags.DEFINE_string("json", None, "Write the rows and the summary to this JSON file.")
    command.run(main)
