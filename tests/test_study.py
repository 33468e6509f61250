"""Studies: their description, and the runner with its processes."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from benchmarks import variance
from ifm_jax import config as configs
from ifm_jax.cli import demo
from ifm_jax.errors import RunError, UsageError
from ifm_jax.studies import Comparison, Study, findings, runner, statistics, study, worker
from tests import small

ROOT = pathlib.Path(__file__).resolve().parents[1]


def a_study(seeds=(0, 1), **fields) -> Study:
    """Two arms of four steps."""
    return Study(
        question="Is it so?",
        sources={"trifeature": small.config(steps=4, checkpoint_every=1, checkpoint_keep=1, **fields)},
        arms={"InfoNCE": {"ifm.objective": "infonce"}, "IFM": {"ifm.epsilon": {"trifeature": 0.2}}},
        seeds=seeds,
        comparisons=[Comparison("IFM", "InfoNCE", labels=("mean", "worst", "shape"), confirmatory=True)],
    )


# The description.


def test_runs_are_sources_arms_and_seeds():
    runs = a_study().runs()
    assert [(run.arm, run.seed) for run in runs] == [("InfoNCE", 0), ("IFM", 0), ("InfoNCE", 1), ("IFM", 1)]
    assert [run.config.ifm.objective for run in runs[:2]] == ["infonce", "ifm"]
    assert runs[1].config.ifm.epsilon == 0.2
    assert runs[1].directory == os.path.join("trifeature", "ifm", "seed0")
    assert len({run.config_sha256 for run in runs}) == 4


def test_what_decides_a_result_decides_its_hash():
    config, of = small.config(), study.config_sha256
    before = of(config)
    for name, value in (("log_every", 7), ("checkpoint_every", 9), ("eval.every", 1), ("data.workers", 3)):
        configs.set_field(config, name, value)
    assert of(config) == before
    assert of(configs.from_dict({})) == of(configs.from_dict({"ifm.epsilon": 0.1}))  # its default
    for name, value in (("steps", 5), ("seed", 1), ("ifm.epsilon", 0.3), ("optim.lr", 1.0), ("data.source", "array:x")):
        changed = configs.from_dict(configs.to_dict(config))
        configs.set_field(changed, name, value)
        assert of(changed) != before, name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {"a": {"ifm.epsilom": 1}}}, "arm 'a': there is no config field 'ifm.epsilom': did you mean"),
        ({"arms": {"a": {"ifm.epsilon": -1.0}}}, r"ifm\.epsilon=-1\.0: expected a number of at least 0"),
        ({"arms": {"a b": {}, "A-B": {}}}, "arms 'a b' and 'A-B' would share a directory"),
        ({"arms": {"": {}}}, "arm '': expected a name with letters or digits"),
        ({"arms": {"a": {"ifm.epsilon": {"digits": 1}}}}, "arm 'a': ifm.epsilon has no value for 'trifeature'"),
        ({"seeds": ()}, "a study without seeds"),
        ({"seeds": (1, 1)}, "expected different ones"),
        ({"comparisons": [Comparison("IFN", "InfoNCE")]}, "there is no arm 'IFN': did you mean 'IFM'"),
        ({"comparisons": [Comparison("IFM", "InfoNCE", sources=("x",))]}, "there is no source 'x'"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(changed, message):
    parts = vars(a_study()) | {"comparisons": []} | changed
    with pytest.raises(UsageError, match=message):
        Study(**parts)


def test_a_study_is_a_file_or_a_name(tmp_path):
    for path in sorted((ROOT / "configs" / "studies").glob("[a-z]*.py")):
        named = study.load(f"studies/{path.stem}")
        assert named.runs()
        assert [run.config_sha256 for run in study.load(path).runs()] == [run.config_sha256 for run in named.runs()]
    with pytest.raises(UsageError, match=r"has no function get_study\(\).*it has get_config\(\)"):
        study.load("trifeature")
    with pytest.raises(UsageError, match="--config=nope does not exist: expected a study, for example studies/confirm"):
        study.load("nope")
    (tmp_path / "x.py").write_text("def get_study():\n    return 1\n")
    with pytest.raises(UsageError, match=r"get_study\(\) returned 1, expected an ifm_jax\.studies\.study\.Study"):
        study.load(tmp_path / "x.py")


# The runner, with workers that only pretend.

PRETENDER = """
    import json, os, pathlib, sys
    order = json.loads(sys.stdin.readline())
    study = pathlib.Path(order["study"])
    directory, row = json.loads((study.parent / "rows.json").read_text())[f"{order['arm']} {order['config']['seed']}"]
    directory = study / directory
    with (directory / "begun").open("a") as begun:
        begun.write(f"{order['processors']}\\n")
    print("some words")
    if (directory / "fail").exists():
        sys.exit("no luck")
    if (study / "wait").exists():
        sys.stdin.read()  # until the study ends
        (directory / "saved").touch()
        sys.exit(143)
    (directory / "row.json").write_text(json.dumps(row))
"""


MADE = {
    **{"loss_clean": 1.0, "acc1": 2.0, "grad_norm": 3.0, "seconds": 4.0},
    **{"versions": {"jax": "1"}, "commit": "c", "device": "d", "date": "today"},
}


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """The directory of a study whose workers need no time; a file `wait` or `fail` changes what they do."""
    script, rows = tmp_path / "pretender.py", {}
    script.write_text(textwrap.dedent(PRETENDER))
    for run in a_study(seeds=(0, 1, 2)).runs():
        row = worker.describe(run) | {"steps": 4}
        readout = {"shape": 50.0 + run.seed + 2 * (run.arm == "IFM"), "color": 90.0}
        row |= {"readout": readout, "untrained": {"shape": 40.0, "color": 10.0}}
        row |= MADE
        rows[f"{run.arm} {run.seed}"] = (run.directory, row)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert worker.ROW == "row.json"
    monkeypatch.setattr(runner, "_COMMAND", (sys.executable, "-I", str(script)))
    return tmp_path / "study"


def test_every_run_is_done_once_and_more_seeds_add_to_a_study(pretend):
    said = []
    results = runner.run(a_study(), "mine", pretend, jobs=2, say=said.append)
    assert results == json.loads((pretend / "results.json").read_text()) == runner.read_results(pretend)
    assert [(row["arm"], row["seed"]) for row in results["rows"]] == [
        ("InfoNCE", 0),
        ("IFM", 0),
        ("InfoNCE", 1),
        ("IFM", 1),
    ]
    assert (results["study"], results["question"], results["runs"]) == ("mine", "Is it so?", 4)
    mean, worst, shape = results["comparisons"]
    assert (mean["mean"], worst["mean"], shape["mean"], shape["pairs"]) == (1.0, 2.0, 2.0, 2)
    assert said[0] == "4 runs: 1 source x 2 arms x 2 seeds; 0 done before, 2 at a time."
    assert said[-1].startswith("[4/4] trifeature  ")
    assert said[-1].endswith("all done")

    said.clear()
    assert len(runner.run(a_study(seeds=(0, 1, 2)), "mine", pretend, jobs=1, say=said.append)["rows"]) == 6
    assert said[0].endswith("4 done before, 1 at a time.")
    for begun in pretend.glob("trifeature/*/*/begun"):
        assert len(begun.read_text().splitlines()) == 1


def test_each_run_under_way_has_its_own_processor(pretend, monkeypatch):
    monkeypatch.setattr(runner, "_processors", lambda: [3, 5])
    runner.run(a_study(seeds=(0,)), "mine", pretend, jobs=2, say=lambda _: None)
    given = {path.read_text().strip() for path in pretend.glob("trifeature/*/*/begun")}
    assert given == {"[3]", "[5]"}


def test_a_failed_run_leaves_the_others_and_is_tried_again(pretend):
    broken = pretend / "trifeature" / "ifm" / "seed0"
    broken.mkdir(parents=True)
    (broken / "fail").touch()
    with pytest.raises(RunError, match=r"1 of 4 runs failed, the others are done; the first: .*seed0: no luck"):
        runner.run(a_study(), "mine", pretend, jobs=1, say=lambda _: None)
    assert len(runner.read_results(pretend)["rows"]) == 3
    (broken / "fail").unlink()
    assert len(runner.run(a_study(), "mine", pretend, jobs=1, say=lambda _: None)["rows"]) == 4


def test_a_worker_that_ends_at_once_is_a_failed_run(pretend, monkeypatch):
    monkeypatch.setattr(runner, "_COMMAND", (sys.executable, "-I", "-c", "raise SystemExit('out of luck')"))
    with pytest.raises(RunError, match=r"4 of 4 runs failed.*: out of luck"):
        runner.run(a_study(), "mine", pretend, jobs=2, say=lambda _: None)


def test_a_row_of_another_config_is_refused(pretend):
    runner.run(a_study(), "mine", pretend, jobs=2, say=lambda _: None)
    with pytest.raises(UsageError, match=r"row\.json has the row of .*seed0 with another config"):
        runner.run(a_study(optim__lr=0.5), "mine", pretend, say=lambda _: None)


def test_rows_alone_are_enough_to_add_to_a_study(pretend, tmp_path):
    """results.json has them, where the directories of the runs are gone."""
    runner.run(a_study(), "mine", pretend, jobs=2, say=lambda _: None)
    shutil.rmtree(pretend / "trifeature")
    said = []
    assert len(runner.run(a_study(seeds=(0, 1, 2)), "mine", pretend, say=said.append)["rows"]) == 6
    assert "4 done before" in said[0]
    assert not (pretend / "trifeature" / "ifm" / "seed0").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_study_once_its_runs_have_saved(pretend, number):
    pretend.mkdir()
    (pretend / "wait").touch()

    def send():
        until = time.monotonic() + 60
        while len(list(pretend.glob("trifeature/*/*/begun"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(runner.Stopped) as stopped:
        runner.run(a_study(), "mine", pretend, jobs=2, say=lambda _: None)
    thread.join()
    assert (stopped.value.signal, stopped.value.done, stopped.value.total) == (number, 0, 4)
    assert len(list(pretend.glob("trifeature/*/*/saved"))) == 2
    (pretend / "wait").unlink()
    assert len(runner.run(a_study(), "mine", pretend, jobs=2, say=lambda _: None)["rows"]) == 4


# The runner with its own workers.


@pytest.mark.slow
@pytest.mark.hosts
def test_a_study_that_is_killed_twice_ends_with_the_same_results(tmp_path):
    """The second killed study holds runs that go on, finished ones, and ones that have not begun."""
    (tmp_path / "mine.py").write_text(
        "from tests.test_study import a_study\n\n\ndef get_study():\n    return a_study()\n"
    )
    code = "from ifm_jax.cli import study; study.run()"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(directory):
        command = [sys.executable, "-c", code, f"--config={tmp_path / 'mine.py'}", f"--workdir={directory}", "--jobs=2"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill_when(process, happened):
        until = time.monotonic() + 200
        while not happened() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()

    process = start(whole)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert "worst" in said
    kill_when(start(killed), lambda: list(killed.glob("trifeature/*/*/checkpoints/*/commit_success.txt")))
    kill_when(start(killed), lambda: list(killed.glob("trifeature/*/*/row.json")))
    process = start(killed)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said

    def without_times(directory):
        results = json.loads((directory / "results.json").read_text())
        del results["date"]
        for row in results["rows"]:
            del row["date"], row["seconds"]
        return results

    assert without_times(killed) == without_times(whole)
    assert len(without_times(whole)["rows"]) == 4
    assert {path.name for path in whole.iterdir()} >= {"results.json", "results.md", "effects.png", "loss_error.png"}

    read = list(variance.read_again(killed, a_study().runs()[:1], draws=2))
    assert [(row["checkpoints"], row["draws"]) for row in read] == [(1, 1), (1, 2)]
    assert read[0]["readout"] == without_times(killed)["rows"][0]["readout"]  # the study's own draw
    assert read[1]["readout"] != read[0]["readout"]


# What the package's own studies have found.

OWN = sorted((ROOT / "docs" / "studies").glob("*/results.json"))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.parent.name)
def test_the_studies_that_are_reported(path):
    """Every row is of a run as the study's file has it, and the comparisons are those of the rows."""
    results, of = json.loads(path.read_text()), study.load(f"studies/{path.parent.name}")
    runs = {(run.source, run.arm, run.seed): run for run in of.runs()}
    assert results["runs"] == len(runs)
    rows = {(row["source"], row["arm"], row["seed"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    for key, row in rows.items():
        assert row.items() >= worker.describe(runs[key]).items()
        assert row["commit"]
        assert not row["commit"].endswith("+")  # of code that is committed
    assert statistics.compare(results["rows"], of.comparisons) == results["comparisons"]
    assert results["question"] == of.question


# Arms of the confirmation, in the tables of README and of docs/studies.md.
TOLD = {
    "before training": None,
    "InfoNCE": "InfoNCE",
    "InfoNCE, T = 0.07": "InfoNCE",
    "IFM 0.1": "IFM 0.1",
    "IFM, eps 0.1": "IFM 0.1",
    "placebo": "placebo",
    "placebo: InfoNCE, learning rate 1.4 times as high": "placebo",
    "T 0.05": "T 0.05",
    "InfoNCE, T = 0.05": "T 0.05",
    "beta 1": "beta 1",
    "hard negatives, beta 1": "beta 1",
}


@pytest.mark.parametrize("page", ["README.md", "docs/studies.md"])
def test_the_pages_tell_what_the_confirmation_found(page):
    results = json.loads((ROOT / "docs" / findings.STUDY / "results.json").read_text())
    text = (ROOT / page).read_text()
    (table,) = [
        part.splitlines()
        for part in text.split("\n\n")
        if "Trifeature: shape | texture | mean | digits: digit | texture | mean |" in part
    ]
    assert len(table) == 2 + 6
    for line in table[2:]:
        arm, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        expected = []
        for source, label in itertools.product(("trifeature", "digits"), ("first", "texture", "mean")):
            label = {"trifeature": "shape", "digits": "digit"}[source] if label == "first" else label
            rows = [row for row in results["rows"] if row["source"] == source]
            rows = [row for row in rows if row["arm"] == (TOLD[arm] or "InfoNCE")]
            values = [statistics.value(row, label, "readout" if TOLD[arm] else "untrained") for row in rows]
            mean, stderr = statistics.mean_and_stderr(values)
            expected.append(f"{mean:.1f}" + (f" ± {stderr:.1f}" if "±" in cells[0] else ""))
        assert cells == expected, arm
    words = " ".join(text.split())
    for a, b in (("IFM 0.1", "InfoNCE"), ("IFM 0.1", "placebo")):
        for source in ("trifeature", "digits"):
            found = findings.find(a, b, source, "mean")
            assert "{:.1f} to {:.1f}".format(*found["ci95"]) in words


def test_the_pages_tell_what_the_pilots_found():
    paths = [ROOT / f"docs/studies/pilot_{name}/results.json" for name in ("trifeature", "digits")]
    read = [json.loads(path.read_text()) for path in paths]
    assert [len(each["rows"]) for each in read] == [each["runs"] for each in read]
    text = (ROOT / "docs" / "studies.md").read_text()
    (table,) = [part for part in text.split("\n\n") if part.startswith("| arm | Trifeature: mean, worst | digits")]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(told) == 1 + len({row["arm"] for row in read[0]["rows"]})
    for arm, *cells in told:
        field = "untrained" if arm == "before training" else "readout"
        name = "T 0.07" if field == "untrained" else arm.replace("IFM", "eps")
        for cell, results in zip(cells, read, strict=True):
            rows = [row for row in results["rows"] if row["arm"] == name]
            values = [[statistics.value(row, label, field) for row in rows] for label in ("mean", "worst")]
            expected = ", ".join(f"{statistics.mean_and_stderr(each)[0]:.1f}" for each in values) if rows else ""
            assert cell == expected, arm


def test_the_pages_tell_what_ifm_adds_to_hard_negatives():
    results = json.loads((ROOT / "docs/studies/on_hard_negatives/results.json").read_text())
    text = (ROOT / "docs" / "studies.md").read_text().partition("## IFM on top of hard negatives")[2]
    tested = [each for each in results["comparisons"] if each["confirmatory"]]
    assert len(tested) == 4
    for each in tested:
        low, high = each["ci95"]
        assert f"{each['mean']:+.1f} ({low:.1f} to {high:.1f}), {each['positive']} of 16" in text


def test_the_demo_shows_the_confirmation_once_it_is_complete():
    results = json.loads((ROOT / "docs" / findings.STUDY / "results.json").read_text())
    complete = len(results["rows"]) == results["runs"]
    assert findings.read() == (results["comparisons"] if complete else [])


@pytest.mark.parametrize("complete", [False, True])
def test_the_demo_shows_each_difference_beside_the_studys(pretend, monkeypatch, capsys, complete):
    rows = []
    for run in study.load(findings.STUDY).runs():
        if run.source == "trifeature" and run.seed < 3 and run.arm in ("InfoNCE", "IFM 0.1"):
            readout = {"shape": 50.0 + run.seed * (run.arm != "InfoNCE"), "texture": 60.0, "color": 90.0}
            rows.append(worker.describe(run) | {"readout": readout, "untrained": readout, "steps": 4} | MADE)
    asked = [Comparison("IFM 0.1", "InfoNCE", labels=("mean", "worst", "shape", "texture", "color"))]
    monkeypatch.setattr(findings, "read", lambda: statistics.compare(rows, asked) if complete else [])
    one = [row for row in rows if row["seed"] == 2]
    results = {"question": "?", "study": "demo", "date": "", "device": "", "versions": {}, "commit": "c", "rows": one}
    made = results | {"comparisons": statistics.compare(one, asked)}
    monkeypatch.setattr(runner, "run", lambda *_, **__: made)
    pretend.mkdir()
    assert demo.main(demo.flags().parse([f"--workdir={pretend}"])) == 0
    said = capsys.readouterr().out
    (shape,) = [line for line in said.splitlines() if line.startswith("│ shape")]
    assert ("+2.0" in shape, "+1.0 [-1.5, +3.5], 3 pairs" in shape) == (True, complete)
    assert ("its column is empty" in said) is not complete


def test_a_rows_summary():
    records = [
        {"step": step, "loss_clean": loss, "acc1": 10.0 * loss, "grad_norm": loss, "images_per_sec": 32.0}
        for step, loss in ((5, 1.0), (10, 2.0), (19, 3.0), (20, 5.0))
    ]
    found = worker.summarize(records, batch_size=16)
    assert found == {"steps": 20, "loss_clean": 4.0, "acc1": 40.0, "grad_norm": 2.75, "seconds": 10.0}


def test_a_row_names_its_code():
    assert worker.commit() is None or len(worker.commit().rstrip("+")) == 40
    assert set(worker.environment()["versions"]) >= {"ifm_jax", "jax", "jaxlib", "scikit-learn"}
