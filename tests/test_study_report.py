"""The statistics, the report and the pictures of a study, on made-up rows."""

import io
import json

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import rich.console
import scipy.stats

from ifm_jax.runs.curves import BLUE
from ifm_jax.studies import pictures, report, statistics
from ifm_jax.studies.study import Comparison

ARMS = {
    "InfoNCE": {},
    "IFM 0.1": {"objective": "ifm"},
    "IFM | 0.2": {"objective": "ifm", "epsilon": 0.2},
    "temperature 0.2": {"temperature": 0.2},
    "beta 1": {"beta": 1.0},
    "placebo [lr]": {"lr": 0.0035},
}
LABELS = {"trifeature": ("shape", "texture", "color"), "digits": ("digit", "color")}
COMPARISONS = (
    Comparison("beta 1", "InfoNCE", labels=("mean", "shape", "digit")),
    Comparison("IFM 0.1", "InfoNCE", confirmatory=True),
    Comparison("temperature 0.2", "InfoNCE", labels=("color",), sources=("digits",), confirmatory=True),
)


def make_row(source, arm, seed, readout, **fields):
    defaults = {
        "method": "simclr",
        "objective": "infonce",
        "epsilon": 0.1,
        "alpha": 1.0,
        "temperature": 0.07,
        "beta": 0.0,
        "lr": 0.003,
        "batch_size": 64,
        "queue_size": None,
        "optimizer": "adamw",
        "steps": 768,
        "config_sha256": "0" * 64,
        "loss_clean": 0.4 + 0.01 * seed,
        "acc1": 87.0,
        "grad_norm": 1.5,
        "untrained": dict.fromkeys(readout, 30.0 + seed),
        "commit": "abc1234",
        "versions": {"jax": "0.10.2"},
        "seconds": 75.0,
    }
    return {"source": source, "arm": arm, "seed": seed, "readout": readout} | defaults | fields


def make_rows(seeds=5):
    rng = np.random.default_rng(0)
    return [
        make_row(source, arm, seed, {label: float(rng.uniform(60, 90)) for label in labels}, **fields)
        for seed in range(seeds)
        for source, labels in LABELS.items()
        for arm, fields in ARMS.items()
    ]


def make_results(rows):
    return {
        "study": "small",
        "question": "Does IFM raise the mean?",
        "date": "2026-11-27",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "commit": "abc1234",
        "rows": rows,
        "comparisons": statistics.compare(rows, COMPARISONS),
    }


@pytest.fixture(scope="module")
def results():
    return make_results(make_rows())


def make_pairs(differences, label="shape"):
    """Returns rows of arms a and b whose readouts differ by these amounts; an amount of None leaves out arm b."""
    rows = []
    for seed, difference in enumerate(differences):
        rows.append(make_row("s", "a", seed, {label: 50.0 + (difference or 0.0)}))
        if difference is not None:
            rows.append(make_row("s", "b", seed, {label: 50.0}))
    return rows


def test_statistics_are_scipys(results):
    """Each entry is recomputed from the rows, pair by pair, in the order of the comparisons."""
    expected = []
    for comparison in COMPARISONS:
        for source in LABELS:
            for label in comparison.labels:
                if source not in (comparison.sources or LABELS) or label not in ("mean", "worst", *LABELS[source]):
                    continue
                sides = []
                for arm in (comparison.a, comparison.b):
                    runs = [row for row in results["rows"] if (row["source"], row["arm"]) == (source, arm)]
                    readouts = [list(row["readout"].values()) for row in runs]
                    summary = {"mean": np.mean, "worst": np.min}.get(label)
                    sides.append(
                        [summary(each) for each in readouts] if summary else [r["readout"][label] for r in runs]
                    )
                test = scipy.stats.ttest_rel(*sides)
                interval = test.confidence_interval(0.95)
                difference = np.subtract(*sides)
                wins = int(np.sum(difference > 0))
                sign = scipy.stats.binomtest(wins, len(difference)).pvalue
                numbers = [np.mean(difference), scipy.stats.sem(difference), *interval, test.pvalue, sign]
                expected.append(
                    (comparison.name, source, label, comparison.confirmatory, len(difference), wins, numbers)
                )
    found = results["comparisons"]
    assert len(found) == len(expected) == 4 + 4 + 1  # no digit in trifeature, no shape in digits
    for entry, (name, source, label, confirmatory, pairs, wins, numbers) in zip(found, expected, strict=True):
        assert (entry["name"], entry["source"], entry["label"]) == (name, source, label)
        assert (entry["confirmatory"], entry["pairs"], entry["positive"]) == (confirmatory, pairs, wins)
        assert entry["negative"] == pairs - wins
        ours = [entry["mean"], entry["stderr"], *entry["ci95"], entry["p"], entry["p_sign"]]
        np.testing.assert_allclose(ours, numbers, rtol=1e-10, atol=1e-12)


def test_holm_by_hand():
    # In order: 0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.04 x 1, raised to the one before it.
    np.testing.assert_allclose(statistics.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06], rtol=1e-12)
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_counts_the_confirmatory_entries_of_all_sources(results):
    confirmatory = [entry for entry in results["comparisons"] if entry["confirmatory"]]
    assert len(confirmatory) == 5
    assert [entry["p_holm"] for entry in confirmatory] == statistics.holm([entry["p"] for entry in confirmatory])
    assert min(entry["p_holm"] for entry in confirmatory) == min(1.0, 5 * min(entry["p"] for entry in confirmatory))
    assert all(entry["p_holm"] is None for entry in results["comparisons"] if not entry["confirmatory"])


def test_only_pairs_count():
    """Seeds that one arm lacks are left out, ties are neither wins nor losses, and the order of rows is no matter."""
    rows = make_pairs([1.0, None, 2.0, 0.0, -1.0, 4.0])
    (entry,) = statistics.compare(rows[::-1], [Comparison("a", "b", labels=("shape",))])
    assert (entry["pairs"], entry["positive"], entry["negative"], entry["mean"]) == (5, 3, 1, 1.2)
    assert entry["p_sign"] == 2 * (4 + 1) / 2**4
    assert statistics.differences(rows, "s", "a", "b", "shape") == {0: 1.0, 2: 2.0, 3: 0.0, 4: -1.0, 5: 4.0}


def test_few_or_equal_pairs():
    question = [Comparison("a", "b", labels=("shape",), confirmatory=True)]
    assert statistics.compare(make_pairs([None, None]), question) == []
    assert statistics.compare([], question) == []
    (one,) = statistics.compare(make_pairs([2.0]), question)
    assert (one["pairs"], one["mean"], one["stderr"], one["ci95"], one["p"], one["p_holm"]) == (
        1,
        2,
        None,
        None,
        None,
        None,
    )
    (same,) = statistics.compare(make_pairs([2.0, 2.0, 2.0]), question)
    assert (same["stderr"], same["ci95"], same["p"], same["p_sign"]) == (0, [2, 2], 0, 0.25)
    (zero,) = statistics.compare(make_pairs([0.0, 0.0]), question)
    assert (zero["ci95"], zero["p"], zero["p_sign"], zero["p_holm"]) == ([0, 0], 1, 1, 1)


def test_two_rows_of_a_seed_are_refused():
    rows = make_pairs([1.0, 2.0])
    with pytest.raises(ValueError, match=r"source 's', arm 'a': two rows of seed 1: expected one"):
        statistics.compare([*rows, rows[2]], [Comparison("a", "b", labels=("shape",))])


def test_comparisons_survive_json(results):
    assert json.loads(json.dumps(results["comparisons"], allow_nan=False)) == results["comparisons"]


def test_markdown_leaves_nothing_out(results):
    rows = [row for row in results["rows"] if (row["arm"], row["seed"]) != ("beta 1", 2)]
    text = report.markdown(make_results(rows))
    assert f"{len(rows)} runs: 2 sources (trifeature; digits), 6 arms" in text
    assert "5 seeds (0 to 4). 2 of 60 combinations have no run." in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for source, labels in LABELS.items():
        head, _, untrained, *arms = text.split(f"### {source}\n\n")[1].split("\n\n")[0].splitlines()
        assert head == f"| arm | runs | {' | '.join(labels)} | mean | worst | loss | acc1 | gradient norm |"
        assert untrained.startswith("| untrained network | - | 32.0 ± 0.7 |")
        counts = {line.split(" | ")[0]: int(line.split(" | ")[1]) for line in arms}
        assert counts == {"| " + arm.replace("|", r"\|"): 4 if arm == "beta 1" else 5 for arm in ARMS}
    shape = [row["readout"]["shape"] for row in rows if (row["source"], row["arm"]) == ("trifeature", "InfoNCE")]
    assert f"| InfoNCE | 5 | {np.mean(shape):.1f} ± {scipy.stats.sem(shape):.1f} | " in text
    names = [line.split(" | ")[0].strip("| ") for line in tables if " - InfoNCE" in line]
    assert names == ["**IFM 0.1 - InfoNCE**"] * 4 + ["**temperature 0.2 - InfoNCE**"] + ["beta 1 - InfoNCE"] * 4


def test_settings_that_play_no_part_are_not_shown(results):
    section = report.markdown(results).split("### digits\n")[1]
    assert "All arms: method simclr, optimizer adamw, batch size 64, steps 768." in section
    assert "| arm | objective | epsilon | alpha | temperature | beta | learning rate |" in section
    assert "| InfoNCE | infonce | - | - | 0.07 | 0 | 0.003 |" in section
    assert r"| IFM \| 0.2 | ifm | 0.2 | 1 | 0.07 | 0 | 0.003 |" in section


def test_made_with_names_the_commits_of_the_runs(results):
    assert report.markdown(results).endswith("2026-11-27, on cpu, with jax 0.10.2, at commit abc1234.\n")
    rows = [row | {"commit": "0ld"} if row["seed"] == 0 else row for row in results["rows"]]
    assert "with jax 0.10.2, at the commits 0ld (12 runs), abc1234 (48 runs)." in report.markdown(
        results | {"rows": rows}
    )


def test_no_run_is_reported(tmp_path):
    results = make_results([]) | {"versions": None}
    report.write(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert "No run is finished yet." in (tmp_path / "results.md").read_text()


def test_one_run_is_reported():
    rows = [make_row("digits", "InfoNCE", 7, {"digit": 80.0})]
    text = report.markdown(make_results(rows))
    assert "1 run: 1 source (digits), 1 arm (InfoNCE), 1 seed (7)." in text
    assert "| InfoNCE | 1 | 80.0 | 80.0 | 80.0 | 0.470 | 87.0 | 1.500 |" in text
    assert "## Comparisons\n\nNo two arms have a run of the same seed" in text


def test_the_printed_tables_name_every_arm_and_comparison(results):
    console = rich.console.Console(file=io.StringIO(), width=80)
    report.print_report(results, console)
    text = console.file.getvalue()
    assert text.startswith("60 runs")
    for name in ("untrained", *ARMS):
        assert text.count(name) >= 2, name
    assert text.count("acc1") == 2  # no column is cut at this width
    assert text.count("Holm p") == 2
    for entry in results["comparisons"]:
        assert "{:+.2f} to {:+.2f}".format(*entry["ci95"]) in text


def test_series_join_arms_that_differ_in_one_axis_only(results):
    rows = [row for row in results["rows"] if row["source"] == "digits"]
    found = {series.axis: series for series in pictures.find_series(rows)}
    points = {
        axis: {x: {row["arm"] for row in runs} for x, runs in series.points.items()} for axis, series in found.items()
    }
    assert points == {
        "temperature": {0.07: {"InfoNCE"}, 0.2: {"temperature 0.2"}},
        "beta": {0.0: {"InfoNCE"}, 1.0: {"beta 1"}},
        "epsilon": {0.0: {"InfoNCE"}, 0.1: {"IFM 0.1"}, 0.2: {"IFM | 0.2"}},
    }
    assert all(len(runs) == 5 for series in found.values() for runs in series.points.values())


def test_infonce_is_where_every_series_of_ifm_begins():
    fields = [
        {},
        {"objective": "ifm", "alpha": 1.0},
        {"objective": "ifm", "alpha": 0.5},
        {"objective": "ifm_only", "alpha": 0.5},
        {"objective": "ifm_only", "alpha": 1.0, "epsilon": 0.2},
        {"objective": "ifm", "queue_size": 64, "method": "moco"},
    ]
    rows = [make_row("s", str(number), 0, {"shape": 50.0}, **each) for number, each in enumerate(fields)]
    found = {(series.objective, series.alpha): list(series.points) for series in pictures.find_series(rows)}
    assert found == {("ifm", 1.0): [0.0, 0.1], ("ifm", 0.5): [0.0, 0.1], ("ifm_only", None): [0.0, 0.1, 0.2]}


def test_settings_of_one_panel_share_a_row():
    rows = [
        make_row("s", f"{size} {number}", 0, {"shape": 50.0}, batch_size=size, **fields)
        for size in (64, 128, 256, 512, 1024)
        for number, fields in enumerate([{}, {"objective": "ifm"}, {"temperature": 0.3}][: 3 if size == 64 else 2])
    ]
    lines, columns = pictures._lines_of_panels(pictures.find_series(rows))
    found = [(row, line[0][0].setting["batch_size"], len(line)) for row, line in lines]
    assert (found, columns) == ([(0, 64, 2), (0, 128, 1), (1, 256, 1), (1, 512, 1), (1, 1024, 1)], 3)


def test_an_interval_says_on_which_side_of_0_it_ends():
    entry = {"mean": 1.0, "ci95": [-0.03, 2.04], "positive": 4, "pairs": 4}
    assert pictures._numbers(entry) == "+1.0 [−0.0, +2.0]  4/4"


@pytest.mark.slow
def test_pictures_are_written_where_there_is_something_to_draw(tmp_path):
    results = make_results([row for row in make_rows(seeds=2) if row["source"] == "digits"])
    report.write(results, tmp_path)
    drawn = ["effects.png", "loss_error.png", "summary.png", "trade_offs.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*drawn, "results.md"])
    text = (tmp_path / "results.md").read_text()
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
        pixels = matplotlib.image.imread(tmp_path / name)[..., :3]
        above = pixels[: len(pixels) // 2].reshape(-1, 3)  # the legend is below
        near = np.abs(above - matplotlib.colors.to_rgb(BLUE)) < 0.16  # as some marks are pale
        assert near.all(axis=-1).any(), f"{name} shows no data"
    # Written again with a single arm: nothing varies, and nothing can be compared.
    report.write(make_results([row for row in results["rows"] if row["arm"] == "InfoNCE"]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss_error.png", "results.md"]
    assert "effects.png" not in (tmp_path / "results.md").read_text()
