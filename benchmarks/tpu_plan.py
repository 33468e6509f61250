"""Compile plan: what a training step needs on a TPU slice, computed on any machine.

    python -m benchmarks.tpu_plan --config=configs/x.py [--config.field=value] --topology=v5e:4x4
        [--images=1281167] [--fit] [--json=FILE]

libtpu (`pip install -e '.[tpu-plan]'`) compiles for TPUs on a machine without one: the same step that `train.py` would
run, for the recipe's global batch, split over the chips of the topology (v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:8x8 ...).
The plan follows from the compiled program: memory per chip, floating-point operations per chip relative to a perfect
split, the collectives with their bytes, and the time that each resource needs at the chip's published speed.

The times are for planning, not predictions. No step is shorter than its operations at peak speed, and convolutional
networks reach a part of that. XLA counts the bytes of every operation's arguments and results, including those that
stay on the chip, so the memory's time is rather too long. The plan excludes latencies of collectives and the reading of
images.

A compilation takes minutes. Its results are cached in `$IFM_JAX_CACHE/tpu_plan`, by program, topology and libtpu.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable

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
import jax.numpy as jnp
from absl import flags

from benchmarks import collectives, command, reporting
from benchmarks.collectives import Collective
from ifm_jax import assembly, files, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError

_RECIPES = pathlib.Path(__file__).resolve().parent.parent / "configs"

IMAGENET = 1_281_167  # training images of ImageNet (ILSVRC 2012)


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
    options: tuple[tuple[str, str], ...] = ()


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
      bytes_accessed: of memory.
      hbm_bytes: the most that is in memory: state, batch, what is computed in between, and the program.
      hbm_limit: what the compiler took the memory to be, where it refused the step; None: it did not.
      compile_seconds: what the compilation took.
      collectives: of a step.
    """

    flops: float
    ideal_flops: float
    bytes_accessed: float
    hbm_bytes: float
    hbm_limit: float | None
    compile_seconds: float
    collectives: tuple[Collective, ...]


def prepare(config: Config, chips: int) -> Config:
    """Returns the config as the plan takes it: for an accelerator, on images that need not be there.

    Raises:
      UsageError: for a config that could not be trained on so many chips.
    """
    config = configs.from_dict(configs.to_dict(config))
    if config.data.source == "folder:":  # to be given on the command line of a run
        config.data.source = "folder:images"
    if config.model.compute_dtype == "auto":
        config.model.compute_dtype = "bfloat16"
    configs.validate(config, devices=chips)
    return config


def lower(config: Config, devices: list[jax.Device], epoch_steps: int) -> jax.stages.Lowered:
    """Returns the training step of a prepared config for these devices, not yet compiled."""
    step = assembly.make_step(config, sharding.make_mesh(devices))
    state = jax.eval_shape(assembly.state_creator(config))
    size = config.data.image_size
    # Drawn images are handed over once and viewed twice; of others, the host makes two crops.
    count = 1 if config.data.source == "trifeature" else 2
    images = jax.ShapeDtypeStruct((config.batch_size, count, size, size, 3), jnp.uint8)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rates = jax.ShapeDtypeStruct((config.epochs * epoch_steps,), jnp.float32)
    return step.jit().lower(state, {"views": images}, rng, rates)


def require_libtpu() -> str:
    """Returns the version of libtpu.

    Raises:
      UsageError: if it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("libtpu, the compiler for TPUs, is not installed: in the clone, pip install -e '.[tpu-plan]'")
    return importlib.metadata.version("libtpu")


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
    from jax.experimental import topologies

    version = require_libtpu()
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology), **dict(topology.chip.options)
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology={topology}: libtpu {version} cannot compile for it: {error}") from None
    if len(devices) != topology.chips:
        raise UsageError(
            f"--topology={topology}: libtpu {version} has {len(devices)} devices for these {topology.chips} chips; "
            "expected one per chip: try another version"
        )
    say(f"Tracing the step of {config.model.arch}, batch {config.batch_size}, for {topology}.")
    lowered = lower(config, devices, epoch_steps)
    key = hashlib.sha256("\n".join((lowered.as_text(), str(topology), version)).encode()).hexdigest()[:24]
    kept, program = (files.cache_directory("tpu_plan", key + end) for end in (".json", ".hlo.gz"))
    if not kept.exists():
        # XLA's own count for the program as it is written, on one device: what the chips share if nothing is lost.
        ideal = lower(config, jax.devices("cpu")[:1], epoch_steps).cost_analysis()["flops"] / topology.chips
        say("Compiling; this takes minutes.")
        begun = time.perf_counter()
        found, text = _compile(lowered)
        found |= {"ideal_flops": ideal, "compile_seconds": time.perf_counter() - begun}
        kept.parent.mkdir(parents=True, exist_ok=True)
        program.write_bytes(gzip.compress(text.encode()))
        kept.write_text(json.dumps(found) + "\n")
    else:
        say(f"Using the stored compilation ({kept}).")
    text = gzip.decompress(program.read_bytes()).decode()
    return Compiled(**json.loads(kept.read_text()), collectives=tuple(collectives.read(text, topology.chips)))


def _compile(lowered: jax.stages.Lowered) -> tuple[dict, str]:
    """Returns what the compiler says of the program, and the compiled text; empty if it does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        if refused is None:
            raise
        used, limit = refused
        return {"flops": 0.0, "bytes_accessed": 0.0, "hbm_bytes": used, "hbm_limit": limit}, ""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    hbm = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # the new state takes the place of the old one
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    found = {"flops": cost["flops"], "bytes_accessed": cost["bytes accessed"], "hbm_bytes": hbm, "hbm_limit": None}
    return found, compiled.as_text()


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
    config = prepare(config, topology.chips)
    epoch_steps = images // config.batch_size
    if not epoch_steps:
        raise UsageError(f"--images={images}: expected at least batch_size={config.batch_size}")
    steps = min(config.steps or math.inf, config.epochs * epoch_steps)
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
        "memory_seconds": compiled.bytes_accessed / chip.hbm_bandwidth,
        "interconnect_seconds": sum(one["seconds"] for one in exchanged),
    }
    row |= {
        "flops_per_chip": compiled.flops,
        "flops_over_ideal": compiled.flops / compiled.ideal_flops,
        "bytes_accessed": compiled.bytes_accessed,
        "collectives": exchanged,
    } | seconds
    steps_seconds = {
        "compute_bound": seconds["compute_seconds"],
        "roofline": max(seconds.values()),
        "without_overlap": sum(seconds.values()),
    }
    for name, step in steps_seconds.items():
        row[f"images_per_second_{name}"] = batch_size / step
        row[f"hours_{name}"] = steps * step / 3600
    return row


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
        say(f"Batch {batch_size}: {row['hbm_bytes'] / 2**30:.2f} GiB per chip, {_fits(row)}.")
        return row["hbm_bytes"] / (row["hbm_bytes"] + row["hbm_free_bytes"]), row["hbm_fits"]

    unit = math.lcm(8 * topology.chips, config.model.bn_groups)
    largest = largest_batch(needed, unit, config.batch_size)
    return sorted(rows.values(), key=lambda row: (row["batch_size"] == largest, row["batch_size"]))


_BOUNDS = {
    "compute_bound": "at peak compute, a lower bound",
    "roofline": "by the slowest of compute, memory and interconnect, all overlapping",
    "without_overlap": "one after another, without overlap",
}


def _fits(row: dict) -> str:
    gib = abs(row["hbm_free_bytes"]) / 2**30
    return f"fits, {gib:.2f} GiB to spare" if row["hbm_fits"] else f"does not fit, {gib:.2f} GiB too much"


def print_report(made: dict) -> None:
    """Prints the tables."""
    for row in made["results"]:
        print(f"\n{row['topology']}, {row['arch']}, batch {row['batch_size']}, queue {row['queue_size']}")
        print(f"Memory: {row['hbm_bytes'] / 2**30:.2f} GiB per chip: {_fits(row)}.")
        if "collectives" not in row:
            continue
        print(
            f"Work: {row['flops_per_chip']:.3e} floating-point operations per chip, {row['flops_over_ideal']:.4f} of "
            f"the ideal (those of the step as written, counted by XLA, over {row['chips']} chips)."
        )
        milliseconds = {name: 1e3 * row[f"{name}_seconds"] for name in ("compute", "memory", "interconnect")}
        print("A step at peak speed, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in milliseconds.items()) + ".")
        print(f"{row['steps']} steps, epochs of {row['images']} images:")
        for name in _BOUNDS:
            hours, speed = row[f"hours_{name}"], row[f"images_per_second_{name}"]
            print(f"  {hours:8.2f} hours, {speed:8.0f} images/s: {_BOUNDS[name]}")
        columns = {"kind": "", "dtype": "", "devices": "d", "count": "d", "bytes": ",d"}
        columns |= {"largest": lambda shape: "x".join(map(str, shape)), "milliseconds": ".3f"}
        lines = [one | {"milliseconds": 1e3 * one["seconds"]} for one in row["collectives"]]
        reporting.print_table("Collectives of a step", lines, columns)


def main(arguments: list[str]) -> int:
    """Plans."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    if _TOPOLOGY.value is None:
        raise UsageError("--topology is missing: expected a TPU slice, for example --topology=v5e:4x4")
    topology, config = Topology.parse(_TOPOLOGY.value), _CONFIG()
    require_libtpu()
    images = _IMAGES.value or (config.data.trifeature.train_size if config.data.source == "trifeature" else IMAGENET)
    images = min(images, config.data.limit or images)

    def say(line: str) -> None:
        print(line, flush=True)

    rows = fit(config, topology, images, say) if _FIT.value else [plan(config, topology, images, say)]
    fields = ("topology", "chips", "flops_per_chip", "flops_over_ideal", "hbm_bytes", "hbm_fits", "collectives")
    summary = {name: rows[-1].get(name) for name in fields}
    if _FIT.value:
        summary["largest_batch"] = rows[-1]["batch_size"] if rows[-1]["hbm_fits"] else None
    made = reporting.report("tpu_plan", rows, summary, others=("libtpu",))
    print_report(made)
    reporting.write(made, _JSON.value)
    return 0


if __name__ == "__main__":
    _CONFIG = command.define_config(default=str(_RECIPES / "ifm_imagenet100.py"))
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4 ...")
    _IMAGES = flags.DEFINE_integer("images", None, "Images in an epoch; default: ImageNet's 1281167.")
    _FIT = flags.DEFINE_bool("fit", False, "Search for the largest global batch that fits.")
    _JSON = flags.DEFINE_string("json", None, "Write the rows and the summary to this JSON file.")
    command.run(main)
