"""The benchmark of variance: what a study's differences would be if its runs were read otherwise."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from benchmarks import variance
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.studies import Comparison

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_pairs_that_are_needed_find_a_difference_four_times_of_five(spread):
    pairs, rng = variance.pairs_needed(spread), np.random.default_rng(0)
    bounds = {3: 3.182, 4: 2.776, 8: 2.306, 9: 2.262, 32: 2.037, 33: 2.035}  # of t, from a printed table
    shares = []
    for count in (pairs, pairs - 1):
        found = rng.normal(1.0, spread, (40_000, count))
        t = found.mean(1) / (found.std(1, ddof=1) / count**0.5)
        shares.append(np.mean(np.abs(t) > bounds[count - 1]))
    assert shares[0] > 0.795
    assert shares[1] < 0.805


def test_each_way_of_reading_has_its_differences():
    shape = {  # (arm, seed) -> of 1 and of 2 draws
        **{("a", 0): (50.0, 51.0), ("a", 1): (60.0, 59.0)},
        **{("b", 0): (52.0, 54.0), ("b", 1): (66.0, 62.0)},
    }
    rows = [
        {"source": "s", "arm": arm, "seed": seed, "checkpoints": 1, "draws": draws + 1, "readout": {"shape": value}}
        for (arm, seed), values in shape.items()
        for draws, value in enumerate(values)
    ]
    table = variance.compare(rows, [Comparison("b", "a")])
    assert [(row["label"], row["draws"]) for row in table] == list(
        itertools.product(("shape", "mean", "worst"), (1, 2))
    )
    one, two = table[:2]
    assert (one["mean"], two["mean"]) == (4.0, 3.0)
    assert (one["pair_sd"], two["pair_sd"]) == (pytest.approx(8**0.5), 0.0)
    assert (one["run_sd"], two["run_sd"]) == (pytest.approx(50**0.5), pytest.approx(32**0.5))
    assert two["pairs_for_one_point"] == 2


def test_the_page_tells_what_was_measured():
    results = json.loads((ROOT / "docs/studies/pilot_variance/variance.json").read_text())["results"]
    rows = {(row["comparison"], row["checkpoints"], row["draws"]): row for row in results if row["label"] == "mean"}
    text = (ROOT / "docs/studies.md").read_text().partition("### What makes a difference easier to see")[2]
    (table,) = [part.splitlines() for part in text.split("\n\n") if part.startswith("| | of a run |")]
    adamw, sgd = "AdamW, eps 0.1 - AdamW", "SGD, eps 0.1 - SGD"
    ways = [(adamw, 1, 1), (adamw, 1, 2), (adamw, 1, 3), (adamw, 3, 1), (adamw, 6, 1), (sgd, 1, 1), (sgd, 1, 3)]
    longer = json.loads((ROOT / "docs/studies/pilot_length/results.json").read_text())["rows"]
    asked = [Comparison("T 0.07, eps 0.1", "T 0.07")]
    read = variance.compare([row | {"checkpoints": 1, "draws": 1} for row in longer], asked)
    expected = [rows[way] for way in ways] + [row for row in read if row["label"] == "mean"]
    for line, row in zip(table[2:], expected, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
        assert cells == [f"{row['run_sd']:.1f}", f"{row['pair_sd']:.1f}", str(row["pairs_for_one_point"])], line


def test_only_drawn_images_are_drawn_again():
    config = Config()
    config.data.source = "digits"
    assert variance.more_images(config, 3).data.digits.test_size == 3 * Config().data.digits.test_size
    config.data.source = "folder:x"
    with pytest.raises(UsageError, match="'folder:x': expected one of trifeature, digits"):
        variance.more_images(config, 3)
