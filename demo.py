"""Pre-trains MoCo and IFM on the embedded images, and shows what each has learned about shape, texture and color.

    make demo                       one seed, a few minutes on two CPU cores
    python demo.py --seeds=5        the study: five seeds of each run, mean and standard error

Writes runs/demo/: a workdir for each run, results.json, readouts.png, samples.png. A finished run is not repeated.
"""

if __name__ == "__main__":  # first: what is imported below takes seconds
    from ifm_jax import process

    process.begin()

import dataclasses
import json
import pathlib
import time

from ifm_jax import assembly, recipes
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Config, Group, field
from ifm_jax.errors import UsageError
from ifm_jax.runs import training


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
    from ifm_jax.evaluation import report, suppression

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
    _draw_samples(base, workdir / "samples.png")

    results: dict[str, list[suppression.Readouts]] = {}
    for seed in range(base.seed, base.seed + options.seeds):
        config = _with(base, seed=seed)
        results.setdefault("untrained", []).append(suppression.read_out_untrained(assembly.resolve(config)))
        for name, (method, temperature) in RUNS.items():
            config = _with(base, seed=seed, method=method, temperature=temperature)
            directory = workdir / f"{method}-t{temperature:g}-seed{seed}"
            print(f"\n{name}, seed {seed} ({directory})")
            result = training.train(config, directory)
            if result.stopped_by is not None:
                return command.say_stopped(result, directory)
            results.setdefault(name, []).append(suppression.read_out_workdir(directory, name))

    means = [suppression.mean(name, rows) for name, rows in results.items()]
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
    errors = {name: each for name, rows in results.items() if (each := suppression.standard_errors(rows))}
    report.draw_readouts(means, workdir / "readouts.png", chance, errors)
    text = _findings(results)
    print(text)
    summary = {"seeds": options.seeds, "text": text} | suppression.summary(results)
    (workdir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nWritten to {workdir}: results.json, readouts.png, samples.png; each run's curves.png and metrics.jsonl.")
    print(f"Took {(time.perf_counter() - begun) / 60:.1f} minutes.")
    return 0


def _with(base: Config, *, seed: int, method: str | None = None, temperature: float | None = None) -> Config:
    """Returns a copy of the recipe with these fields changed."""
    config = assembly.resolve(base)
    config.seed = seed
    if method is not None:
        config.ifm.method = method
        config.moco.temperature = temperature
    return config


def _findings(results) -> str:
    """Describes in numbers what the table shows, and what it cannot show."""
    from ifm_jax.evaluation import suppression

    warm, cold, ifm = (results[name] for name in RUNS)

    def effect(of, against):
        found = suppression.differences(of, against)
        return ", ".join(f"{label} {found[label]}" for label in ("shape", "texture"))

    seeds = len(cold)
    lines = [
        f"Temperature 0.2 -> 0.07 (MoCo): {effect(cold, warm)} points.",
        f"MoCo -> IFM (at 0.07):          {effect(ifm, cold)} points.",
    ]
    if seeds == 1:
        lines.append(
            "One run each: another seed changes these by several points, so IFM's effect at this size is within the "
            "noise of a single run.\nTo test it, run the study with several seeds: python demo.py --seeds=5"
        )
    else:
        lines.append(f"Mean and standard error of the paired differences over {seeds} seeds.")
    return "\n".join(lines)


def _draw_samples(config: Config, path: pathlib.Path) -> None:
    """Draws a few images with the two views that a step makes of them."""
    from ifm_jax.data import open_source
    from ifm_jax.runs import samples

    config = assembly.resolve(config)
    assembly.configure_jax(config.model.compute_dtype)
    source = open_source(config.data, "train")
    samples.draw(config, source, len(source), path)


if __name__ == "__main__":
    command.run(main, Flags(Options, __doc__, ConfigFlag(recipes.DEFAULT)))
