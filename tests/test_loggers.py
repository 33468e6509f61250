"""The services of `log_to`: each step once whatever ends a run, and a run that nothing of theirs stops."""

import json
import shutil
import struct
import sys
import threading

import jax
import pytest

from ifm_jax import choices
from ifm_jax import config as configs
from ifm_jax.errors import UsageError
from ifm_jax.runs import loggers, metrics_log, training
from ifm_jax.runs.loggers import Loggers
from tests import small


class Kept:
    """A service that keeps what it receives, in `runs`: the last step of a run is known to it if `knows`."""

    runs: dict
    knows = False
    fails_at = None

    def __init__(self, source, run):
        self.run = run or f"{source.directory.name}-{len(self.runs)}"
        self.kept = self.runs.setdefault(self.run, {"steps": [], "pictures": [], "ends": []})
        self.kept["config"] = source.config

    def last_step(self):
        return max((step for step, _ in self.kept["steps"]), default=None) if self.knows else None

    def log(self, step, values):
        if step == self.fails_at:
            raise OSError("the service\nis away")
        self.kept["steps"].append((step, dict(values)))

    def picture(self, step, name, path):
        self.kept["pictures"].append((step, name))

    def close(self, failed):
        self.kept["ends"].append(failed)


@pytest.fixture
def kept(monkeypatch):
    """A class of services of its own."""

    class Mine(Kept):
        runs = {}  # noqa: RUF012

    monkeypatch.setattr(loggers, "LOGGERS", {"kept": Mine, "other": Kept})
    return Mine


def records(first, last):
    return [{"step": step, "epoch": step / 4, "loss": 1 / step, "knn": 50.0} for step in range(first, last + 1)]


def values(steps):
    return [(step, {"train/loss": 1 / step, "eval/knn": 50.0}) for step in steps]


def log(directory, checkpoint, last, log_to="kept", said=print, picture=False):
    """A process that continues after the checkpoint and logs up to the last step."""
    config = small.config(log_to=log_to)
    with Loggers(config, directory / "loggers.json", records(1, checkpoint), say=said) as log:
        for record in records(checkpoint + 1, last):
            log.log(record["step"], record)
        if picture:
            log.picture("samples", directory / "samples.png")
            log.picture("curves", directory / "curves.png", again=True)


def test_the_names_are_those_that_the_config_accepts():
    assert tuple(loggers.LOGGERS) == choices.LOGGERS
    assert configs.loggers(small.config(log_to=" wandb,mlflow, wandb")) == ["wandb", "mlflow"]
    configs.validate(small.config(log_to="trackio, mlflow"))
    with pytest.raises(UsageError, match="log_to='wanb': expected wandb, mlflow, trackio"):
        configs.validate(small.config(log_to="wanb"))


def test_each_step_once_in_a_run_that_goes_on(tmp_path, kept):
    """The earlier process had logged beyond its checkpoint; the run of the service is the same."""
    log(tmp_path, 0, 5, picture=True)
    log(tmp_path, 3, 4)  # ends before the last step of the first
    log(tmp_path, 3, 8, picture=True)
    (run,) = kept.runs.values()
    assert run["steps"] == values(range(1, 9))
    assert run["pictures"] == [(5, "train/samples"), (5, "train/curves"), (8, "train/curves")]
    assert run["config"]["moco.dim"] == 8
    assert run["ends"] == [False] * 3


@pytest.mark.parametrize("knows", [False, True])
def test_steps_that_a_service_lacks_come_from_the_record(tmp_path, kept, knows):
    """A service chosen later, or one that was killed before it had all, or whose note was lost before the kill."""
    kept.knows = knows
    log(tmp_path, 6, 8)
    log(tmp_path, 10, 12)
    (run,) = kept.runs.values()
    assert run["steps"] == values(range(1, 13))
    if knows:
        notes = json.loads((tmp_path / "loggers.json").read_text())
        notes["kept"]["step"] = 10  # killed between log and note
        (tmp_path / "loggers.json").write_text(json.dumps(notes))
        log(tmp_path, 10, 13)
        assert run["steps"] == values(range(1, 14))


@pytest.mark.parametrize("notes", ["", "[1]", '{"kept": 3}', '{"kept": {"step": 3}}'])
def test_damaged_notes_do_not_stop_a_run(tmp_path, kept, notes):
    (tmp_path / "loggers.json").write_text(notes)
    said = []
    log(tmp_path, 0, 5, said=said.append)
    assert said == []
    assert [run["steps"] for run in kept.runs.values()] == [values(range(1, 6))]


def test_one_that_fails_says_so_once_and_the_others_go_on(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(Kept, "runs", {}, raising=False)
    monkeypatch.setattr(Kept, "fails_at", 3)
    kept.fails_at = None
    said = []
    log(tmp_path, 0, 6, "kept,other", said.append)
    assert said == ["log_to=other has failed, and the run goes on without it: OSError: the service is away"]
    (run,), (other,) = kept.runs.values(), Kept.runs.values()
    assert run["steps"] == values(range(1, 7))
    assert other["steps"] == values([1, 2])
    monkeypatch.setattr(Kept, "fails_at", None)
    log(tmp_path, 6, 7, "kept,other", said.append)  # the next process gives it what it lacks
    assert other["steps"] == values(range(1, 8))
    assert len(said) == 1


def test_one_that_never_answers_holds_up_nothing(tmp_path, kept, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(kept, "log", lambda self, step, values: answer.wait())
    monkeypatch.setattr(loggers, "_PATIENCE", 0.05)
    said = []
    log(tmp_path, 0, 3, said=said.append)
    answer.set()
    assert len(said) == 1
    assert "no answer" in said[0]


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    log(tmp_path, 0, 3, "wandb", said.append)
    assert said == [
        "log_to=wandb has failed, and the run goes on without it: it is not installed: pip install 'ifm_jax[wandb]'"
    ]


def test_an_error_of_the_run_is_told(tmp_path, kept):
    with pytest.raises(ValueError, match="mine"), Loggers(small.config(log_to="kept"), tmp_path / "l.json", []):
        raise ValueError("mine")
    (run,) = kept.runs.values()
    assert run["ends"] == [True]


# --- the services themselves, as far as they are installed ------------------------------------------------------------


def of_wandb(workdir):
    """Returns the lines of all offline files, which `wandb sync` uploads: their run, step and values."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    lines, runs = [], set()
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):  # blocks of 32 KiB with records: checksum, length, kind (whole or part), data
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record, parts = pb.Record.FromString(parts), b""
                if record.WhichOneof("record_type") == "run":
                    runs.add(record.run.run_id)
                if record.WhichOneof("record_type") == "history":
                    items = {"/".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
                    lines.append((json.loads(items["_step"]), {name: json.loads(items[name]) for name in items}))
    assert len(runs) == 1
    return lines


def of_mlflow(workdir):
    client = pytest.importorskip("mlflow.tracking").MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ifm_jax").experiment_id])
    assert run.info.status == "FINISHED"
    assert json.loads(run.data.params["moco.dim"]) == 8
    assert len(run.data.params) == len(configs.flatten(configs.to_dict(small.config())))
    lines = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            assert name not in lines.setdefault(metric.step, {}), "a step twice"
            lines[metric.step][name] = metric.value
    return sorted(lines.items())


def of_trackio(workdir):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run = json.loads((workdir / "loggers.json").read_text())["trackio"]["run"]
    return sorted(((line["step"], line) for line in storage.get_logs("ifm_jax", run)), key=lambda line: line[0])


READ = {"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize("service", READ)
def test_a_run_killed_and_resumed_has_each_step_once(tmp_path, service, monkeypatch):
    """Offline. It had logged up to step 5 when it was killed, and its checkpoint is of step 3."""
    pytest.importorskip(service)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    workdir = tmp_path / "run"
    config = small.config(log_to=service)

    def train(steps):
        config.steps = steps
        training.train(config, workdir, devices=jax.devices()[:1], quiet=True)

    with small.light():
        train(5)
        shutil.rmtree(workdir / "checkpoints" / "5")
        train(0)
    record = metrics_log.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in record] == list(range(1, 9))
    found = READ[service](workdir)
    assert [step for step, _ in found] == list(range(1, 9))
    for (_, line), expected in zip(found, record, strict=True):
        for name in ("loss", "lr", "grad_norm", "acc1"):
            assert line[f"train/{name}"] == pytest.approx(expected[name], rel=1e-12)
