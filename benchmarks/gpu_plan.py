"""Compile plan: what a training step needs on NVIDIA GPUs, computed on any machine.

    python -m benchmarks.gpu_plan --config=configs/x.py [--config.field=value] --device=h100[:N]
        [--images=1281167] [--given_views] [--program=FILE.hlo] [--json=FILE]

XLA for CUDA (`pip install -e '.[gpu-plan]'`, no driver and no CUDA libraries) compiles for GPUs on a machine without
one: the same step that `train.py` would run, for the recipe's global batch, split over N GPUs of one machine: h100,
h200, a100 or l4. `--given_views` leaves the augmentation out and takes float32 views, as `benchmarks.train_step` does.

The plan reads the compiled program and counts there: the bytes of memory traffic by the part of the step that causes
them (what is a kernel, and what it moves: `benchmarks.traffic`), kernels, operations of convolutions and matrix
products against a perfect split, float32 arrays and reordered maps above 20 MB, the collectives with their bytes, and
the time that each resource needs at its published speed.

Limits: no algorithm of cuDNN is chosen without a GPU. So the memory is a lower bound, without cuDNN's work space; and a
convolution counts with its operands and its result. The times are for planning, not predictions: no kernel is faster
than its traffic at the memory's speed, or than its operations at peak.

A compilation takes seconds to minutes. Its results are cached in `$IFM_JAX_CACHE/gpu_plan`.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import tomllib
from collections.abc import Callable

# Before JAX is imported: nothing here runs on a GPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from absl import flags

from benchmarks import collectives, command, planning, programs, reporting, traffic
from benchmarks.collectives import Collective
from benchmarks.traffic import Kernel
from ifm_jax.config import Config
from ifm_jax.errors import UsageError

_TARGETS = pathlib.Path(__file__).resolve().parent / "targets"
_WHEELS = ("jax-cuda12-plugin", "jax-cuda12-pjrt")


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU, by its published figures (benchmarks/targets/figures.toml).

    Attributes:
      name: h100, h200, a100 or l4.
      bandwidth: of the memory, bytes a second.
      bfloat16: floating-point operations a second of the tensor cores.
      tf32: the same for float32 values that are rounded to TF32.
      float32: the same outside of the tensor cores.
      link: bytes a second, one way, between this GPU and the others.
      most: GPUs that a machine connects so.
    """

    name: str
    bandwidth: float
    bfloat16: float
    tf32: float
    float32: float
    link: float
    most: int

    @property
    def target(self) -> str:
        """The compiler's description of it, a text proto."""
        return (_TARGETS / f"{self.name}.txtpb").read_text()

    @property
    def memory_bytes(self) -> int:
        """Size of the memory."""
        found = re.search(r"device_memory_size: (\d+)", self.target)
        assert found is not None
        return int(found[1])

    def peak(self, kernel: Kernel) -> float:
        """Returns the operations a second that a kernel could reach."""
        if kernel.dtype != "f32":
            return self.bfloat16
        return self.float32 if kernel.exact else self.tf32


GPUS = {name: GPU(name, **figures) for name, figures in tomllib.loads((_TARGETS / "figures.toml").read_text()).items()}


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs of a kind, connected with each other."""

    gpu: GPU
    count: int = 1

    def __str__(self) -> str:
        return f"{self.gpu.name}:{self.count}"

    @staticmethod
    def parse(text: str) -> "Machine":
        """Reads `h100` or `h100:8`.

        Raises:
          UsageError: if there is no such GPU, or a machine does not have so many.
        """
        name, separate, count = text.partition(":")
        gpu = GPUS.get(name)
        if gpu is None or (separate and not re.fullmatch("[1-9][0-9]*", count)) or int(count or 1) > gpu.most:
            most = gpu.most if gpu else max(gpu.most for gpu in GPUS.values())
            raise UsageError(
                f"--device={text}: expected one of {', '.join(GPUS)}, and how many of them if more than one, up to "
                f"{most}: --device={name if gpu else 'h100'}:{most}"
            )
        return Machine(gpu, int(count or 1))

    def exchange_seconds(self, one: Collective) -> float:
        """Returns the time that a step needs for the collectives of a kind at least.

        Every GPU reaches every other at the full speed of its link. It sends (n - 1)/n of an array that is gathered or
        scattered, twice as much for one that is reduced, 1/n of that for an exchange of all with all.
        """
        factor = {"all-reduce": 2.0, "all-to-all": 1 / one.devices, "ragged-all-to-all": 1 / one.devices}
        if one.kind == "collective-permute":
            return one.bytes / self.gpu.link
        return factor.get(one.kind, 1.0) * one.bytes * (one.devices - 1) / one.devices / self.gpu.link


def require_wheels() -> str:
    """Returns the version of XLA's plugin for CUDA, which is jaxlib's.

    Raises:
      UsageError: if it is not installed, or is another version.
    """
    wanted, remedy = importlib.metadata.version("jaxlib"), "in the clone, pip install -e '.[gpu-plan]'"
    for wheel in _WHEELS:
        try:
            version = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"{wheel}, the compiler for NVIDIA GPUs, is not installed: {remedy}") from None
        if version != wanted:
            raise UsageError(f"{wheel} {version} does not fit jaxlib {wanted}: expected {wheel} {wanted}: {remedy}")
    return wanted


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled step holds, for each GPU.

    Attributes:
      kernels: what runs, in its order.
      ideal_flops: operations of the step as it is written, divided by the GPUs.
      hbm_bytes: the most that is in memory, without what cuDNN needs.
      compile_seconds: what the compilation took.
      collectives: of a step.
      text: the program.
    """

    kernels: tuple[Kernel, ...]
    ideal_flops: float
    hbm_bytes: float
    compile_seconds: float
    collectives: tuple[Collective, ...]
    text: str = ""


def devices_of(machine: Machine) -> list[jax.Device]:
    """Returns the absent GPUs, for a mesh to compile for.

    Raises:
      UsageError: if the compiler is not installed or does not know the GPU.
    """
    from jax.experimental import topologies

    version = require_wheels()
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=machine.gpu.target, topology=f"1x1x{machine.count}"
        ).devices
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device={machine}: jax-cuda12-plugin {version} cannot compile for it: {reason}") from None


def compile_step(
    config: Config, machine: Machine, epoch_steps: int, given_views: bool, say: Callable[[str], None]
) -> Compiled:
    """Compiles the training step for a machine, or reads what an earlier compilation of it found.

    Args:
      config: prepared.
      machine: to compile for.
      epoch_steps: updates in an epoch.
      given_views: without augmentation.
      say: told what takes long.
    """
    version, devices = require_wheels(), devices_of(machine)
    say(f"Tracing the step of {config.model.arch}, batch {config.batch_size}, for {machine}.")
    lowered = planning.lower(config, devices, epoch_steps, given_views)

    def make() -> tuple[dict, str]:
        ideal = traffic.operations(programs.parse(lowered.as_text("hlo"))) / machine.count
        compiled = lowered.compile()
        return {"ideal_flops": ideal, "hbm_bytes": planning.memory_needed(compiled)}, compiled.as_text()

    found, text = planning.kept("gpu_plan", lowered, (str(machine), machine.gpu.target, version), make, say)
    exchanged = collectives.read(text, machine.count) if machine.count > 1 else []
    kernels = traffic.kernels(programs.parse(text))
    return Compiled(**found, kernels=tuple(kernels), collectives=tuple(exchanged), text=text)


def summarize(compiled: Compiled, machine: Machine, batch_size: int, steps: int) -> dict:
    """Returns what follows from a compilation and the published figures of the GPU.

    Args:
      compiled: by `compile_step`.
      machine: that it is for.
      batch_size: global.
      steps: of the whole recipe.
    """
    gpu, kernels = machine.gpu, compiled.kernels
    exchanged = [dataclasses.asdict(one) | {"seconds": machine.exchange_seconds(one)} for one in compiled.collectives]
    moved = sum(kernel.bytes for kernel in kernels)
    seconds = {
        "compute_seconds": sum(kernel.operations / gpu.peak(kernel) for kernel in kernels),
        "memory_seconds": moved / gpu.bandwidth,
        "interconnect_seconds": sum(one["seconds"] for one in exchanged),
        "kernels_seconds": planning.kernel_seconds(kernels, gpu.bandwidth, gpu.peak),
    }
    flops = sum(kernel.operations for kernel in kernels)
    steps_seconds = {
        "compute_bound": seconds["compute_seconds"],
        "roofline": max(seconds[f"{name}_seconds"] for name in ("compute", "memory", "interconnect")),
        "kernel_by_kernel": seconds["kernels_seconds"] + seconds["interconnect_seconds"],
    }
    return (
        {
            "topology": str(machine),
            "chips": machine.count,
            "hbm_bytes": compiled.hbm_bytes,
            "hbm_free_bytes": gpu.memory_bytes - compiled.hbm_bytes,
            "hbm_fits": compiled.hbm_bytes <= gpu.memory_bytes,
            "compile_seconds": compiled.compile_seconds,
            "flops_per_chip": flops,
            "flops_over_ideal": flops / compiled.ideal_flops,
            "bytes_per_chip": round(moved),
            "kernels": sum(kernel.runs for kernel in kernels),
            "sources": planning.sources(kernels),
            "float32_arrays": traffic.large_float32(kernels),
            "transposed_activations": traffic.transposed_activations(kernels),
            "collectives": exchanged,
        }
        | seconds
        | planning.durations(steps_seconds, batch_size, steps)
    )


def plan(
    config: Config,
    machine: Machine,
    images: int,
    given_views: bool = False,
    say: Callable[[str], None] = print,
    program: str | None = None,
) -> dict:
    """Returns a row: what the step of a config needs on a machine, and how long the recipe takes at the least.

    Args:
      config: as the caller gave it.
      machine: to compile for.
      images: in an epoch.
      given_views: without augmentation, on float32 views.
      say: told what takes long.
      program: path for the compiled program's text; None: not wanted.
    """
    config = planning.prepare(config, machine.count)
    epoch_steps, steps = planning.steps_of(config, images)
    compiled = compile_step(config, machine, epoch_steps, given_views, say)
    if program is not None:
        pathlib.Path(program).write_text(compiled.text)
    return {
        "method": config.method,
        "arch": config.model.arch,
        "pixels": config.data.image_size,
        "batch_size": config.batch_size,
        "queue_size": config.moco.queue_size if config.method == "moco" else None,
        "given_views": given_views,
        "images": images,
        "steps": steps,
    } | summarize(compiled, machine, config.batch_size, steps)


def print_report(made: dict) -> None:
    """Prints the tables."""
    for row in made["results"]:
        network = f"{row['method']}, {row['arch']}, {row['pixels']} px, batch {row['batch_size']}"
        queue = f", queue {row['queue_size']}" if row["queue_size"] else ""
        views = ", given views" if row["given_views"] else ""
        print(f"\n{row['topology']}, {network}{queue}{views}")
        print(
            f"Memory: at least {row['hbm_bytes'] / 2**30:.2f} GiB per chip, without cuDNN's work space: "
            f"{planning.fits(row)}."
        )
        planning.print_work(row)


def main(arguments: list[str]) -> int:
    """Plans."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    reporting.check_path(_PROGRAM.value, "program")
    if _DEVICE.value is None:
        raise UsageError("--device is missing: expected a GPU and how many, for example --device=h100:8")
    machine, config = Machine.parse(_DEVICE.value), _CONFIG()
    require_wheels()
    images = planning.images_in_epoch(config, _IMAGES.value)
    row = plan(config, machine, images, _GIVEN_VIEWS.value, lambda line: print(line, flush=True), _PROGRAM.value)
    made = reporting.report("gpu_plan", [row], {name: row[name] for name in planning.SUMMARY}, others=_WHEELS)
    print_report(made)
    reporting.write(made, _JSON.value)
    return 0


if __name__ == "__main__":
    _CONFIG = command.define_config(default=planning.RECIPE)
    _DEVICE = flags.DEFINE_string("device", None, f"GPUs of one machine: {', '.join(GPUS)}; several: h100:8.")
    _IMAGES = flags.DEFINE_integer("images", None, "Images in an epoch; default: ImageNet's 1281167.")
    _GIVEN_VIEWS = flags.DEFINE_bool("given_views", False, "Plan the step without augmentation, on float32 views.")
    _PROGRAM = flags.DEFINE_string("program", None, "Write the compiled program to this file, as text.")
    _JSON = flags.DEFINE_string("json", None, "Write the rows and the summary to this JSON file.")
    command.run(main)
