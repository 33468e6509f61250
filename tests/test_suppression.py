"""Readouts of every label, method by method, and evaluation while pre-training."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from ifm_jax import assembly
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate, pretrained, suppression
from ifm_jax.evaluation.online import OnlineEvaluation, erased
from ifm_jax.evaluation.suppression import Readouts
from ifm_jax.runs import metrics_log, training
from ifm_jax.runs.health import Health
from ifm_jax.runs.workdir import Workdir
from ifm_jax.torch_interop import writing
from tests import small


@pytest.fixture(autouse=True, scope="module")
def light():
    with small.light():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that is evaluated twice while it trains, and copies that pass for another method and another seed."""
    root = tmp_path_factory.mktemp("runs")
    config = small.config(eval__every=1)
    training.train(config, root / "ifm0", devices=jax.devices()[:1], quiet=True)
    for name, seed in (("moco0", 0), ("moco1", 1), ("ifm1", 1)):
        shutil.copytree(root / "ifm0", root / name)
        config = small.config(eval__every=1, seed=seed, ifm__method=name[:-1])
        text = json.dumps(configs.to_dict(config))
        for checkpoint in (root / name / "checkpoints").iterdir():  # whose config decides; as one without checksums
            (checkpoint / "config" / "metadata").write_text(text)
            shutil.rmtree(checkpoint / "checksums")
        (root / name / "config.json").write_text(text)
    return root


@pytest.mark.slow
def test_an_evaluation_now_and_then(runs):
    """At the end of each of two epochs, with no trace in anything else."""
    records = metrics_log.read(runs / "ifm0" / "metrics.jsonl")
    evaluated = [record for record in records if "knn" in record]
    assert [record["step"] for record in evaluated] == [4, 8]
    for record in evaluated:
        for kind in ("knn", "linear"):
            each = [record[f"{kind}/{label}"] for label in ("shape", "texture", "color")]
            assert record[kind] == pytest.approx(np.mean(each))
            assert all(value * 32 / 100 == pytest.approx(round(value * 32 / 100)) for value in each)
        assert 1 <= record["effective_rank"] <= 32
    training.train(small.config(), runs.parent / "plain", devices=jax.devices()[:1], quiet=True)
    extra = set(evaluated[0]) - set(records[0])
    with_it = [{name: value for name, value in record.items() if name not in extra} for record in records]
    without = metrics_log.read(runs.parent / "plain" / "metrics.jsonl")
    assert small.without_speed(with_it) == small.without_speed(without)


@pytest.mark.slow
def test_evaluation_compiles_once_and_looks_at_a_part(runs):
    config = assembly.resolve(small.config(eval__images=20))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    evaluation = OnlineEvaluation(config, mesh)
    state = jax.jit(assembly.state_creator(config), out_shardings=jax.NamedSharding(mesh, jax.P()))()
    first = evaluation(state)
    with jax.log_compiles(False):
        count = evaluation._frozen._of_images._cache_size()
        assert evaluation(state) == first
        assert evaluation._frozen._of_images._cache_size() == count
    assert first["knn/shape"] * 20 / 100 == pytest.approx(round(first["knn/shape"] * 20 / 100))


def before_training(workdir):
    return json.loads((workdir / "before_training.json").read_text())


@pytest.mark.slow
def test_gains_count_from_the_network_before_training(runs):
    config = assembly.resolve(small.config())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    state = jax.jit(assembly.state_creator(config), out_shardings=jax.NamedSharding(mesh, jax.P()))()
    evaluation = OnlineEvaluation(config, mesh)
    before = before_training(runs / "ifm0")
    assert before == evaluation.readouts(state)
    for record in metrics_log.read(runs / "ifm0" / "metrics.jsonl"):
        assert ("gain" in record) == ("linear" in record)
        if "gain" in record:
            for gain, kind in (("gain", "linear"), ("knn_gain", "knn")):
                each = [record[f"{kind}/{label}"] - before[f"{kind}/{label}"] for label in evaluation.labels]
                assert [record[f"{gain}/{label}"] for label in evaluation.labels] == each
                assert record[gain] == pytest.approx(np.mean(each))

    config.data.label = "texture"  # a single label has the same gains under shorter names
    single = OnlineEvaluation(config, mesh)
    single.before = before | {"linear/texture": 100.0}
    found = single(state)
    assert found["gain"] == before["linear/texture"] - 100
    assert found["knn_gain"] == 0
    assert found["erased"] == ["texture"]
    assert set(found) == {"knn", "linear", "effective_rank", "gain", "knn_gain", "erased"}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_gains(runs, tmp_path):
    """Those of step 4 count from the initial state made anew, those of step 8 from the file."""
    for steps in (3, 5, 8):
        training.train(small.config(eval__every=1, steps=steps), tmp_path, devices=jax.devices()[:1], quiet=True)
        if steps == 3:
            (tmp_path / "before_training.json").unlink()
    ours, theirs = (small.without_speed(metrics_log.read(at / "metrics.jsonl")) for at in (tmp_path, runs / "ifm0"))
    assert ours == theirs
    assert before_training(tmp_path) == before_training(runs / "ifm0")


@pytest.mark.slow
def test_with_init_from_gains_count_from_its_weights(runs, tmp_path, capsys, monkeypatch):
    """And features that training erases are warned of once, not again by a process that resumes the run."""
    monkeypatch.setattr("ifm_jax.evaluation.online.erased", lambda before, now, labels: True)
    given, devices = {"eval__every": 1, "init_from": str(runs / "ifm0"), "checkpoint_every": 100}, jax.devices()[:1]
    training.train(small.config(**given, steps=4), tmp_path, devices=devices)
    last = metrics_log.read(runs / "ifm0" / "metrics.jsonl")[-1]
    before = before_training(tmp_path)
    labels = ["shape", "texture", "color"]
    assert [before[f"linear/{label}"] for label in labels] == [last[f"linear/{label}"] for label in labels]
    said = capsys.readouterr().out
    assert f"a linear readout of the frozen features finds shape {last['linear/shape']:.1f} %, texture" in said
    warnings = [f"Warning: training has erased {label}, in whole or in part" for label in labels]
    assert [said.count(warning) for warning in warnings] == [1, 1, 1]
    training.train(small.config(**given), tmp_path, devices=devices)
    assert "Warning: training has erased" not in capsys.readouterr().out
    records = metrics_log.read(tmp_path / "metrics.jsonl")
    assert {record["step"]: record["erased"] for record in records if "erased" in record} == {4: labels, 8: labels}


def test_without_the_weights_of_init_from_there_are_no_gains(tmp_path):
    """A resumed run does not read them again, and the untrained network is not the one it started from."""
    evaluate = types.SimpleNamespace(labels=["shape"], before=None, readouts=None)
    evaluation = training._Evaluation(evaluate, "", init_from="elsewhere")
    said = evaluation.note_before(types.SimpleNamespace(step=3), Workdir(tmp_path), lambda: None)
    assert "before_training.json is missing or lacks a label, and init_from is not read again" in said[0]
    assert evaluate.before is None


def test_a_damaged_file_of_readouts_before_training_is_a_mistake(tmp_path):
    names = ["linear/shape"]
    assert training._read_before(Workdir(tmp_path), names) is None
    for text, expected in (("{", "cannot be read"), ('{"linear/shape": "x"}', "is 'x', expected percent")):
        (tmp_path / "before_training.json").write_text(text)
        with pytest.raises(UsageError, match=f"{expected}.*delete it"):
            training._read_before(Workdir(tmp_path), names)
    (tmp_path / "before_training.json").write_text('{"linear/color": 1.0}')  # another data.label
    assert training._read_before(Workdir(tmp_path), names) is None


def test_when_a_feature_is_erased():
    labels = np.repeat(np.arange(10), 200)  # chance is 10 %, a standard error about 1 point
    assert erased(24.8, 18.1, labels)
    assert not erased(24.8, 22.8, labels)  # two points may be chance
    assert not erased(24.8, 30.0, labels)
    assert not erased(11.0, 6.0, labels)  # there was nothing to erase
    assert not erased(100.0, 99.0, labels)  # significant, but the feature is there
    assert erased(100.0, 80.0, labels)
    assert not erased(24.8, 18.1, np.repeat(np.arange(10), 10))  # too few images to tell
    skewed = np.repeat([0, 1], [1500, 500])  # always guessing 0 is right in 75 %
    assert not erased(75.5, 70.0, skewed)
    assert erased(85.0, 80.0, skewed)


def test_erased_features_are_warned_of_once():
    def record(step, *erased, **readouts):
        return {"step": step, "epoch": 1.0, "loss_clean": 1.0, "acc1": 50.0, **readouts, "erased": list(erased)}

    health = Health(64, 1000, queue=False, full_step=0, remedy="More epochs may bring it back.")
    health.recall([record(1, "color", **{"linear": 50.0, "gain": -5.0, "linear/color": 50.0, "gain/color": -1.0})])
    readouts = {"linear": 30.0, "gain": 5.0, "linear/texture": 18.1, "gain/texture": -6.7}
    assert health.watch(record(2, "color", "texture", **readouts)) == [
        "Warning: training has erased texture, in whole or in part: a linear readout finds 24.8 % before training, "
        "18.1 % after step 2. More epochs may bring it back."
    ]
    assert health.watch(record(3, "color", "texture", **readouts)) == []
    single = Health(64, 1000, queue=False, full_step=0)
    assert "finds 25.0 % before training, 30.0 %" in single.watch(record(2, "class", linear=30.0, gain=5.0))[0]


def test_the_remedy_names_what_the_run_can_change():
    config = assembly.resolve(small.config(ifm__objective="infonce", method="simclr"))
    remedy = "A lower simclr.temperature (now 0.5), more epochs or IFM may bring it back; see docs/evaluation.md."
    assert training._remedy_for_features(config) == remedy
    assert "(now 0.2) or more epochs may" in training._remedy_for_features(assembly.resolve(small.config()))


@pytest.mark.slow
def test_methods_are_compared_over_seeds(runs, tmp_path, capsys):
    suppression.compare([runs / name for name in ("moco0", "moco1", "ifm0", "ifm1")], tmp_path / "report")
    found = json.loads((tmp_path / "report" / "suppression.json").read_text())
    names = ["untrained", "MoCo, T = 0.2", "IFM (eps 0.1), T = 0.2"]
    assert list(found["runs"]) == names
    assert [[run["seed"] for run in found["runs"][name]] for name in names] == [[0, 1]] * 3
    accuracy = [run["accuracy"]["shape"] for run in found["runs"]["untrained"]]
    assert found["mean"]["untrained"]["accuracy"]["shape"] == pytest.approx(np.mean(accuracy))
    error = np.std(accuracy, ddof=1) / np.sqrt(2)
    assert found["standard_error"]["untrained"]["shape"] == pytest.approx(error)
    line = "| IFM (eps 0.1), T = 0.2, less MoCo, T = 0.2 | 2 | +0.0 +- 0.0 | +0.0 +- 0.0 | +0.0 +- 0.0 |"
    assert line in (tmp_path / "report" / "suppression.md").read_text().splitlines()
    assert line in capsys.readouterr().out
    assert (tmp_path / "report" / "suppression.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_run_of_simclr_is_evaluated(tmp_path):
    """The fields of its network come from its checkpoint, whatever method the evaluation's config names."""
    config = small.config(method="simclr", simclr__dim=8, simclr__head="hcl", model__bn_groups=1)
    training.train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    found = suppression.read_out_workdir(tmp_path / "run")
    assert (found.name, found.step) == ("IFM (eps 0.1) on SimCLR, T = 0.5", 8)
    loaded = pretrained.load(tmp_path / "run", Config()).config
    assert (loaded.method, loaded.simclr.dim, loaded.simclr.head) == ("simclr", 8, "hcl")
    with pytest.raises(UsageError, match=r"simclr\.dim"):
        pretrained.load(tmp_path / "run", small.config(method="simclr", simclr__dim=16))


def test_differences_are_paired_by_seed():
    of = [Readouts("a", 1, {"shape": value}, seed) for seed, value in enumerate((50.0, 60.0, 70.0))]
    against = [Readouts("b", 1, {"shape": value}, seed) for seed, value in ((1, 58.0), (2, 66.0), (5, 0.0))]
    found = suppression.differences(of, against)["shape"]
    assert (found.mean, found.standard_error, found.seeds) == (3.0, pytest.approx(1.0), 2)
    assert str(found) == "+3.0 +- 1.0"
    assert suppression.differences(of[:1], against) == {}
    assert str(suppression.differences(of[:2], against)["shape"]) == "+2.0"


def test_the_same_run_twice_is_a_mistake(runs):
    with pytest.raises(UsageError, match="has the same config and seed as another given workdir"):
        suppression.grouped([runs / "moco0", runs / "moco0"])


@pytest.mark.slow
def test_a_pytorch_checkpoint_is_evaluated_directly(runs, tmp_path):
    """The same features from the run and from its conversion; the images are named by the config."""
    writing.to_torch(runs / "ifm0", tmp_path / "run.pth.tar")
    config = Workdir(runs / "ifm0").read_config()
    found = []
    for path in (runs / "ifm0", tmp_path / "run.pth.tar"):
        output = tmp_path / f"of {path.name}"
        evaluate.evaluate(path, config, output, evaluate.Wanted(knn=True), devices=jax.devices()[:1], quiet=True)
        found.append(json.loads((output / "results.json").read_text())["knn"])
    for label in ("shape", "texture", "color"):
        assert found[0][label] == found[1][label]
