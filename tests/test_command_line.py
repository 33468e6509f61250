"""The scripts as a user meets them: real processes, exit statuses, one line for a mistake, Ctrl-C."""

import ast
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import kill_resume
from ifm_jax import config as configs
from ifm_jax.cli import convert, evaluate, suppression, train
from ifm_jax.errors import UsageError
from ifm_jax.runs import checkpoint, metrics_log
from tests import small
from tests.conftest import QUICK

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
    return os.environ | cache | {"XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1"}


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


@pytest.mark.slow
def test_a_run_with_the_default_workdir(finished):
    workdir, done = finished
    assert "Compiling the training step (resnet8, batch 16, 1 cpu device)" in done.stdout
    assert "step 8/8" in done.stdout
    assert done.stderr == ""
    assert [r["step"] for r in metrics_log.read(workdir / "metrics.jsonl")] == list(range(1, 9))
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 4


@pytest.mark.slow
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


MISTAKES = [
    # Fields of the config.
    ("train.py", ["--config.moco.size=3"], "--config.moco.size=3: there is no config field 'moco.size'"),
    (
        "train.py",
        ["--config.optm.lr=0.2"],
        "--config.optm.lr=0.2: there is no config field 'optm.lr': did you mean 'opt",
    ),
    ("train.py", ["--config.lr", "0.2"], "there is no config field 'lr': did you mean 'optim.lr'?"),
    ("train.py", ["--config.moco.lr=1"], "there is no config field 'moco.lr': did you mean 'optim.lr'?"),
    ("train.py", ["--config.=1"], "--config.=1: there is no config field ''"),
    ("train.py", ["--config.optim.milestones[0]=1"], "there is no config field 'optim.milestones[0]': did you mean"),
    (
        "train.py",
        ["--config.data.augment=x"],
        "data.augment is a group of fields: expected one of them, such as --config.data",
    ),
    ("train.py", ["--noconfig.epochs"], "--noconfig.epochs: there is no config field 'epochs'"),
    ("train.py", ["--config.moco.temperature"], "--config.moco.temperature has no value: expected --config.moco.tempe"),
    (
        "train.py",
        ["--config.epochs", "--workdir=x"],
        "--config.epochs has no value: expected --config.epochs=VALUE, a w",
    ),
    ("eval_linear.py", ["--pretrained=x", "--config.linear.rate=1"], "there is no config field 'linear.rate'"),
    ("ifm_jax/replay.py", ["--config.nope=1"], "--config.nope=1: there is no config field 'nope'"),
    ("convert_checkpoints.py", ["inspect", "x", "--config.nope=1"], "--config.nope=1: there is no config field 'nope'"),
    (
        "convert_checkpoints.py",
        ["to-jax", "x", "y", "--config.moco.dim=1"],
        "--config.moco.dim changes a recipe: expect",
    ),
    # Their values.
    (
        "train.py",
        ["--config.moco.queue_size=many"],
        "--config.moco.queue_size=many: expected a whole number of at least",
    ),
    ("train.py", ["--config.batch_size=1e2"], "--config.batch_size=1e2: expected a whole number"),
    ("train.py", ["--config.batch_size="], "--config.batch_size=: expected a whole number"),
    ("train.py", ["--config.seed=" + "9" * 5000], "...: expected a whole number"),
    ("train.py", ["--config.optim.lr=fast"], "--config.optim.lr=fast: expected a number above 0"),
    ("train.py", ["--config.optim.lr=1e400"], "--config.optim.lr=1e400: expected a number above 0, finite"),
    ("train.py", ["--config.moco.mlp=yes"], "--config.moco.mlp=yes: expected true or false"),
    (
        "train.py",
        ["--config.moco.shuffle_bn=yes"],
        "--config.moco.shuffle_bn=yes: expected true, false or balanced",
    ),
    ("train.py", ["--config.optim.milestones=1,x"], "--config.optim.milestones=1,x: expected epochs above 0"),
    ("train.py", ["--config.optim.milestones=1,,2"], "--config.optim.milestones=1,,2: expected epochs above 0"),
    ("train.py", ["--config.linear.lr=()"], "--config.linear.lr=(): expected numbers above 0, for example 1,10,30"),
    ("train.py", ["--config.ifm.epsilon_negative=no"], "expected a number of at least 0, or none"),
    (
        "train.py",
        ["--config.model.arch=resnet5O"],
        "=resnet5O is unknown: expected one of resnet8, resnet18, resnet34,",
    ),
    ("train.py", ["--config.model.arch=resnet5O"], "did you mean 'resnet50'?"),
    ("train.py", ["--config.moco.queue_size=1000"], "moco.queue_size=1000 is not a multiple of batch_size=64"),
    ("train.py", ["--config.data.source=folder:/nowhere"], "data.source='folder:/nowhere'"),
    # Recipes.
    ("train.py", ["--config=nowhere.py"], "--config=nowhere.py does not exist: expected a recipe"),
    (
        "train.py",
        ["--config=configs/ifm_cifar.py"],
        "--config=configs/ifm_cifar.py does not exist: did you mean ifm_cifar",
    ),
    ("train.py", ["--config", "ifm_cifar"], "--config=ifm_cifar does not exist: did you mean ifm_cifar10?"),
    ("train.py", ["--config="], "--config= is empty: an unset shell variable?"),
    ("train.py", ["--config"], "--config has no value: expected --config=VALUE, a recipe"),
    ("convert_checkpoints.py", ["to-jax", "x", "y", "--config=broken.py"], "--config=broken.py does not exist"),
    (
        "ifm_jax/replay.py",
        ["--config=broken.py", "--start=x", "--views=y"],
        "y does not exist: expected recorded views",
    ),
    # The other flags.
    ("train.py", ["--workdir="], "--workdir= is empty: an unset shell variable?"),
    ("train.py", ["--workdir", ""], "--workdir= is empty: an unset shell variable?"),
    ("train.py", ["--workdir"], "--workdir has no value: expected --workdir=VALUE"),
    ("train.py", ["--workdri=x"], "--workdri=x: there is no flag --workdri: did you mean --workdir?"),
    ("train.py", ["--confg.moco.dim=3"], "there is no flag --confg.moco.dim: did you mean --config.moco.dim?"),
    ("train.py", ["--epsilon=0.1"], "--epsilon=0.1: there is no flag --epsilon"),
    ("train.py", ["--flagfile=/nowhere"], "/nowhere"),
    ("train.py", ["run7"], "'run7' is not a flag"),
    ("train.py", ["--workdir=/dev/null/run"], "workdir /dev/null/run is not writable"),
    ("train.py", ["--workdir=" + "x" * 300], ": File name too long ("),
    ("eval_linear.py", ["--workdir=" + "x" * 300], ": File name too long ("),
    ("convert_checkpoints.py", ["inspect", "x" * 300], ": File name too long ("),
    ("eval_linear.py", ["--workdir="], "--workdir= is empty: an unset shell variable?"),
    ("eval_linear.py", ["--pretrained="], "--pretrained= is empty: an unset shell variable?"),
    ("eval_linear.py", ["--workdir=/nowhere"], "/nowhere/config.json does not exist"),
    ("eval_linear.py", [], "expected either --workdir (the directory of a training run) or --pretrained"),
    ("eval_linear.py", ["--pretrained=/nowhere.pth"], "/nowhere.pth does not exist"),
    ("eval_linear.py", ["--map_method=tsn"], "--map_method=tsn: expected one of tsne, umap: did you mean 'tsne'?"),
    ("eval_linear.py", ["--fast=maybe"], "--fast=maybe: expected true or false"),
    ("demo.py", ["--workdir="], "--workdir= is empty: an unset shell variable?"),
    ("demo.py", ["--seeds=few"], "--seeds=few: expected an integer"),
    ("demo.py", ["--seeds="], "--seeds= is empty: an unset shell variable?"),
    ("demo.py", ["--seeds=0"], "--seeds=0: expected at least 1"),
    ("convert_checkpoints.py", ["to-jax", "", "x"], "to-jax: FILE.pth.tar is empty: an unset shell variable?"),
    ("convert_checkpoints.py", ["to-torch", "x", ""], "to-torch: FILE.pth.tar is empty: an unset shell variable?"),
    ("convert_checkpoints.py", ["inspect", ""], "inspect: PATH is empty: an unset shell variable?"),
    ("convert_checkpoints.py", ["inspect", "x", "--step=-1"], "--step=-1: expected a non-negative integer"),
    ("ifm_jax/replay.py", ["--start="], "--start= is empty: an unset shell variable?"),
    ("ifm_jax/replay.py", ["--rtol=nan"], "--rtol=nan: expected a finite number"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(in_process, script, arguments, message):
    status, out, err = in_process(script, *arguments)
    assert (status, out) == (2, ""), err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith(f"{os.path.basename(script)}: ")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "-mifm_jax.replay"])
def test_a_mistake_is_one_line_in_a_process_of_its_own(tmp_path, script):
    """A broken recipe is met by the very process, outside of this one's guards."""
    module = script.startswith("-m")
    arguments = [script if module else str(ROOT / script), "--config.moco.size=3"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["--config.epochs=3", "--config.epochs=4"], {"epochs": 4}),
        (["--config.epochs", "3", "-config.seed=1"], {"epochs": 3, "seed": 1}),
        (["--config.batch_size=0x40", "--config.steps=1_000"], {"batch_size": 64, "steps": 1000}),
        (["--config.moco.mlp", "--config.moco.shuffle_bn=0"], {"moco.mlp": True, "moco.shuffle_bn": False}),
        (["--config.moco.shuffle_bn=balanced"], {"moco.shuffle_bn": "balanced"}),
        (
            ["--config.moco.shuffle_bn", "balanced", "--config.moco.mlp"],
            {"moco.shuffle_bn": "balanced", "moco.mlp": True},
        ),
        (["--config.moco.shuffle_bn=balanced", "--noconfig.moco.shuffle_bn"], {"moco.shuffle_bn": False}),
        (["--config.moco.shuffle_bn=F", "--config.moco.shuffle_bn"], {"moco.shuffle_bn": True}),
        (["--noconfig.moco.mlp", "--config.optim.per_step", "TRUE"], {"moco.mlp": False, "optim.per_step": True}),
        (["--config.moco.mlp=f", "--config.optim.per_step=t"], {"moco.mlp": False, "optim.per_step": True}),
        (["--config.linear.lr=1,3,10"], {"linear.lr": (1.0, 3.0, 10.0)}),
        (
            ["--config.linear.lr=(1, 3)", "--config.optim.milestones=[3]"],
            {"linear.lr": (1, 3), "optim.milestones": (3,)},
        ),
        (["--config.optim.milestones=", "--config.linear.lr=3,"], {"optim.milestones": (), "linear.lr": (3.0,)}),
        (["--config.ifm.epsilon_negative=none"], {"ifm.epsilon_negative": None}),
        (["--config.ifm.epsilon_negative=.1", "--config.optim.lr=1"], {"ifm.epsilon_negative": 0.1, "optim.lr": 1.0}),
        (
            ["--config.data.classes=", "--config.data.source=folder:/a=b c"],
            {"data.classes": "", "data.source": "folder:/a=b c"},
        ),
    ],
)
def test_spellings_of_a_field(arguments, changes):
    given = train.flags().parse(["--workdir=x", *arguments, "rest"])
    assert (given.options.workdir, given.arguments) == ("x", ["rest"])
    flag = given.config
    assert flag.changes == changes
    assert all(type(flag.changes[name]) is type(value) for name, value in changes.items())
    config = flag()
    assert {name: configs.get_field(config, name) for name in changes} == changes
    assert config.model.arch == "resnet8"


def test_spellings_of_a_recipe():
    path = str(ROOT / "configs" / "ifm_cifar10.py")
    for arguments in (["--config=ifm_cifar10"], ["--config", path], ["--config=trifeature", f"-config={path}"]):
        given = train.flags().parse([*arguments, "--", "--config=x"])
        assert given.arguments == ["--config=x"]
        flag = given.config
        assert (flag.name(), flag().data.source) == ("ifm_cifar10", "tfds:cifar10")
        assert flag.over(lambda: 1 / 0) == flag()
    flag = train.flags().parse(["--config.seed=3"]).config
    assert (flag.name(), flag().seed, flag.over(configs.Config).seed) == ("trifeature", 3, 3)
    assert flag.over(configs.Config).model.arch == "resnet50"


@pytest.mark.slow
def test_a_failed_run_is_one_line_and_exit_1(tmp_path):
    done = run("train.py", *SMALL, "--config.optim.lr=1e30", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert " at step " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(finished, tmp_path, number):
    """By Ctrl-C, by its terminal's end, by a reader of its output that leaves; SIGTERM is in test_hosts."""
    workdir = tmp_path / "läufe"  # where the terminal knows ASCII alone
    arguments = [sys.executable, str(ROOT / "train.py"), *SMALL, "--config.epochs=4000", f"--workdir={workdir}"]
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the run would inherit that it ignores it
    try:
        process = subprocess.Popen(arguments, env=ascii_only, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGPIPE:
        process.stdout.close()
        with process.stderr:
            said, silent = process.stderr.read(), ""
        process.wait(timeout=60)
    else:
        process.send_signal(number)
        said, silent = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert silent == ""
    assert f"Stopped by {number.name} after step" in said
    assert r"l\xe4ufe. The same command resumes it." in said
    steps = [r["step"] for r in metrics_log.read(log)]
    assert steps == list(range(1, len(steps) + 1))
    assert checkpoint.steps(workdir / "checkpoints")[-1] == len(steps)
    if number != signal.SIGINT:
        return

    # The same command, ended soon after: it goes on with the next step.
    done = run("train.py", *SMALL, "--config.epochs=4000", f"--config.steps={len(steps) + 3}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {len(steps)}" in done.stdout
    assert [r["step"] for r in metrics_log.read(log)] == list(range(1, len(steps) + 4))
    # As if nothing had happened: the first steps are those of any run of this seed.
    first = small.without_speed(metrics_log.read(finished[0] / "metrics.jsonl"))[0]
    ours = small.without_speed(metrics_log.read(log))[0]
    assert ours["loss"] == first["loss"]


@pytest.mark.slow
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


def test_help_lists_the_flags_and_every_field_with_the_defaults_of_the_recipe(in_process):
    status, out, _ = in_process("train.py", "--help")
    assert status == 0
    assert "python train.py" in out
    for flag in ("--workdir: ", "--coordinator: ", "--config: ", "--config.FIELD=VALUE: "):
        assert flag in out
    words = " ".join(out.split())
    for name, field in configs.fields().items():
        if field.is_group:
            assert f"\n{name}: {field.declared.meaning}\n" in out
        else:
            assert (
                f"--config.{name}: {field.declared.meaning} {field.kind.__name__ if not field.many else 'list'}"
                in words
            )
    assert "--config.method: contrastive method: moco or simclr str, one of moco, simclr; default moco" in words
    assert "relative to the image's float above 0, at most 1; default 0.36" in words
    assert max(map(len, out.splitlines())) <= 120

    assert "Config fields, with the defaults of the recipe trifeature:" in out
    assert "--config.epochs: passes over the training images (--epochs) int of at least 1; default 6" in words
    status, out, _ = in_process("train.py", "--config", "ifm_cifar10", "-h", "--workdri=a mistake")
    words = " ".join(out.split())
    assert (status, "Config fields, with the defaults of the recipe ifm_cifar10:" in out) == (0, True)
    assert "--config.epochs: passes over the training images (--epochs) int of at least 1; default 200" in words
    assert "list of int, epochs above 0, for example 120,160; default 120,160" in words
    status, out, err = in_process("eval_linear.py", "--help", "--config=nowhere")
    assert (status, out, err) == (2, "", err)
    assert "--config=nowhere does not exist" in err


def test_flags_of_a_command():
    """Spellings that its own flags and its other arguments may have."""

    def options(*arguments):
        given = evaluate.flags().parse(list(arguments))
        assert given.arguments == []
        return given.options

    for arguments, fast in (
        (["--fast"], True),
        (["--nofast"], False),
        (["-fast"], True),
        (["-nofast"], False),
        (["--fast=TRUE"], True),
        (["--fast=0"], False),
        (["--fast", "--fast=f", "--fast"], True),
    ):
        assert options(*arguments).fast is fast
    found = options("-split", "train", "--map=-x y", "--features", "a b", "--num_processes=0x2", "--process_id", "1")
    assert (found.split, found.map, found.features) == ("train", "-x y", "a b")
    assert (found.hosts.num_processes, found.hosts.process_id, found.hosts.coordinator) == (2, 1, "")

    # Before and after paths; a switch takes none of them; what follows `--` is a path.
    given = convert.flags().parse(["--overwrite", "to-jax", "--step", "3", "a", "-prefix=p", "b", "--", "--for=x"])
    assert given.arguments == ["to-jax", "a", "b", "--for=x"]
    found = given.options
    assert (found.overwrite, found.step, found.prefix, found.for_) == (True, 3, "p", "moco")
    given = suppression.flags().parse(["a", "true", "--output=c", "-"])
    assert (given.arguments, given.options.output) == (["a", "true", "-"], "c")

    # No abbreviation; nothing is kept from one command line to the next.
    flags = convert.flags()
    first, again = flags.parse(["--overwrite", "--config.seed=1"]), flags.parse([])
    assert (first.options.overwrite, first.config.changes, first.config.given) == (True, {"seed": 1}, True)
    assert (again.options.overwrite, again.config.changes, again.config.given) == (False, {}, False)
    for argument in ("--over", "-over", "---overwrite", "--nooverwrite=1", "--nostep", "--config.ifm.eps=1", "-5"):
        with pytest.raises(UsageError):
            flags.parse([argument])


def test_flags_in_a_file(in_process, tmp_path):
    (tmp_path / "flags").write_text("--workdir=/dev/null/x\n--config.moco.queue_size=1000\n")
    assert "moco.queue_size=1000 is not a multiple" in in_process("train.py", f"--flagfile={tmp_path}/flags")[2]
    (tmp_path / "outer").write_text(f"# a comment\n\n  --flagfile={tmp_path}/inner\n// another\n--config.moco.mlp\n")
    (tmp_path / "inner").write_text("--workdir=a b\n--config.seed=1\n")
    given = train.flags().parse(["--config.seed=2", "-flagfile", f"{tmp_path}/outer", "--config.epochs=3"])
    assert given.options.workdir == "a b"
    assert given.config.changes == {"seed": 1, "moco.mlp": True, "epochs": 3}
    assert train.flags().parse(["--", "--flagfile=x"]).arguments == ["--flagfile=x"]
    (tmp_path / "inner").write_text(f"--flagfile={tmp_path}/outer\n")
    for path, message in ((f"{tmp_path}/outer", "includes itself"), (tmp_path, "cannot be read"), (" ", "is empty")):
        with pytest.raises(UsageError, match=message):
            train.flags().parse([f"--flagfile={path}"])


def test_importing_the_package_is_light():
    """Neither PyTorch nor TensorFlow nor Grain nor Orbax; not even JAX, before something is used."""
    code = """
import sys, ifm_jax
first = [m for m in ("jax", "numpy") if m in sys.modules]
for name in ("augment", "losses", "models", "optim", "queue", "sharding", "pretrain", "config", "errors"):
    getattr(ifm_jax, name)
from ifm_jax import Config, Encoder, PretrainStep, RunError, TrainState, UsageError
print(first + [m for m in ("torch", "tensorflow", "grain", "orbax") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_train_step_needs_no_more_than_jax_flax_optax_numpy():
    """So that it can be benchmarked where nothing else is installed."""
    code = """
import sys
for name in ("grain", "orbax", "cv2", "tensorboardX", "matplotlib", "sklearn"):
    sys.modules[name] = None
import ifm_jax, ifm_jax.pretrain, ifm_jax.methods, ifm_jax.augment, ifm_jax.config
# Nor does a mistake in a flag, or --help, wait for more.
from ifm_jax.cli import evaluate, replay, suppression, train
for command in (evaluate, replay, suppression, train):
    command.flags()
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_only_doors_import_the_command_line():
    """Rooms do not know who calls them; a module that is run by `python -m` does, where it is the script."""
    for path in (ROOT / "ifm_jax").rglob("*.py"):
        if path.parent.name != "cli":
            body = ast.parse(path.read_text()).body
            rest = [part for part in body if not (isinstance(part, ast.If) and "__main__" in ast.unparse(part.test))]
            imports = [n for part in rest for n in ast.walk(part) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not [line for line in map(ast.unparse, imports) if "cli" in line.replace(".", " ").split()], path
