"""The door: `ifm-jax COMMAND`, in a clone and installed; what it says before anything heavy is imported."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import venv

import pytest

from ifm_jax import choices, config, methods, models, optim, process, recipes
from ifm_jax.cli import main
from ifm_jax.torch_interop import writing
from tests.test_command_line import SMALL, environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEAVY = ("jax", "jaxlib", "flax", "optax", "numpy", "sklearn", "matplotlib", "orbax", "grain", "cv2", "torch")


def door(*arguments, **options):
    command = [sys.executable, "-m", "ifm_jax", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, **options)


def test_without_a_command_it_lists_them():
    listed = door()
    assert (listed.returncode, listed.stderr) == (0, "")
    for name in main.COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in listed.stdout.splitlines())
    assert max(map(len, listed.stdout.splitlines())) <= 120
    assert door("--help").stdout == listed.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "ifm-jax: there is no command 'trian': did you mean 'train'?"),
        (["nothing"], "ifm-jax: there is no command 'nothing': expected one of train, eval, config, "),
        (["--workdir=x", "train"], "ifm-jax: --workdir=x: expected a command before the flags: one of train, eval, "),
        (["train", "--workdri=x"], "ifm-jax train: --workdri=x: there is no flag --workdri: did you mean --workdir?"),
        (["eval", "--fast=maybe"], "ifm-jax eval: --fast=maybe: expected true or false"),
    ],
)
def test_a_mistake_is_one_line_of_the_command(arguments, said):
    done = door(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_the_list_of_commands_has_a_reader_that_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ifm_jax"]
    with os.fdopen(writer, "w") as stream:
        done = subprocess.run(command, env=environment(), cwd=ROOT, stdout=stream, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_flags_and_help_import_nothing_heavy():
    """So that --help, a mistake and `ifm-jax config` answer in a fraction of a second."""
    code = f"""
import contextlib, importlib, io, sys
from ifm_jax.cli import main
for name in main.COMMANDS:
    flags = importlib.import_module(f"ifm_jax.cli.{{main._MODULES.get(name, name)}}").flags()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        flags.parse(["--help"])
    assert f"ifm-jax {{name}}" in said.getvalue(), name
import ifm_jax.evaluation
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_to_choose_from_are_those_that_are_implemented():
    assert tuple(models.ARCHITECTURES) == choices.ARCHITECTURES
    assert tuple(methods.METHODS) == choices.METHODS
    assert set(config._METHODS) == set(choices.METHODS)
    assert set(config._OBJECTIVES) == set(choices.OBJECTIVES) - {"infonce"}
    for name in choices.OPTIMIZERS:
        optim.make(name, 0.9, 0.0)
    assert writing.TARGETS == choices.TARGETS


@pytest.mark.parametrize(("command", "several"), [("train", True), ("eval", True), ("replay", False)])
def test_a_command_that_may_be_one_of_several_processes_has_a_supervisor(tmp_path, command, several):
    """JAX is here a module that tells who imports it; two real processes are in test_hosts."""
    tells = "import os, sys; print(sys.argv, os.getppid(), file=sys.stderr, flush=True); os._exit(7)"
    (tmp_path / "jax.py").write_text(tells)
    arguments = [sys.executable, "-m", "ifm_jax", command, "--workdir=x"]
    arguments += ["--process_id=1"] if several else []
    arguments = [each for each in arguments if several or not each.startswith("--")]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    started = subprocess.Popen(
        arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    _, said = started.communicate(timeout=60)
    given = arguments[4:]
    parent = started.pid if several else os.getpid()
    assert (started.returncode, said) == (7, f"{[f'ifm-jax {command}', *given]} {parent}\n")


def test_config_prints_every_field(in_process):
    status, out, err = in_process("ifm_jax/__main__.py", "config", "--config=ifm_own_images", "--config.epochs=9")
    assert status == 0
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in out.splitlines())}
    assert list(rows) == [name for name, known in config.fields().items() if not known.is_group]
    # Type, value, the default if the value differs from it, meaning.
    assert rows["epochs"] == [
        "int of at least 1",
        "9",
        "200",
        "passes over the training images (--epochs)",
    ]
    assert rows["batch_size"][1:3] == ["256", ""]
    recipe = recipes.load("ifm_own_images")
    recipe.epochs = 9
    differing = {name.partition(":")[0] for name in config.differences(recipe, config.Config())}
    assert {name for name, row in rows.items() if row[2]} == differing | {"data.source"}
    # A recipe that waits for a path can be looked at.
    assert err == (
        "As it is, this config cannot be run: data.source='folder:' names no folder: expected "
        "--config.data.source=folder:PATH with images\n"
    )


def test_config_is_a_table_on_a_terminal(in_process, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")  # no colors; 80 columns
    monkeypatch.setattr(process.Output, "isatty", lambda self: True, raising=False)
    status, out, err = in_process("ifm_jax/__main__.py", "config", "--config=ifm_cifar10")
    assert (status, err) == (0, "")
    assert "ifm_cifar10: IFM on CIFAR-10, with the settings of MoCo's CIFAR-10 demo." in out
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.split() for line in out.splitlines()]
    at = next(number for number, line in enumerate(lines) if line[:3] == ["moco.queue_size", "int", "4096"])
    assert lines[at + 1][:2] == ["(default", "65536)"]
    assert all(
        any(line[:1] == [name] for line in lines) for name, known in config.fields().items() if not known.is_group
    )


def test_config_lists_the_recipes(in_process):
    status, out, err = in_process("ifm_jax/__main__.py", "config", "--list")
    assert (status, err) == (0, "")
    listed = dict(line.split("  ", 1) for line in out.splitlines())
    files = sorted(path.stem for path in recipes.DIRECTORY.glob("*.py") if path.stem != "__init__")
    assert list(listed)[: len(files)] == files
    assert (
        listed["trifeature"].strip() == "IFM on the embedded Trifeature images: the default, for a first run anywhere."
    )
    assert all(name.startswith("studies/") for name in list(listed)[len(files) :])
    assert all(text.strip() for text in listed.values())


def test_config_refuses_what_it_does_not_understand(in_process):
    for arguments, said in (
        (["--images=5"], "ifm-jax config: --images=5 has no effect: expected --suggest as well"),
        (["trifeature"], "ifm-jax config: 'trifeature' is not a flag: expected --name=value"),
        (["--config=trifeatur"], "ifm-jax config: --config=trifeatur does not exist: did you mean trifeature?"),
    ):
        status, out, err = in_process("ifm_jax/__main__.py", "config", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(said)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The program of a wheel in an environment of its own, which finds the libraries of this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("ifm_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = folder / "wheels"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(source)]
    subprocess.run(build, check=True, cwd=folder)
    wheel = next(wheels.glob("*.whl"))
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # Only now: pip would find the package there.
    here, own = (
        subprocess.run(
            [each, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for each in (sys.executable, python)
    )
    (pathlib.Path(own) / "libraries.pth").write_text(here)
    return folder / "venv", wheel


@pytest.mark.slow
def test_an_installed_wheel_trains_and_evaluates_outside_the_clone(installed, tmp_path):
    environment_, (where, wheel) = environment(), installed
    environment_.pop("PYTHONPATH", None)

    def run(*command):
        done = subprocess.run(
            [where / "bin" / command[0], *command[1:]], cwd=tmp_path, env=environment_, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if importlib.util.find_spec("twine"):  # of the dev extra
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True)
    imported = run("python", "-c", "import ifm_jax; print(ifm_jax.__file__)").strip()
    assert pathlib.Path(imported).is_relative_to(where)
    assert "ifm_cifar10  " in run("ifm-jax", "config", "--list")
    assert "imagenet100_classes.txt" in run("ifm-jax", "config", "--config=ifm_imagenet100")
    assert run("ifm-jax", "--version").startswith("ifm-jax ")

    run("ifm-jax", "train", "--config=trifeature", *SMALL)
    run("ifm-jax", "eval", "--workdir=runs/trifeature", "--fast", "--config.linear.epochs=1")
    found = json.loads((tmp_path / "runs" / "trifeature" / "results.json").read_text())
    assert {"shape", "texture", "color"} <= found["linear_fast"].keys()
    assert found["linear_fast"]["step"] == 8
