"""Code shared by `tpu_plan` and `gpu_plan`: the step to compile, stored compilations, the time of a recipe, tables."""

import dataclasses
import gzip
import hashlib
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks import reporting, traffic
from benchmarks.traffic import Kernel
from ifm_jax import assembly, files, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError

RECIPE = str(pathlib.Path(__file__).resolve().parent.parent / "configs" / "ifm_imagenet100.py")  # taken by default

# Fields of a row that a report's summary has.
SUMMARY = (
    *("topology", "chips", "flops_per_chip", "flops_over_ideal", "bytes_per_chip", "hbm_bytes", "hbm_fits"),
    *("collectives", "kernels"),
)

IMAGENET = 1_281_167  # training images of ImageNet (ILSVRC 2012)


def prepare(config: Config, devices: int) -> Config:
    """Returns the config of a plan: for an accelerator, with images that need not exist.

    Raises:
      UsageError: for a config that could not be trained on so many devices.
    """
    config = configs.from_dict(configs.to_dict(config))
    if config.data.source == "folder:":  # to be given on the command line of a run
        config.data.source = "folder:images"
    if config.model.compute_dtype == "auto":
        config.model.compute_dtype = "bfloat16"
    configs.validate(config, devices=devices)
    return config


def images_in_epoch(config: Config, given: int | None) -> int:
    """Returns the number of images in an epoch: given, or that of the recipe's data, as far as it is known."""
    drawn = configs.drawn_source(config.data)
    images = given or (drawn.train_size if drawn else IMAGENET)
    return min(images, config.data.limit or images)


def steps_of(config: Config, images: int) -> tuple[int, int]:
    """Returns the updates in an epoch of so many images, and in the whole recipe.

    Raises:
      UsageError: if they do not fill one batch.
    """
    epoch_steps = images // config.batch_size
    if not epoch_steps:
        raise UsageError(f"--images={images}: expected at least batch_size={config.batch_size}")
    return epoch_steps, min(config.steps or config.epochs * epoch_steps, config.epochs * epoch_steps)


def lower(
    config: Config, devices: Sequence[jax.Device], epoch_steps: int, given_views: bool = False
) -> jax.stages.Lowered:
    """Returns the training step of a prepared config for these devices, not yet compiled.

    Args:
      config: prepared config.
      devices: devices to compile for.
      epoch_steps: number of updates in an epoch.
      given_views: leave the augmentation out and take float32 views.
    """
    step = assembly.make_step(config, sharding.make_mesh(devices))
    size = config.data.image_size
    # Drawn images are handed over once and viewed twice; of others, the host makes two crops.
    count = 1 if configs.drawn_source(config.data) and not given_views else 2
    images = jax.ShapeDtypeStruct((config.batch_size, count, size, size, configs.channels(config.data)), jnp.uint8)
    if given_views:
        step = dataclasses.replace(step, augment=lambda rngs, images: images)
        images = images.update(dtype=jnp.float32)
    state = jax.eval_shape(assembly.state_creator(config))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rates = jax.ShapeDtypeStruct((config.epochs * epoch_steps,), jnp.float32)
    return step.jit().lower(state, {"views": images}, rng, rates)


def kept(
    folder: str, lowered: jax.stages.Lowered, key: Sequence[str], make: Callable[[], tuple[dict, str]], say: Callable
) -> tuple[dict, str]:
    """Returns the results of a compilation and the compiled text: stored ones, or those of `make()`, which are stored.

    Args:
      folder: folder in `$IFM_JAX_CACHE`.
      lowered: program to compile.
      key: further inputs of the compilation: the device, the compiler's version.
      make: compiles the program.
      say: gets a line about each step that takes long.

    Returns:
      The result of `make`, with `compile_seconds` added.
    """
    # The key includes the names of files and functions, which determine the sources of traffic, but no line numbers.
    program = re.sub(r'":\d+:\d+( to :\d+(:\d+)?)?', '"', lowered.as_text(debug_info=True))
    name = hashlib.sha256("\n".join((program, *key)).encode()).hexdigest()[:24]
    found_in, text_in = (files.cache_directory(folder, name + end) for end in (".json", ".hlo.gz"))
    if found_in.exists():
        say(f"Using the stored compilation ({found_in}).")
    else:
        say("Compiling; this takes minutes.")
        begun = time.perf_counter()
        found, text = make()
        found_in.parent.mkdir(parents=True, exist_ok=True)
        text_in.write_bytes(gzip.compress(text.encode()))
        found_in.write_text(json.dumps(found | {"compile_seconds": time.perf_counter() - begun}) + "\n")
    return json.loads(found_in.read_text()), gzip.decompress(text_in.read_bytes()).decode()


def memory_needed(compiled: jax.stages.Compiled) -> float:
    """Returns the largest number of bytes in a device's memory: state, batch, temporary arrays, the program."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # the new state takes the place of the old one
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def kernel_seconds(kernels: Sequence[Kernel], bandwidth: float, peak: Callable[[Kernel], float]) -> float:
    """Returns the time of kernels that run one after another, each limited by the slower of memory and arithmetic.

    Args:
      kernels: kernels of a step.
      bandwidth: bandwidth of the memory in bytes per second.
      peak: returns the floating-point operations per second that a kernel can reach.
    """
    return math.fsum(max(kernel.bytes / bandwidth, kernel.operations / peak(kernel)) for kernel in kernels)


def durations(seconds: Mapping[str, float], batch_size: int, steps: int) -> dict[str, float]:
    """Returns `images_per_second_NAME` and `hours_NAME` for each time of a step by NAME.

    Args:
      seconds: times of a step in seconds.
      batch_size: global batch size.
      steps: number of steps of the whole recipe.
    """
    found = {}
    for name, step in seconds.items():
        found[f"images_per_second_{name}"] = batch_size / step
        found[f"hours_{name}"] = steps * step / 3600
    return found


def fits(row: dict) -> str:
    """Returns, in words, whether the step of a row fits into memory."""
    gib = abs(row["hbm_free_bytes"]) / 2**30
    return f"fits, {gib:.2f} GiB to spare" if row["hbm_fits"] else f"does not fit, {gib:.2f} GiB too much"


_BOUNDS = {
    "compute_bound": "at peak compute, a lower bound",
    "roofline": "by the slowest of compute, memory and interconnect, all overlapping",
    "kernel_by_kernel": "each kernel by the slower of compute and memory, then the interconnect",
    "without_overlap": "one after another, without overlap",
}


def print_work(row: dict) -> None:
    """Prints operations, times, sources of traffic and collectives of a row."""
    print(
        f"Work: {row['flops_per_chip']:.3e} floating-point operations per chip, {row['flops_over_ideal']:.4f} of "
        f"the ideal (those of the step as written, over {row['chips']} chips); {row['bytes_per_chip'] / 1e9:.2f} GB of "
        f"memory traffic per chip in {row['kernels']} kernels."
    )
    names = ("compute", "memory", "interconnect")
    print(
        "A step at peak speed, ms: " + ", ".join(f"{name} {1e3 * row[f'{name}_seconds']:.2f}" for name in names) + "."
    )
    print(f"{row['steps']} steps, epochs of {row['images']} images:")
    for name, meaning in _BOUNDS.items():
        if f"hours_{name}" in row:
            print(f"  {row[f'hours_{name}']:8.2f} hours, {row[f'images_per_second_{name}']:8.0f} images/s: {meaning}")
    reporting.print_table(
        "Memory traffic of a step by source",
        [one | {"share": one["bytes"] / max(row["bytes_per_chip"], 1)} for one in row["sources"]],
        {"source": "", "kernels": "d", "bytes": lambda count: f"{count / 1e9:.3f} GB", "share": ".1%"},
    )
    columns = {"kind": "", "dtype": "", "devices": "d", "count": "d", "bytes": ",d", "largest": _shape}
    lines = [one | {"milliseconds": 1e3 * one["seconds"]} for one in row["collectives"]]
    if lines:
        reporting.print_table("Collectives of a step", lines, columns | {"milliseconds": ".3f"})
    columns = {"source": "", "shape": _shape, "count": "d", "bytes": ",d"}
    for title, name in (("float32 arrays", "float32_arrays"), ("Reordered maps", "transposed_activations")):
        if row.get(name):
            reporting.print_table(f"{title} above {traffic.LARGE / 1e6:.0f} MB", row[name], columns)


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def sources(kernels: Sequence[Kernel]) -> list[dict]:
    """Returns rows `source`, `kernels`, `bytes`."""
    return [{"source": source, **found} for source, found in traffic.by_source(kernels).items()]
