"""Checkpoints: damage is found, leftovers are cleared away, what is kept, what happens when one cannot be written."""

import gc
import logging
import resource
import shutil
import sys
import threading
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ifm_jax import assembly, sharding
from ifm_jax.errors import RunError, UsageError
from ifm_jax.runs import checkpoint, metrics_log, training
from ifm_jax.runs.checkpoint import Checkpoints
from ifm_jax.runs.metrics_log import MetricsLog
from ifm_jax.runs.workdir import Workdir
from tests import small


@pytest.fixture(autouse=True, scope="module")
def collected_quickly():
    """A garbage collection follows a damaged checkpoint; here it would go through the modules of the whole suite."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def light():
    with small.light():
        yield


@pytest.fixture(scope="module")
def state():
    """A state of step 0 on the host, its numbers drawn."""
    draw = np.random.default_rng(0)
    like = jax.eval_shape(assembly.state_creator(small.config()))
    return at(jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), like), 0)


def at(state, step):
    return state._replace(step=np.int32(step))


def save(directory, state, *steps, found=None, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(at(state, step), {}, found and found[step])
        checkpoints.wait()


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), state)


@pytest.mark.slow
def test_every_truncated_or_missing_file_is_noticed_or_does_no_harm(state, tmp_path):
    """Whichever file of a checkpoint is cut in half or gone: the one before it, or the very same state."""
    save(tmp_path / "whole", state, 1, 2)
    files = [file for file in sorted((tmp_path / "whole" / "2").rglob("*")) if file.is_file()]
    noticed = 0
    for file in files:
        for cut in (True, False):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            target = tmp_path / "copy" / file.relative_to(tmp_path / "whole")
            target.write_bytes(target.read_bytes()[: target.stat().st_size // 2]) if cut else target.unlink()
            found, damaged = checkpoint.newest_whole(tmp_path / "copy", shapes(state))
            found = found.state
            if damaged:
                noticed += 1
                assert list(damaged) == [2]
            small.assert_same(found, at(state, 1 if damaged else 2))
    assert noticed >= 6


class Few(NamedTuple):
    """A state of few arrays, quick to read."""

    step: np.ndarray
    params: dict


@pytest.mark.slow
def test_every_flipped_bit_is_noticed_or_does_no_harm(tmp_path):
    """200 single bits, spread over the files and their bytes: the one before, or the very same arrays and config."""
    draw = np.random.default_rng(0)
    few = Few(np.int32(0), {name: draw.normal(size=size).astype(np.float32) for name, size in (("a", 3), ("b", 2000))})
    config = {"optim": {"lr": 0.1, "milestones": [120, 160]}}
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(at(few, step), config)
    files = [file for file in sorted((tmp_path / "run" / "2").rglob("*")) if file.is_file()]
    noticed = 0
    for number in range(200):
        # Half of the flips in a file whatever its size, half in a byte whatever its file.
        sizes = [file.stat().st_size for file in files]
        file = files[number % len(files) if number % 2 else draw.choice(len(files), p=np.divide(sizes, sum(sizes)))]
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[draw.integers(len(content))] ^= 1 << draw.integers(8)
        file.write_bytes(flipped)
        found, damaged = checkpoint.newest_whole(tmp_path / "run", shapes(few))
        noticed += bool(damaged)
        small.assert_same(found.state, at(few, 1 if damaged else 2))
        assert found.config == config
        file.write_bytes(content)
    assert noticed >= 80  # the rest are in what nobody reads, such as where the arrays lay


def test_a_flipped_bit_in_the_config_is_noticed(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 2), {"optim": {"lr": 0.1}})
    path = tmp_path / "2" / "config" / "metadata"
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(UsageError, match="2: ValueError: the checksum of its config does not match"):
        checkpoint.newest_whole(tmp_path)


def test_checksums_of_a_split_queue_are_of_its_parts(state, tmp_path, monkeypatch):
    """As on several hosts, none of which has all of the queue."""
    mesh = sharding.make_mesh(jax.devices()[:4])
    queue = jax.device_put(state.memory.queue, sharding.split(mesh))
    monkeypatch.setattr(type(queue), "is_fully_addressable", False)
    known = checkpoint._checksums({"queue": queue}, {})
    monkeypatch.undo()
    rows = [(start, stop) for start, stop, _ in known["state/queue"]["crc"]]
    assert rows == [(0, 16), (16, 32), (32, 48), (48, 64)]
    whole = checkpoint._checksums
    monkeypatch.setattr(checkpoint, "_checksums", lambda tree, config: whole(tree, config) | known)
    save(tmp_path, state, 1)
    assert checkpoint.read(tmp_path / "1").config == {}
    known["state/queue"]["crc"][2] = (32, 48, 0)
    save(tmp_path, state, 2)
    with pytest.raises(ValueError, match="the checksum of state/queue does not match"):
        checkpoint.read(tmp_path / "2")


def test_a_folder_that_is_no_checkpoint_s_is_passed_over(state, tmp_path):
    save(tmp_path, state, 3)
    for name in ("006", "7.tmp", "nine"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    assert checkpoint.steps(tmp_path) == [3]
    assert checkpoint.newest_whole(tmp_path)[0].state["step"] == 3


def test_no_whole_checkpoint_is_an_error_not_a_new_start(state, tmp_path):
    save(tmp_path, state, 3, 4)
    for step in (3, 4):
        shutil.rmtree(tmp_path / str(step) / "state")
    with pytest.raises(UsageError, match=r"none of its checkpoints \(3, 4\) can be read .*: restore one"):
        checkpoint.newest_whole(tmp_path, shapes(state))


def test_another_network_s_checkpoint_is_no_whole_one(state, tmp_path):
    other = jax.eval_shape(assembly.state_creator(small.config(moco__dim=16)))
    save(tmp_path, state, 1)
    with pytest.raises(UsageError, match=r"expected float32\[16\], found float32\[8\]"):
        checkpoint.newest_whole(tmp_path, other)


def test_one_that_was_being_written_is_not_picked_up_and_cleared_away(state, tmp_path):
    save(tmp_path, state, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", unfinished)
    assert checkpoint.steps(tmp_path) == [1]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(at(state, 2), {})
    assert not unfinished.exists()
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_the_last_n_and_the_best_are_kept(state, tmp_path):
    found = {step: {"knn": value, "linear": 0.0} for step, value in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 20.0))}
    save(tmp_path / "best", state, 1, 2, 3, 4, found=found, keep=1, best="knn")
    assert checkpoint.steps(tmp_path / "best") == [2, 4]
    # Another process knows it too; a checkpoint without an evaluation is not the best.
    save(tmp_path / "best", state, 5, keep=1, best="knn")
    assert checkpoint.steps(tmp_path / "best") == [2, 5]
    save(tmp_path / "newest", state, 1, 2, 3, keep=2)
    assert checkpoint.steps(tmp_path / "newest") == [2, 3]


def test_set_aside_twice(state, tmp_path):
    for expected in ("7", "7.1"):
        save(tmp_path / "checkpoints", state, 7)
        said = Workdir(tmp_path).set_aside({7: "torn"})
        assert said == [f"The checkpoint of step 7 is damaged (torn): moved to {tmp_path / 'damaged' / expected}."]
        assert checkpoint.steps(tmp_path / "checkpoints") == []


def train(workdir, **fields):
    return training.train(small.config(epochs=3, **fields), workdir, devices=jax.devices()[:1], quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Eight steps of twelve, checkpoints at 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("run")
    train(workdir, steps=8)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_before_a_damaged_one(finished, copy, capsys):
    """It says so, redoes the steps since, and ends as if nothing had happened."""
    for step in (6, 8):
        for file in (copy / "checkpoints" / str(step)).rglob("ocdbt.process_0/d/*"):
            file.write_bytes(file.read_bytes()[:100])
    training.train(small.config(epochs=3, steps=8), copy, devices=jax.devices()[:1])
    said = capsys.readouterr().out
    assert "The checkpoint of step 8 is damaged (" in said
    assert f"moved to {copy / 'damaged' / '6'}" in said
    assert "Resuming after step 3 of 8" in said
    ours, theirs = (small.without_speed(metrics_log.read(d / "metrics.jsonl")) for d in (copy, finished))
    assert ours == theirs
    states = [checkpoint.read(d / "checkpoints" / "8").state for d in (copy, finished)]
    small.assert_same(*states)


@pytest.fixture
def no_logs_of_absl(caplog):
    """As the scripts have it; else pytest would hold the tracebacks that Orbax logs, and with them its tasks."""
    caplog.set_level(logging.CRITICAL, logger="absl")


@pytest.mark.slow
@pytest.mark.usefixtures("no_logs_of_absl")
def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(copy, monkeypatch):
    """A limit on the size of a file stands for it: what the checkpoint's data meet is an error as they are written."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_ = Checkpoints.save

    def save_on_full_disk(self, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
        save_(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save_on_full_disk)
    try:
        with pytest.raises(RunError, match=r"checkpoint.* cannot be written to .*checkpoints \(.*; earlier"):
            train(copy, checkpoint_every=1, log_every=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    like = jax.eval_shape(assembly.state_creator(small.config()))
    assert checkpoint.newest_whole(copy / "checkpoints", like)[0].state.step == 8


@pytest.mark.slow
@pytest.mark.usefixtures("no_logs_of_absl")
def test_the_writes_beside_one_that_fails_print_nothing(tmp_path, monkeypatch, caplog):
    """Of thirty arrays one ends the save; the others' threads find nobody to report to, which Python would print.

    Some of them later than all else, as one is here for certain.
    """
    said = []
    hook = lambda unraisable: said.append(unraisable.exc_value)  # noqa: E731
    draw = np.random.default_rng(0)
    many = Few(np.int32(1), {f"a{number}": draw.normal(size=20_000).astype(np.float32) for number in range(30)})
    gc.collect()  # what other tests have left
    caplog.clear()
    monkeypatch.setattr(sys, "unraisablehook", hook)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    closed = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    late = threading.Timer(0.7, lambda: sys.unraisablehook(closed))
    try:
        for attempt in ("a", "b", "c"):
            if attempt == "c":
                late.start()
            with pytest.raises(RunError, match="cannot be written"):
                save(tmp_path / attempt, many, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    late.join()
    gc.collect()
    assert said == []
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    assert sys.unraisablehook is hook


@pytest.mark.slow
def test_removed_checkpoints_end_the_run(copy, monkeypatch):
    save_ = Checkpoints.save

    def remove_then_save(self, *arguments):
        shutil.rmtree(self.directory)
        save_(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", remove_then_save)
    with pytest.raises(RunError, match="checkpoints were removed during the run: stopped at step 9"):
        train(copy, checkpoint_every=9)


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_to_any_more(copy, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system", "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "write", read_only)
    with pytest.raises(
        RunError, match=r"cannot be written.*\(Read-only file system metrics.jsonl\); everything saved before is"
    ):
        train(copy)


@pytest.mark.slow
def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    saved = []
    save_ = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, s, *rest: (saved.append(int(s.step)), save_(self, s, *rest)))
    train(tmp_path, checkpoint_minutes=1e-9, checkpoint_every=1000, steps=3)
    assert saved == [1, 2, 3]


@pytest.mark.slow
def test_the_best_of_a_run_is_kept(tmp_path):
    """By what the online evaluation finds: knn is given here, so that the best is neither the newest nor the last."""
    from ifm_jax.evaluation.online import OnlineEvaluation

    knn = iter((10.0, 30.0, 20.0))
    evaluate = OnlineEvaluation.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineEvaluation, "__call__", lambda self, state: evaluate(self, state) | {"knn": next(knn)})
        train(tmp_path, eval__every=1, eval__images=16, checkpoint_best="knn", checkpoint_keep=1, checkpoint_every=3)
    assert [(r["step"], r["knn"]) for r in metrics_log.read(tmp_path / "metrics.jsonl") if "knn" in r] == [
        (4, 10.0),
        (8, 30.0),
        (12, 20.0),
    ]
    assert checkpoint.steps(tmp_path / "checkpoints") == [8, 12]
