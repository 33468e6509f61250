"""What makes a study's differences easier to see: further draws of the readout's images, and averaged weights.

    python -m benchmarks.variance --study=studies/NAME --workdir=DIR [--draws=3] [--checkpoints=3,6] [--json=FILE]

Reads the checkpoints of a finished study in DIR again, and takes its comparisons anew for each way of reading a run:

- with one draw of images for the readout, as the study did, and with the mean over several, of which no two share an
  image;
- from the last checkpoint, and from the mean of the weights and running averages of the last few.

For each: the standard deviation of a run, that of a pair's difference, the mean difference with its standard error, and
how many pairs would show a difference of one point in four studies of five (paired t test at 0.05).
"""

import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import joblib
import numpy as np
import scipy.stats
from absl import flags

from benchmarks import command, reporting
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import pretrained
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.readout import linear_readout
from ifm_jax.runs import checkpoint
from ifm_jax.runs.workdir import Workdir
from ifm_jax.studies import statistics as of_studies
from ifm_jax.studies import study
from ifm_jax.studies.study import MEAN, WORST, Comparison, Run

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
    try:
        averaged = [int(text) for text in _CHECKPOINTS.value]
    except ValueError:
        averaged = [0]
    if min(averaged, default=1) < 1:
        raise UsageError(f"--checkpoints={','.join(_CHECKPOINTS.value)}: expected whole numbers of at least 1")
    given = study.load(_STUDY.value)
    asked = [comparison for comparison in given.comparisons if MEAN in comparison.labels]
    if not asked:
        raise UsageError(f"--study={_STUDY.value} compares no means: expected a comparison with the label {MEAN!r}")
    arms = {arm for comparison in asked for arm in (comparison.a, comparison.b)}
    runs = [run for run in given.runs() if run.arm in arms]
    rows = []
    for row in read_again(pathlib.Path(_WORKDIR.value), runs, _DRAWS.value, averaged):
        rows.append(row)
        print(json.dumps(row), flush=True)
    table = compare(rows, asked)
    columns = {
        **{"label": "", "checkpoints": "d", "draws": "d", "run_sd": ".2f", "pair_sd": ".2f", "pairs": "d"},
        **{"mean": "+.2f", "stderr": ".2f", "pairs_for_one_point": "d"},
    }
    for each in dict.fromkeys((row["source"], row["comparison"]) for row in table):
        own = [row for row in table if (row["source"], row["comparison"]) == each]
        reporting.print_table(f"{each[0]}: {each[1]}, in points", own, columns)
    summary = {"study": _STUDY.value, "runs": len(runs), "draws": _DRAWS.value}
    made = reporting.report("variance", table, summary, ["scikit-learn"])
    reporting.write(made, _JSON.value)
    return 0


def read_again(
    directory: pathlib.Path, runs: Sequence[Run], draws: int, averaged: Sequence[int] = ()
) -> Iterator[dict[str, Any]]:
    """Yields rows as a study has them, one for each run and way of reading it.

    Args:
      directory: directory of the study.
      runs: the runs to read.
      draws: draws of the images, for the last checkpoint; averaged weights are read out with the study's own.
      averaged: numbers of checkpoints whose weights are averaged.

    Yields:
      `source`, `arm`, `seed`, `checkpoints` and `draws`, of which `readout` is the mean; label -> percent.

    Raises:
      UsageError: if a run has too few checkpoints, or its images cannot be drawn again.
    """
    most = max(averaged, default=1)
    kept = {run: checkpoint.steps(Workdir(directory / run.directory).checkpoints) for run in runs}
    for run, steps in kept.items():
        more_images(run.config, draws)  # refuses what is not drawn, before minutes are spent
        if len(steps) < most:
            have = study.number_of(len(steps), "checkpoint")
            raise UsageError(f"{directory / run.directory} has {have}: expected at least {most}; run the study first")
    compiled: dict[tuple[str, str], FrozenEncoder] = {}  # for each source and arm, which may have a network of its own
    for run, steps in kept.items():
        path = Workdir(directory / run.directory).checkpoints
        found = [pretrained.load(path / str(step)) for step in steps[: -most - 1 : -1]]
        encoder = compiled.setdefault((run.source, run.arm), found[0].frozen(jax.local_devices()[:1]))
        trees = [(each.snapshot.state.params, each.snapshot.state.batch_stats) for each in found]
        for count in dict.fromkeys((1, *averaged)):
            taken = encoder.holding(*jax.tree.map(_mean, *trees[:count]))
            drawn = readouts(taken, found[0].config, draws if count == 1 else 1)
            for several in range(1, len(drawn) + 1):
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
      `pairs_for_one_point`. In points; a single pair has a mean alone.
    """
    table = []
    ways = list(dict.fromkeys((row["checkpoints"], row["draws"]) for row in rows))
    for comparison, source in itertools.product(comparisons, dict.fromkeys(row["source"] for row in rows)):
        if comparison.sources and source not in comparison.sources:
            continue
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
    config = configs.from_dict(configs.to_dict(config))
    parameters = getattr(config.data, config.data.source)
    parameters.train_size, parameters.test_size = times * parameters.train_size, times * parameters.test_size
    return config


def readouts(frozen: FrozenEncoder, config: Config, draws: int) -> list[dict[str, float]]:
    """Returns label -> percent for each draw of the images, on all processors.

    Args:
      frozen: frozen backbone.
      config: config of its run; the first draw is the run's own.
      draws: number of draws.
    """
    config = more_images(config, draws)
    train, test = pretrained.labeled(config, "train"), pretrained.labeled(config, "test")
    features = extract(frozen, train), extract(frozen, test)
    tasks = [(draw, name) for draw in range(draws) for name in train.labels()]

    def given(draw: int, name: str) -> list[np.ndarray]:
        whole = (features[0], train.labels()[name], features[1], test.labels()[name])
        return [np.split(values, draws)[draw] for values in whole]

    found = joblib.Parallel(os.cpu_count())(joblib.delayed(linear_readout)(*given(*task)) for task in tasks)
    accuracy = dict(zip(tasks, found, strict=True))
    return [{name: accuracy[draw, name] for name in train.labels()} for draw in range(draws)]


if __name__ == "__main__":
    _STUDY = flags.DEFINE_string("study", None, "File with the study, or a study of the package.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.")
    _DRAWS = flags.DEFINE_integer("draws", 3, "Draws of the images for the readout, the study's own among them.")
    _CHECKPOINTS = flags.DEFINE_list("checkpoints", [], "Numbers of checkpoints to average, such as 3,6.")
    _JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
    command.run(main)
