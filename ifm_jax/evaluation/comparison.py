"""Which features a run has learned and which it has suppressed: linear readouts of every label, run by run.

Robinson et al. 2021, section 4.2: on images with several independent labels, a contrastive encoder may do well with one
of them and leave the others; how much of each is linearly readable shows it. Runs that differ in their seed only are
one method: mean and standard error over seeds; methods are compared with the first one, paired by seed.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ifm_jax import assembly, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import pretrained
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.readout import Readouts, linear_readouts
from ifm_jax.runs.workdir import Workdir


def read_out(name: str, config: Config, frozen: FrozenEncoder, step: int) -> Readouts:
    """Reads out every label of the config's source from a frozen backbone.

    Args:
      name: name of the result.
      config: resolved config.
      frozen: frozen backbone.
      step: number of its updates.

    Raises:
      UsageError: if the source has no labels.
    """
    train, test = pretrained.labeled(config, "train"), pretrained.labeled(config, "test")
    accuracy = linear_readouts(extract(frozen, train), train.labels(), extract(frozen, test), test.labels())
    return Readouts(name, step, accuracy, config.seed)


def read_out_untrained(config: Config, devices: list[jax.Device] | None = None) -> Readouts:
    """Reads out the network that the config's runs start from.

    Args:
      config: config of the runs.
      devices: devices to compute on; None: the first of this process.
    """
    config = assembly.resolve(config)
    assembly.configure_jax(config.model.compute_dtype)
    start = jax.jit(assembly.state_creator(config))()
    frozen = FrozenEncoder(
        assembly.make_encoder(config),
        start.params,
        start.batch_stats,
        mesh=sharding.make_mesh(devices or jax.local_devices()[:1]),
    )
    return read_out("untrained", config, frozen, 0)


def read_out_workdir(
    workdir: str | os.PathLike[str], name: str | None = None, devices: list[jax.Device] | None = None
) -> Readouts:
    """Reads out the newest checkpoint of a run.

    Args:
      workdir: working directory of the run.
      name: name of the result; None: derived from the method in its config.
      devices: devices to compute on; None: the first of this process.

    Raises:
      UsageError: if there is no run or no checkpoint there, or its images have no labels.
    """
    of = pretrained.load(workdir, Workdir(workdir).read_config())
    return read_out(
        name or configs.method_name(of.config), of.config, of.frozen(devices or jax.local_devices()[:1]), of.step
    )


def grouped(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, list[str | os.PathLike[str]]]:
    """Groups runs by method, in the order given; the runs of a method differ only in their seed.

    Methods of the same name also get the fields in which they differ.

    Raises:
      UsageError: if a workdir holds no run, or two runs of a method have the same seed.
    """
    groups: list[tuple[Config, list[str | os.PathLike[str]]]] = []
    for workdir in workdirs:
        config = Workdir(workdir).read_config()
        alike = configs.from_dict(configs.to_dict(config))
        alike.seed = 0
        for known, members in groups:
            if not configs.differences(alike, known):
                if any(Workdir(other).read_config().seed == config.seed for other in members):
                    raise UsageError(
                        f"{workdir} has the same config and seed as another given workdir: name only one of them"
                    )
                members.append(workdir)
                break
        else:
            groups.append((alike, [workdir]))
    names = [configs.method_name(config) for config, _ in groups]
    result = {}
    for name, (config, members) in zip(names, groups, strict=True):
        if names.count(name) > 1:
            first = next(other for other, other_name in zip(groups, names, strict=True) if other_name == name)[0]
            differing = [text.split(", not ")[0] for text in configs.differences(config, first)]
            name = f"{name}; {', '.join(differing)}" if differing else name
        result[name] = members
    return result


def mean(name: str, rows: Sequence[Readouts]) -> Readouts:
    """Returns the mean of one method's readouts over seeds."""
    accuracy = {label: float(np.mean([row.accuracy[label] for row in rows])) for label in rows[0].accuracy}
    return Readouts(name, rows[0].step, accuracy)


def standard_errors(rows: Sequence[Readouts]) -> dict[str, float] | None:
    """Returns the standard error of each label's mean over seeds; None for a single seed."""
    if len(rows) < 2:
        return None
    return {label: _standard_error([row.accuracy[label] for row in rows]) for label in rows[0].accuracy}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two methods in the readout of a label, in points, paired by seed.

    Attributes:
      mean: mean over the seeds that both have.
      standard_error: standard error of the mean; None for a single seed.
      seeds: number of these seeds.
    """

    mean: float
    standard_error: float | None
    seeds: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.1f}"
        return f"{self.mean:+.1f}{error}"


def differences(of: Sequence[Readouts], against: Sequence[Readouts]) -> dict[str, Difference]:
    """Returns label -> difference over the seeds that both methods have; empty if there are none."""
    pairs = [(one, other) for one in of for other in against if one.seed == other.seed]
    if not pairs:
        return {}
    found = {}
    for label in pairs[0][0].accuracy:
        points = [one.accuracy[label] - other.accuracy[label] for one, other in pairs]
        found[label] = Difference(
            float(np.mean(points)), _standard_error(points) if len(points) > 1 else None, len(points)
        )
    return found


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def summary(results: dict[str, list[Readouts]]) -> dict[str, Any]:
    """Returns the contents of a report for JSON: runs, means, standard errors, differences from the first method."""
    names = [name for name in results if name != "untrained"]
    return {
        "runs": {name: [row.to_dict() for row in rows] for name, rows in results.items()},
        "mean": {name: mean(name, rows).to_dict() for name, rows in results.items()},
        "standard_error": {name: standard_errors(rows) for name, rows in results.items()},
        "differences": {
            f"{name} - {names[0]}": {
                label: dataclasses.asdict(each) for label, each in differences(results[name], results[names[0]]).items()
            }
            for name in names[1:]
        },
    }


def markdown(results: dict[str, list[Readouts]]) -> str:
    """Returns the report as a Markdown table: mean +- standard error in percent, and the differences in points."""
    labels = list(next(iter(results.values()))[0].accuracy)
    lines = [f"| method | seeds | {' | '.join(labels)} |", f"|---|---|{'---|' * len(labels)}"]
    for name, rows in results.items():
        errors = standard_errors(rows)
        cells = [
            f"{mean(name, rows).accuracy[label]:.1f}" + (f" +- {errors[label]:.1f}" if errors else "")
            for label in labels
        ]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    names = [name for name in results if name != "untrained"]
    for name in names[1:]:
        found = differences(results[name], results[names[0]])
        if found:
            seeds = next(iter(found.values())).seeds
            lines.append(f"| {name}, less {names[0]} | {seeds} | {' | '.join(str(found[label]) for label in labels)} |")
    return "\n".join(lines) + "\n"


def write(results: dict[str, list[Readouts]], directory: str | os.PathLike[str]) -> None:
    """Writes suppression.json, suppression.md and suppression.png.

    Args:
      results: method -> its readouts.
      directory: directory of the report; created if it does not exist.

    Raises:
      UsageError: if the directory cannot be written.
    """
    from ifm_jax.evaluation import report

    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "suppression.json").write_text(json.dumps(summary(results), indent=2) + "\n")
        (directory / "suppression.md").write_text(markdown(results))
        errors = {name: each for name, rows in results.items() if (each := standard_errors(rows))}
        means = [mean(name, rows) for name, rows in results.items()]
        report.draw_readouts(means, directory / "suppression.png", errors=errors)
    except OSError as error:
        raise UsageError(f"{directory} is not writable ({error.strerror}): pass a writable --output") from None


def compare(workdirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> dict[str, list[Readouts]]:
    """Reads out runs, method by method, prints the table and writes the report.

    Args:
      workdirs: working directories of the runs; those of the first method also determine the untrained network.
      output: directory of the report.

    Returns:
      Method -> its readouts, "untrained" first.

    Raises:
      UsageError: if a workdir holds no run or is named twice, or the report cannot be written.
    """
    from ifm_jax.evaluation import report

    groups = grouped(workdirs)
    first = next(iter(groups.values()))
    results = {"untrained": [read_out_untrained(Workdir(workdir).read_config()) for workdir in first]}
    for name, members in groups.items():
        results[name] = [read_out_workdir(workdir, name) for workdir in members]
    report.print_table([mean(name, rows) for name, rows in results.items()])
    print(markdown(results))
    write(results, output)
    print(f"Written to {output}: suppression.json, suppression.md, suppression.png.")
    return results
