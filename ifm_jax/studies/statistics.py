"""The statistics of a study: differences between two arms in pairs of runs of the same seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from ifm_jax.studies.study import MEAN, WORST, Comparison

Rows = Sequence[Mapping[str, Any]]  # a row for each run, as in results.json


def value(row: Mapping[str, Any], label: str, field: str = "readout") -> float | None:
    """Returns a run's readout of a label in percent, or a summary of all; None if the run does not have it.

    Args:
      row: the run.
      label: a label of the source, "mean" (over its labels) or "worst" (the lowest of them).
      field: "readout", or "untrained" for that of the network before training.
    """
    readouts = row.get(field) or {}
    if label in (MEAN, WORST):
        values = list(readouts.values())
        return (float(np.mean(values)) if label == MEAN else float(min(values))) if values else None
    return readouts.get(label)


def differences(rows: Rows, source: str, a: str, b: str, label: str) -> dict[int, float]:
    """Returns seed -> readout of arm `a` less that of arm `b`, in points, for the seeds that both arms have.

    Args:
      rows: the runs of the study.
      source: name of a source.
      a: name of an arm.
      b: name of the arm that it is compared with.
      label: what is compared, as for `value`.

    Raises:
      ValueError: if an arm has two runs of the same seed.
    """
    found: dict[str, dict[int, float]] = {a: {}, b: {}}
    for row in rows:
        if row["source"] != source or row["arm"] not in found:
            continue
        of_arm, seed = found[row["arm"]], row["seed"]
        readout = value(row, label)
        if seed in of_arm:
            raise ValueError(
                f"source {source!r}, arm {row['arm']!r}: two rows of seed {seed}: expected one; remove the other"
            )
        if readout is not None:
            of_arm[seed] = readout
    return {seed: found[a][seed] - found[b][seed] for seed in sorted(found[a].keys() & found[b].keys())}


def compare(rows: Rows, comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Compares arms in pairs of runs of the same seed and source.

    The interval and `p` are those of the paired t test. A single pair has neither. If all pairs differ by the same
    amount, the interval has no width, and `p` is 1 for an amount of 0 and 0 for any other.

    Args:
      rows: the runs of the study; sources are taken in the order of their first rows.
      comparisons: the questions.

    Returns:
      A dict for each comparison, source and label that has a pair: `name`, `source`, `a`, `b`, `label`; `pairs`, their
      number; `mean` difference, its standard error `stderr` and its 95 % interval `ci95`, a list of two, in points;
      `positive` and `negative`, the numbers of pairs above and below 0; `p` of the paired t test and `p_sign` of the
      exact sign test without ties, both two-sided; `confirmatory`; `p_holm`, `p` after the correction of Holm (1979)
      over all entries that are confirmatory, and None for the others. None also stands for what one pair does not have.

    Raises:
      ValueError: if an arm has two runs of the same seed.
    """
    sources = list(dict.fromkeys(row["source"] for row in rows))
    found: list[dict[str, Any]] = []
    for comparison in comparisons:
        for source in sources:
            if comparison.sources and source not in comparison.sources:
                continue
            for label in comparison.labels:
                pairs = differences(rows, source, comparison.a, comparison.b, label)
                if pairs:
                    entry: dict[str, Any] = {
                        "name": comparison.name,
                        "source": source,
                        "a": comparison.a,
                        "b": comparison.b,
                        "label": label,
                        **_paired(np.array(list(pairs.values()))),
                        "confirmatory": comparison.confirmatory,
                        "p_holm": None,
                    }
                    found.append(entry)
    confirmatory = [entry for entry in found if entry["confirmatory"]]
    # A question with a single pair has no p, but was asked: it counts among the tests, with p = 1.
    corrected = holm([1.0 if entry["p"] is None else entry["p"] for entry in confirmatory])
    for entry, p in zip(confirmatory, corrected, strict=True):
        entry["p_holm"] = None if entry["p"] is None else p
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p values after the step-down correction of Holm (1979) for several tests, in the given order.

    The smallest of m values is multiplied by m, the next by m - 1 and so on; none becomes smaller than the one before
    it, or greater than 1.
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def confirmatory_first(comparisons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the entries in their order, but those of confirmatory comparisons before all others."""
    return sorted(comparisons, key=lambda entry: not entry["confirmatory"])


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, which is None for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _paired(pairs: np.ndarray) -> dict[str, Any]:
    """Returns the fields of an entry of `compare` that follow from the differences, `(pairs,)`."""
    mean, stderr = mean_and_stderr(pairs.tolist())
    positive, negative = int(np.sum(pairs > 0)), int(np.sum(pairs < 0))
    ci95 = p = None
    if stderr is not None:
        freedom = len(pairs) - 1
        reach = float(scipy.stats.t.ppf(0.975, freedom)) * stderr
        ci95 = [mean - reach, mean + reach]
        p = 1.0 if mean == 0 else 0.0
        if stderr > 0:
            p = 2 * float(scipy.stats.t.sf(abs(mean) / stderr, freedom))
    decided = positive + negative
    return {
        "pairs": len(pairs),
        "mean": mean,
        "stderr": stderr,
        "ci95": ci95,
        "positive": positive,
        "negative": negative,
        "p": p,
        "p_sign": float(scipy.stats.binomtest(positive, decided).pvalue) if decided else 1.0,
    }
