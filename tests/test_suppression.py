"""Readouts of every label, method by method, and evaluation while pre-training."""

import json
import shutil

import jax
import numpy as np
import pytest

from ifm_jax import assembly
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate, pretrained, suppression
from ifm_jax.evaluation.online import OnlineEvaluation
from ifm_jax.evaluation.suppression import Readouts
from ifm_jax.runs import metrics_log, training
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
