"""The loop: what a run leaves, exact resume, and how it ends badly."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
import torch

from ifm_jax import assembly
from ifm_jax import config as configs
from ifm_jax.errors import RunError, UsageError
from ifm_jax.methods import MoCoMemory
from ifm_jax.runs import checkpoint, loading, loop, metrics_log, snapshot, training
from ifm_jax.runs.checkpoint import Checkpoints
from ifm_jax.runs.workdir import Workdir
from ifm_jax.torch_interop import writing
from tests import small

make_augmentation = assembly.make_augmentation


def final_state(workdir):
    like = jax.eval_shape(assembly.state_creator(Workdir(workdir).read_config()))
    return checkpoint.newest_whole(workdir / "checkpoints", like)[0].state


def train(config, workdir, devices=1):
    return training.train(config, workdir, devices=jax.devices()[:devices], quiet=True)


@pytest.fixture(autouse=True)
def _light(request):
    """But for what an earlier version has left, whose network is whole."""
    with contextlib.nullcontext() if "of_0_1" in request.fixturenames else small.light():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight steps, not interrupted."""
    workdir = tmp_path_factory.mktemp("run")
    with small.light(curves=True):
        result = train(small.config(), workdir)
    assert (result.step, result.total_steps, result.stopped_by) == (8, 8, None)
    return workdir


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    records = metrics_log.read(finished / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert list(records[0]) == [
        "step", "epoch", "loss", "loss_clean", "loss_ifm", "acc1", "acc5", "lr", "grad_norm", "images_per_sec",
        "data_wait",
    ]  # fmt: skip
    assert [r["epoch"] for r in records] == [s / 4 for s in range(1, 9)]
    for r in records:
        assert r["loss"] == pytest.approx((r["loss_clean"] + r["loss_ifm"]) / 2, rel=1e-6)
        assert r["loss_ifm"] > r["loss_clean"]
    # The rate changes once an epoch: e = 0, 1 of 2.
    assert [r["lr"] for r in records] == pytest.approx([0.03] * 4 + [0.015] * 4)
    assert json.loads((finished / "config.json").read_text())["moco"]["queue_size"] == 64
    assert (finished / "curves.png").stat().st_size > 10_000
    assert list((finished / "tensorboard").iterdir())
    state = final_state(finished)
    assert int(state.step) == 8
    assert int(state.memory.queue_ptr) == 8 * 16 % 64


@pytest.mark.slow
def test_training_learns(tmp_path, monkeypatch):
    """The loss falls well below chance, log(K + 1), with the augmentation of the data set."""
    monkeypatch.setattr(assembly, "make_augmentation", make_augmentation)
    config = small.config(moco__queue_size=32, moco__temperature=0.1, epochs=40, optim__name="adamw", optim__lr=0.01)
    config.checkpoint_every, config.log_every = 1000, 10
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction is decay ** count
        train(config, tmp_path)
    losses = [r["loss_clean"] for r in metrics_log.read(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-3:]) < 0.9 * math.log(33)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path, stop):
    """Bit for bit: the remaining lines of metrics.jsonl and the whole final state; at a checkpoint and between two."""
    first = train(small.config(steps=stop), tmp_path)
    assert first.step == stop
    # A run killed later than its last checkpoint leaves lines that will be written again.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 0.0}\n{"step": 8, "lo')
    second = train(small.config(), tmp_path)
    assert second.step == 8
    ours, theirs = (small.without_speed(metrics_log.read(d / "metrics.jsonl")) for d in (tmp_path, finished))
    assert ours == theirs
    small.assert_same(final_state(tmp_path), final_state(finished))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_resumed_on_another_number_of_devices(tmp_path):
    """On more than before, then on fewer."""
    double = {"model__compute_dtype": "float64", "steps": 6}
    train(small.config(**double), tmp_path / "whole", devices=1)
    train(small.config(**double | {"steps": 2}), tmp_path / "parts", devices=8)
    train(small.config(**double | {"steps": 4}), tmp_path / "parts", devices=2)
    train(small.config(**double), tmp_path / "parts", devices=1)
    whole, parts = (metrics_log.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [r["step"] for r in parts] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "loss_clean", "loss_ifm", "grad_norm", "acc1"):
            assert b[name] == pytest.approx(a[name], rel=1e-10), (name, a["step"])


def test_a_finished_run_is_left_alone(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    result = training.train(small.config(), finished, devices=jax.devices()[:1])
    assert result.step == 8
    assert "Nothing to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_workdir_of_another_config_is_refused(finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(
        UsageError, match=r"belongs to a run with another config \(ifm.epsilon: 0.3, not 0.1\): pass an"
    ):
        train(small.config(ifm__epsilon=0.3), finished)
    assert (finished / "config.json").read_bytes() == before


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/run is not writable \(Not a directory\)"):
        train(small.config(), tmp_path / "file" / "run")


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        train(small.config(), tmp_path)


@pytest.mark.slow
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    # Steps 1 to 4 at a rate that does no harm; then one that does: lr is checked nowhere else.
    config = small.config(optim__lr=1e30, optim__warmup_epochs=1.0, checkpoint_every=1, log_every=100)
    with pytest.raises(RunError, match=r"is (nan|inf) at step (\d+): stopped") as caught:
        train(config, tmp_path)
    step = int(str(caught.value).split("at step ")[1].split(":")[0])
    assert step >= 2
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == step - 1
    state = final_state(tmp_path)
    assert np.isfinite(np.asarray(state.memory.queue)).all()


@pytest.mark.slow
def test_limit_shortens_the_epoch(tmp_path):
    result = train(
        small.config(data__limit=33, epochs=4, steps=1, moco__queue_size=32), tmp_path
    )  # as many steps in all
    assert result.total_steps == 1
    assert metrics_log.read(tmp_path / "metrics.jsonl")[0]["epoch"] == 0.5


def test_auto_dtype_is_settled_by_the_machine_then_by_the_run():
    auto = small.config(model__compute_dtype="auto")
    assert assembly.resolve(auto).model.compute_dtype == "float32"
    assert (
        assembly.resolve(auto, stored=small.config(model__compute_dtype="bfloat16")).model.compute_dtype == "bfloat16"
    )


@pytest.mark.slow
def test_the_step_compiles_once(tmp_path):
    """Nothing is compiled while the loop runs: neither the step again, nor anything beside it, nor a second evaluation.

    Three epochs of four steps, each with an evaluation before its last line.
    """
    config = small.config(epochs=3, checkpoint_every=4, eval__every=1, eval__neighbors=5)
    events = []

    def note(name, *_, **__):
        if "backend_compile" in name:
            events.append(
                len(metrics_log.read(tmp_path / "metrics.jsonl")) if (tmp_path / "metrics.jsonl").exists() else 0
            )

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train(config, tmp_path)
        events, of_run = [], events
        jax.jit(lambda x: 3 * x + 0.125)(np.ones(7, np.float32))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    # The listener works, and so does the count of lines: it sees a compilation after the last of them.
    assert of_run
    assert events == [len(metrics_log.read(tmp_path / "metrics.jsonl"))] == [12]
    # The readout before training has compiled what all evaluations need.
    assert not [count for count in of_run if count > 1]


@pytest.mark.slow
def test_runs_over_seeds_and_rates_compile_once(tmp_path):
    """Three seeds and learning rates of a recipe: whatever the first run has compiled serves the others."""
    least, misses = jax.config.jax_persistent_cache_min_compile_time_secs, []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            misses.append(event)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(note)
    try:
        for number, (seed, lr) in enumerate(((0, 0.03), (1, 0.1), (2, 0.3))):
            train(small.config(steps=1, seed=seed, optim__lr=lr), tmp_path / str(number))
            if number == 0:
                misses.clear()
    finally:
        jax.monitoring.unregister_event_listener(note)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert misses == []
    losses = {metrics_log.read(tmp_path / str(number) / "metrics.jsonl")[0]["loss"] for number in range(3)}
    assert len(losses) == 3  # of the first step, before a rate has acted


@pytest.mark.slow
def test_a_checkpoint_at_step_0_is_gone_on_from(finished, tmp_path):
    """A conversion may be at step 0; its weights are what the run starts with."""
    other = final_state(finished)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(other._replace(step=np.int32(0)), configs.to_dict(small.config()))
        checkpoints.wait()
    train(small.config(steps=1), tmp_path)
    ours, theirs = (metrics_log.read(d / "metrics.jsonl")[0]["loss"] for d in (tmp_path, finished))
    assert ours != theirs


@pytest.mark.slow
@pytest.mark.parametrize("given", ["run", "other head", "torch", "backbone"])
def test_init_from(finished, tmp_path, given, capsys):
    """A new run, at step 0, with the weights of another; what that lacks is new, and said."""
    trained = final_state(finished)
    config, path, taken = small.config(steps=1, moco__momentum=1.0), finished, "query encoder; key encoder; queue"
    if given == "other head":
        config.moco.dim, config.moco.queue_size = 16, 32
        taken = "query encoder with a new head; key encoder (a copy of the query encoder); a new queue"
    elif given == "torch":
        path = tmp_path / "only_query.pth.tar"
        without = trained._replace(memory=MoCoMemory(None, None, None, None), opt_state=None)
        snapshot.write(snapshot.Snapshot(small.config(), jax.device_get(without)), tmp_path / "stripped")
        writing.to_torch(tmp_path / "stripped", path)
        taken = "query encoder; key encoder (a copy of the query encoder); a new queue"
    elif given == "backbone":  # another library's
        path = tmp_path / "backbone.ckpt"
        writing.to_torch(finished, tmp_path / "plain.pth", "torchvision")
        tensors = torch.load(tmp_path / "plain.pth", weights_only=True)
        torch.save({"state_dict": {f"backbone.{name}": value for name, value in tensors.items()}}, path)
        taken = (
            "query encoder with a new head; key encoder (a copy of the query encoder); a new queue; "
            "the network whose tensors begin with 'backbone.' was read"
        )
    config.init_from = str(path)
    training.train(config, tmp_path / "new", devices=jax.devices()[:1])
    assert f"Starting with {path}: {taken}." in capsys.readouterr().out
    state = final_state(tmp_path / "new")  # after one step: with momentum 1 the key encoder is the one it began with
    assert int(state.step) == 1
    assert [r["step"] for r in metrics_log.read(tmp_path / "new" / "metrics.jsonl")] == [1]
    if given == "run":
        small.assert_same(state.memory.key_params, trained.memory.key_params)
        np.testing.assert_array_equal(state.memory.queue[16:], trained.memory.queue[16:])
    else:
        small.assert_same(state.memory.key_params["conv1"], trained.params["conv1"])


@pytest.mark.slow
def test_init_from_another_network_is_refused(finished, tmp_path):
    with pytest.raises(UsageError, match=r"the config does not fit .*\(model.width=8, but the tensors have 4\)"):
        train(small.config(model__width=8, init_from=str(finished)), tmp_path)


@pytest.mark.slow
def test_an_incomplete_conversion_cannot_be_gone_on_from(finished, tmp_path):
    config = small.config()
    stripped = final_state(finished)._replace(memory=MoCoMemory(None, None, None, None), opt_state=None)
    origin = snapshot.Origin("released.pth.tar", "moco", 200, 0, None, {})
    snapshot.write(snapshot.Snapshot(config, stripped, origin, None, ()), tmp_path / "run", overwrite=False)
    with pytest.raises(UsageError, match="converted checkpoint without key encoder, queue, optimizer state"):
        train(config, tmp_path / "run")


def test_one_run_at_a_time_in_a_workdir(finished):
    """The second is told who the first is, and nothing is touched; a lock that a dead process left blocks nobody."""
    before = (finished / "metrics.jsonl").read_bytes()
    first = rf"is in use by process {os.getpid()} on \S+: wait for it, .* --workdir"
    with Workdir(finished).locked(), pytest.raises(UsageError, match=first):
        train(small.config(epochs=3), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before
    (finished / ".lock").write_text('{"pid": 1, "host": "gone"}')
    assert train(small.config(), finished).step == 8


@pytest.mark.parametrize("written", [None, "[]", "another"])
def test_the_checkpoint_s_config_decides(finished, tmp_path, written):
    """Whatever becomes of config.json, the run does not go on with other hyperparameters."""
    run = shutil.copytree(finished, tmp_path / "run")
    other = small.config(epochs=3, optim__lr=0.5)
    path = run / "config.json"
    if written is None:
        path.unlink()
    else:
        path.write_text(json.dumps(configs.to_dict(other)) if written == "another" else written)
    with pytest.raises(
        UsageError, match=r"another config \(epochs: 3, not 2; optim.lr: 0.5, not 0.03\)|lr: 0.5, not 0"
    ):
        train(other, run)
    assert Workdir(run).read_config().optim.lr == 0.03
    assert train(small.config(), run).step == 8
    assert json.loads(path.read_text())["optim"]["lr"] == 0.03


@pytest.mark.parametrize("content", ["[]", "null", "5", '"text"', "[" * 100_000, "\udcff", '{"images": 3}'])
def test_a_small_file_that_holds_something_else_is_named(tmp_path, content):
    for name in ("config.json", "data.json"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UsageError, match=rf"{name}.*|config field 'images' is unknown"):
            train(small.config(steps=1), directory)
        assert (directory / name).read_bytes() == content.encode(errors="surrogateescape")


def test_an_unknown_best_measure_is_refused_before_the_first_step(tmp_path):
    config = small.config(eval__every=1, checkpoint_best="knn/size")
    with pytest.raises(UsageError, match="checkpoint_best='knn/size': expected one of knn, linear, knn/shape"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def of_0_1(tmp_path_factory):
    """What version 0.1 has left, a run stopped after step 4 and a checkpoint it converted there, both gone on with."""
    directory = tmp_path_factory.mktemp("of_0_1")
    with tarfile.open(pathlib.Path(__file__).parent / "data" / "workdirs_0_1.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Recorder, "draw", lambda self: None)
        train(small.config(checkpoint_keep=1), directory / "run")
        train(small.config(checkpoint_keep=3), directory / "converted")
    return directory


@pytest.mark.slow
def test_workdirs_of_version_0_1_go_on(of_0_1):
    """A run that version 0.1 stopped after step 4 ends as that version's own; so does a checkpoint it converted."""
    expected = metrics_log.read(of_0_1 / "whole" / "metrics.jsonl")
    for name, first in (("run", 0), ("converted", 4)):
        ours = metrics_log.read(of_0_1 / name / "metrics.jsonl")
        assert [record["step"] for record in ours] == list(range(first + 1, 9))
        # The fixture was made with XLA's optimizer on, and perhaps on another processor.
        for record, theirs in zip(ours[4 - first :], expected[4:], strict=True):
            assert record["loss"] == pytest.approx(theirs["loss"], rel=2e-4)
            assert record["lr"] == theirs["lr"]


@pytest.mark.slow
def test_a_converted_checkpoint_that_trained_on_and_is_damaged_is_set_aside(of_0_1, tmp_path):
    """So are both checkpoints of its training: the run goes on from the conversion."""
    run = shutil.copytree(of_0_1 / "converted", tmp_path / "run")
    assert checkpoint.steps(run / "checkpoints") == [4, 6, 8]
    for step in ("6", "8"):
        shutil.rmtree(run / "checkpoints" / step / "state")
    assert loading.read(run).notes[0].startswith("the checkpoint of step 8 is damaged")
    train(small.config(checkpoint_keep=1), run)
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["6", "8"]
    assert checkpoint.steps(run / "checkpoints")[-1] == 8
    ours, theirs = (small.without_speed(metrics_log.read(d / "metrics.jsonl")) for d in (run, of_0_1 / "converted"))
    assert ours == theirs
