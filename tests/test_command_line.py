"""The scripts as a user meets them: real processes, exit statuses, one line for a mistake, Ctrl-C."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import kill_resume
from ifm_jax import checkpoint, metrics
from tests import small

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The fields of tests/small.py, as flags of the default recipe.
SMALL = [
    "--config.model.width=4",
    "--config.moco.queue_size=64",
    "--config.moco.dim=8",
    "--config.data.trifeature.train_size=64",
    "--config.data.trifeature.test_size=32",
    "--config.batch_size=16",
    "--config.epochs=2",
    "--config.log_every=1",
]


def environment():
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla-tests"), "IFM_JAX_CACHE": str(ROOT / ".cache")}
    return os.environ | cache | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUNBUFFERED": "1"}


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by the script, in a directory of its own, without naming the workdir."""
    cwd = tmp_path_factory.mktemp("cwd")
    done = run("train.py", *SMALL, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "trifeature", done


def test_a_run_with_the_default_workdir(finished):
    workdir, done = finished
    assert "Compiling the training step (resnet8, batch 16, 1 cpu device)" in done.stdout
    assert "step 8/8" in done.stdout
    assert done.stderr == ""
    assert [r["step"] for r in metrics.read(workdir / "metrics.jsonl")] == list(range(1, 9))
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 4


def test_eval_linear(finished):
    """A sweep over one label, and a field of the run's own config changed, from the command line."""
    workdir, _ = finished
    fields = ["data.label=texture", "linear.lr=0.1,1", "linear.epochs=2", "linear.batch_size=32"]
    done = run("eval_linear.py", f"--workdir={workdir}", *(f"--config.{field}" for field in fields))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Linear evaluation of 'texture' (full protocol)" in done.stdout
    found = json.loads((workdir / "results.json").read_text())["linear_full"]
    assert (found["step"], found["texture"]["protocol"]) == (8, "full")
    assert [head["lr"] for head in found["texture"]["heads"]] == [0.1, 1.0]
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoints"} <= set(os.listdir(workdir / "linear-full"))


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--config.moco.size=3"], "--config.moco.size=3: there is no config field 'size'"),
        ("train.py", ["--config.moco.queue_size=many"], "many"),
        ("train.py", ["--config.moco.queue_size=1000"], "moco.queue_size=1000 is not a multiple of batch_size=64"),
        ("train.py", ["--config=nowhere.py"], "--config=nowhere.py is not there: expected a recipe"),
        ("train.py", ["--epsilon=0.1"], "Unknown command line flag 'epsilon'"),
        ("train.py", ["run7"], "'run7' is no flag"),
        ("train.py", ["--workdir=/dev/null/run"], "workdir /dev/null/run cannot be written to"),
        ("train.py", ["--config.data.source=folder:/nowhere"], "data.source='folder:/nowhere'"),
        ("eval_linear.py", ["--workdir=/nowhere"], "/nowhere/config.json is not there"),
        ("eval_linear.py", [], "expected either --workdir, the directory of a training run, or --pretrained"),
        ("eval_linear.py", ["--pretrained=/nowhere.pth"], "/nowhere.pth is not there"),
        ("eval_linear.py", ["--pretrained=x", "--config.linear.rate=1"], "there is no config field 'rate'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(tmp_path, script, arguments, message):
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script}: ")
    assert done.stdout == ""


def test_a_failed_run_is_one_line_and_exit_1(tmp_path):
    done = run("train.py", *SMALL, "--config.optim.name=sgd", "--config.optim.lr=1e30", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert " at step " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(finished, tmp_path, number):
    arguments = [sys.executable, str(ROOT / "train.py"), *SMALL, "--config.epochs=4000", f"--workdir={tmp_path}"]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    assert "The same command goes on from there." in out
    steps = [r["step"] for r in metrics.read(log)]
    assert steps == list(range(1, len(steps) + 1))

    # The same command, ended soon after: it goes on with the next step.
    done = run("train.py", *SMALL, "--config.epochs=4000", f"--config.steps={len(steps) + 3}", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"Going on after step {len(steps)}" in done.stdout
    assert [r["step"] for r in metrics.read(log)] == list(range(1, len(steps) + 4))
    # As if nothing had happened: the first steps are those of any run of this seed.
    first = small.without_speed(metrics.read(finished[0] / "metrics.jsonl"))[0]
    ours = small.without_speed(metrics.read(log))[0]
    assert ours["loss"] == first["loss"]


def test_a_killed_run_ends_as_the_one_that_nobody_touched(tmp_path):
    """The short form of benchmarks/kill_resume.py: killed soon after a save, then wherever it is a second later."""
    environment_, steps = environment(), 40
    killed = kill_resume.kill(tmp_path / "killed", steps, after=0.1, at_line=7, environment=environment_)
    assert killed["doing"] in ("step", "save")
    kill_resume.kill(tmp_path / "killed", steps, after=0.02, at_line=23, environment=environment_)
    for name in ("killed", "whole"):
        kill_resume.finish(tmp_path / name, steps, environment_)
    found = kill_resume.compare(tmp_path / "killed", tmp_path / "whole", steps)
    assert (found["lines"], found["lines_differ"], found["arrays_differ"]) == (steps, 0, 0)
    assert checkpoint.steps(tmp_path / "killed" / "checkpoints") == [30, 35, 40]


def test_help_lists_the_flags():
    done = run("train.py", "--help")
    assert done.returncode == 0
    assert "python train.py" in done.stdout
    assert "--workdir" in done.stdout
    assert "--config" in done.stdout


def test_importing_the_package_is_light():
    """Neither PyTorch nor TensorFlow nor Grain nor Orbax."""
    code = "import sys, ifm_jax; print([m for m in ('torch', 'tensorflow', 'grain', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_train_step_needs_no_more_than_jax_flax_optax_numpy():
    """So that it can be benchmarked where nothing else is installed."""
    code = """
import sys
for name in ("grain", "orbax", "cv2", "ml_collections", "tensorboardX", "matplotlib", "sklearn"):
    sys.modules[name] = None
import ifm_jax, ifm_jax.pretrain, ifm_jax.state, ifm_jax.augment, ifm_jax.config
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
