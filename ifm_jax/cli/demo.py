"""Pre-trains MoCo and IFM on the embedded images, and shows what each has learned about shape, texture and color.

    ifm-jax demo                    one seed, a few minutes on two CPU cores
    ifm-jax demo --seeds=5          the study: five seeds of each run, mean and standard error

Writes runs/demo/: a workdir for each run, results.json, readouts.png, samples.png. A finished run is not repeated. In a
clone, make demo and python demo.py are the same.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ifm_jax import config as configs
from ifm_jax import recipes
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Config, Group, field
from ifm_jax.errors import UsageError

if TYPE_CHECKING:
    from ifm_jax.evaluation import comparison


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    seeds: int = field(1, "Number of seeds of each run.", expected="an integer")
    workdir: str = field("runs/demo", "Directory for all results.")


# name -> (method, temperature); the first two differ in temperature alone, the last two in the method alone.
RUNS = {
    "MoCo, T = 0.2": ("moco", 0.2),
    "MoCo, T = 0.07": ("moco", 0.07),
    "IFM, T = 0.07": ("ifm", 0.07),
}


def main(given: Given) -> int:
    """Trains, reads out, reports; returns the exit status."""
    given.refuse_arguments()
    options = given.options
    if options.seeds < 1:
        raise UsageError(f"--seeds={options.seeds}: expected at least 1")
    begun = time.perf_counter()
    base = given.config()
    workdir = pathlib.Path(options.workdir)
    command.workdir(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} is not writable ({error.strerror}): pass a directory that is") from None
    from ifm_jax import assembly  # this and the next take seconds, too long for a usage error
    from ifm_jax.evaluation import comparison, report
    from ifm_jax.runs import training

    _draw_samples(base, workdir / "samples.png")

    results: dict[str, list[comparison.Readouts]] = {}
    for seed in range(base.seed, base.seed + options.seeds):
        config = _with(base, seed=seed)
        results.setdefault("untrained", []).append(comparison.read_out_untrained(assembly.resolve(config)))
        for name, (method, temperature) in RUNS.items():
            config = _with(base, seed=seed, method=method, temperature=temperature)
            directory = workdir / f"{method}-t{temperature:g}-seed{seed}"
            print(f"\n{name}, seed {seed} ({directory})")
            result = training.train(config, directory, recipe=given.config.name())
            if result.stopped_by is not None:
                return command.say_stopped(result, directory)
            results.setdefault(name, []).append(comparison.read_out_workdir(directory, name))

    means = [comparison.mean(name, rows) for name, rows in results.items()]
    print()
    report.print_table(means)
    chance = {
        label: 100 / count
        for label, count in zip(
            means[0].accuracy,
            (base.data.trifeature.shapes, base.data.trifeature.textures, base.data.trifeature.colors),
            strict=True,
        )
    }
    errors = {name: each for name, rows in results.items() if (each := comparison.standard_errors(rows))}
    report.draw_readouts(means, workdir / "readouts.png", chance, errors)
    text = _findings(results)
    print(text)
    summary = {"seeds": options.seeds, "text": text} | comparison.summary(results)
    (workdir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nWritten to {workdir}: results.json, readouts.png, samples.png; each run's curves.png and metrics.jsonl.")
    print(f"Took {(time.perf_counter() - begun) / 60:.1f} minutes.")
    return 0


def _with(base: Config, *, seed: int, method: str = "", temperature: float = 0.0) -> Config:
    """Returns a copy of the recipe with these fields changed; without a method, its own."""
    config = configs.from_dict(configs.to_dict(base))
    config.seed = seed
    if method:
        config.ifm.method = method
        config.moco.temperature = temperature
    return config


def _findings(results: Mapping[str, "Sequence[comparison.Readouts]"]) -> str:
    """Describes in numbers what the table shows, and what it cannot show."""
    from ifm_jax.evaluation import comparison

    warm, cold, ifm = (results[name] for name in RUNS)

    def effect(of: "Sequence[comparison.Readouts]", against: "Sequence[comparison.Readouts]") -> str:
        found = comparison.differences(of, against)
        return ", ".join(f"{label} {found[label]}" for label in ("shape", "texture"))

    seeds = len(cold)
    lines = [
        f"Temperature 0.2 -> 0.07 (MoCo): {effect(cold, warm)} points.",
        f"MoCo -> IFM (at 0.07):          {effect(ifm, cold)} points.",
    ]
    if seeds == 1:
        lines.append(
            "One run each: another seed changes these by several points, so IFM's effect at this size is within the "
            "noise of a single run.\nTo test it, run the study with several seeds: ifm-jax demo --seeds=5"
        )
    else:
        lines.append(f"Mean and standard error of the paired differences over {seeds} seeds.")
    return "\n".join(lines)


def _draw_samples(config: Config, path: pathlib.Path) -> None:
    """Draws a few images with the two views that a step makes of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ifm_jax import assembly
    from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD, example_rngs
    from ifm_jax.data import open_source
    from ifm_jax.evaluation import report

    config = assembly.resolve(config)
    assembly.configure_jax(config.model.compute_dtype)
    images = open_source(config.data, "train").examples(np.arange(10))["image"]
    augment = jax.jit(assembly.make_augmentation(config))
    views = []
    for rng in jax.random.split(jax.random.key(config.seed), 2):
        view = augment(example_rngs(rng, jnp.arange(len(images))), images)
        views.append(np.clip(np.asarray(view) * np.asarray(IMAGENET_STD) + np.asarray(IMAGENET_MEAN), 0, 1))
    report.draw_samples(images, views, path)


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag(recipes.DEFAULT))


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
