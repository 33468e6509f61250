"""What makes a study's differences easier to see: further draws of the readout's images, and averaged weights.

    python -m benchmarks.variance --study=studies/NAME --workdir=DIR [--draws=3] [--json=FILE]

Reads the checkpoints of a finished study in DIR again, and takes its comparisons anew for each way of reading a run:

- with one draw of images for the readout, as the study did, and with the mean over several, of which no two share an
  image;
- from the last checkpoint, and from the mean of the weights and running averages of the last 2, 3, ... checkpoints that
  every run has.

For each: the standard deviation of a run, that of a pair's difference, the mean difference with its standard error, and
how many pairs would show a difference of one point in four studies of five (paired t test at 0.05).
"""

import itertools
import os
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import joblib
import numpy as np
import scipy.stats
from absl import flags

from benchmarks import command, reporting
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import pretrained
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.readout import linear_readouts
from ifm_jax.runs import checkpoint
from ifm_jax.runs.workdir import Workdir
from ifm_jax.studies import statistics as of_studies
from ifm_jax.studies import study
from ifm_jax.studies.study import MEAN, WORST, Comparison, Run

_STUDY = flags.DEFINE_string("study", None, "File with the study, or a study of the package.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.")
_DRAWS = flags.DEFINE_integer("draws", 3, "Draws of the images for the readout, the study's own among them.")
_JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")

DRAWN = ("trifeature", "digits")  # sources of which there are as many images as one asks for


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    for name, value in (("study", _STUDY.value), ("workdir", _WORKDIR.value)):
        if value is None:
            raise UsageError(f"--{name} is missing: expected that of a finished study")
    if _DRAWS.value < 1:
        raise UsageError(f"--draws={_DRAWS.value}: expected at least 1")
    given = study.load(_STUDY.value)
    asked = [comparison for comparison in given.comparisons if MEAN in comparison.labels]
    arms = {arm for comparison in asked for arm in (comparison.a, comparison.b)}
    runs = [run for run in given.runs() if run.arm in arms]
    table = compare(list(read_again(pathlib.Path(_WORKDIR.value), runs, _DRAWS.value)), asked)
    columns = {
        **{"source": "", "comparison": "", "label": "", "checkpoints": "d", "draws": "d", "run_sd": ".2f"},
        **{"pair_sd": ".2f", "pairs": "d", "mean": "+.2f", "stderr": ".2f", "pairs_for_one_point": "d"},
    }
    reporting.print_table(f"{_STUDY.value}: standard deviations and differences in points", table, columns)
    summary = {"study": _STUDY.value, "runs": len(runs), "draws": _DRAWS.value}
    made = reporting.report("variance", table, summary, ["scikit-learn"])
    reporting.write(made, _JSON.value)
    return 0


def read_again(directory: pathlib.Path, runs: Sequence[Run], draws: int) -> Iterator[dict[str, Any]]:
    """Yields rows as a study has them, one for each run and way of reading it.

    Args:
      directory: directory of the study.
      runs: the runs to read.
      draws: draws of the images.

    Yields:
      `source`, `arm`, `seed`, `checkpoints` and `draws`, of which `readout` is the mean; label -> percent.

    Raises:
      UsageError: if a run has no checkpoint, or its images cannot be drawn again.
    """
    kept = {run: checkpoint.steps(Workdir(directory / run.directory).checkpoints) for run in runs}
    for run, steps in kept.items():
        if not steps:
            raise UsageError(f"{directory / run.directory} has no checkpoint: expected one; run the study first")
    averaged = range(1, min(map(len, kept.values())) + 1)
    compiled: dict[str, FrozenEncoder] = {}  # for each source
    for run, steps in kept.items():
        path = Workdir(directory / run.directory).checkpoints
        found = [pretrained.load(path / str(step)) for step in steps[: -len(averaged) - 1 : -1]]
        encoder = compiled.setdefault(run.source, found[0].frozen(jax.local_devices()[:1]))
        config = more_images(found[0].config, draws)
        images = {split: pretrained.labeled(config, split) for split in ("train", "test")}
        labels = {split: source.labels() for split, source in images.items()}
        trees = [(each.snapshot.state.params, each.snapshot.state.batch_stats) for each in found]
        for count in averaged:
            taken = encoder.holding(*jax.tree.map(_mean, *trees[:count]))
            features = {split: extract(taken, source) for split, source in images.items()}
            drawn = readouts(features, labels, draws)
            for several in range(1, draws + 1):
                mean = {name: statistics.fmean(each[name] for each in drawn[:several]) for name in drawn[0]}
                row = {"source": run.source, "arm": run.arm, "seed": run.seed, "checkpoints": count, "draws": several}
                yield row | {"readout": mean}


def compare(rows: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns a dict for each comparison, source, label and way of reading.

    Args:
      rows: from `read_again`.
      comparisons: the questions.

    Returns:
      `source`, `comparison`, `label`, `checkpoints`, `draws`; `run_sd`, the standard deviation of the runs of the
      second arm, and `pair_sd`, that of the differences; `pairs`, `mean` and `stderr` of the differences;
      `pairs_for_one_point`. In points; None for what a single pair does not have.
    """
    table = []
    ways = list(dict.fromkeys((row["checkpoints"], row["draws"]) for row in rows))
    for comparison, source in itertools.product(comparisons, dict.fromkeys(row["source"] for row in rows)):
        own = [row for row in rows if row["source"] == source]
        for label, (checkpoints, draws) in itertools.product((*own[0]["readout"], MEAN, WORST), ways):
            read = [row for row in own if (row["checkpoints"], row["draws"]) == (checkpoints, draws)]
            found = list(of_studies.differences(read, source, comparison.a, comparison.b, label).values())
            of_b = [of_studies.value(row, label) for row in read if row["arm"] == comparison.b]
            row = {"source": source, "comparison": comparison.name, "label": label}
            row |= {"checkpoints": checkpoints, "draws": draws, "pairs": len(found), "mean": statistics.fmean(found)}
            if len(found) > 1:
                row |= {"run_sd": statistics.stdev(of_b), "pair_sd": (spread := statistics.stdev(found))}
                row |= {"stderr": spread / len(found) ** 0.5, "pairs_for_one_point": pairs_needed(spread)}
            table.append(row)
    return table


def pairs_needed(spread: float, shown: float = 1.0, power: float = 0.8, level: float = 0.05) -> int:
    """Returns how many pairs show a difference in a two-sided paired t test.

    Args:
      spread: standard deviation of a pair's difference.
      shown: the difference, in the same unit.
      power: share of studies that shall find it.
      level: of the test.
    """
    pairs, found = 1, 0.0
    while found < power:
        pairs += 1
        bound = scipy.stats.t.ppf(1 - level / 2, pairs - 1)
        far = scipy.stats.nct(pairs - 1, shown / max(spread, 1e-9) * pairs**0.5)
        found = far.sf(bound) + far.cdf(-bound)
    return pairs


def _mean(*values: np.ndarray) -> np.ndarray:
    return np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)


def more_images(config: Config, times: int) -> Config:
    """Returns a config whose source has `times` as many images in each split; the first are those of `config`.

    Raises:
      UsageError: if the config's source is not drawn.
    """
    if config.data.source not in DRAWN:
        raise UsageError(f"data.source={config.data.source!r}: expected one of {', '.join(DRAWN)}")
    parameters = getattr(config.data, config.data.source)
    parameters.train_size, parameters.test_size = times * parameters.train_size, times * parameters.test_size
    return config


def readouts(
    features: Mapping[str, np.ndarray], labels: Mapping[str, Mapping[str, np.ndarray]], draws: int
) -> list[dict[str, float]]:
    """Returns label -> percent for each draw, each from its own part of the features, fitted in parallel.

    Args:
      features: split -> `(draws * images, features)`.
      labels: split -> label -> `(draws * images,)`.
      draws: number of draws.
    """

    def part(values: np.ndarray, draw: int) -> np.ndarray:
        return np.split(values, draws)[draw]

    def of(draw: int, name: str) -> dict[str, float]:
        given = [
            part(features["train"], draw),
            {name: part(labels["train"][name], draw)},
            part(features["test"], draw),
            {name: part(labels["test"][name], draw)},
        ]
        return linear_readouts(*given)

    names = list(labels["train"])
    found = joblib.Parallel(n_jobs=os.cpu_count(), prefer="threads")(
        joblib.delayed(of)(draw, name) for draw in range(draws) for name in names
    )
    return [
        {key: value for each in found[draw * len(names) : (draw + 1) * len(names)] for key, value in each.items()}
        for draw in range(draws)
    ]


if __name__ == "__main__":
    command.run(main)
