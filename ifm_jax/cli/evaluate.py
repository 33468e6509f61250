"""Evaluates a frozen backbone: `eval_linear.py`."""

import dataclasses
import pathlib

from ifm_jax.cli import command
from ifm_jax.cli.command import Hosts
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Config, Group, field
from ifm_jax.errors import UsageError


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    workdir: str = field("", "Directory of the run to evaluate.")
    pretrained: str = field("", "A .pth.tar, a checkpoint or a workdir to evaluate instead of --workdir.")
    prefix: str = field("", "Prefix of the network's names in the file of --pretrained, such as backbone.")
    output: str = field("", "Directory for the results; default: the workdir, or runs/NAME for --pretrained=NAME.")
    fast: bool = field(False, "Use the fast protocol: stored features of a few views.")
    knn: bool = field(False, "Classify by k nearest neighbors.")
    diagnostics: bool = field(False, "Compute alignment, uniformity, effective rank and similarities.")
    features: str = field("", "Write features to this .npz or .array_record file.")
    map: str = field("", "Draw the features in two dimensions into this .png file.")
    map_method: str = field("tsne", "Method of the map.", choices=("tsne", "umap"), expected="one of tsne, umap")
    neighbors: str = field("", "Draw some held-out images with the nearest training images into this .png file.")
    split: str = field(
        "",
        "Images whose features to write or draw: train, test (held out) or all; default: test, or all where the source "
        "has no held-out images of its own.",
        choices=("", "train", "test", "all"),
        expected="one of train, test, all",
    )
    layer: str = field(
        "backbone",
        "Layer whose features to write or draw.",
        choices=("backbone", "projection"),
        expected="one of backbone, projection",
    )
    untrained: bool = field(True, "Evaluate the untrained network too, with --knn and --fast.")
    hosts: Hosts = field(Hosts, "one of several processes")


def flags(text: str = "") -> Flags:
    """Returns the flags of the command.

    Args:
      text: text of `--help`, which tells how to call the command; empty: the module's docstring.
    """
    return Flags(Options, text or __doc__, ConfigFlag())


def main(given: Given) -> int:
    """Evaluates; returns the exit status."""
    given.refuse_arguments()
    options = given.options
    if bool(options.workdir) == bool(options.pretrained):
        raise UsageError("expected either --workdir (the directory of a training run) or --pretrained (a checkpoint)")
    path = options.workdir or options.pretrained
    config = given.config.over(lambda: _config_of_run(options.workdir) if options.workdir else Config())
    output = pathlib.Path(options.output or options.workdir or pathlib.Path("runs") / _name(path))
    command.workdir(output)
    command.join_hosts(options.hosts)
    from ifm_jax.evaluation import evaluate  # imports scikit-learn and matplotlib, so only after the flags are checked

    wanted = evaluate.Wanted(
        fast=options.fast,
        knn=options.knn,
        diagnostics=options.diagnostics,
        features=options.features or None,
        map=options.map or None,
        map_method=options.map_method,
        neighbors=options.neighbors or None,
        split=options.split,
        layer=options.layer,
        untrained=options.untrained,
        fit_lr="linear.lr" not in given.config.changes,
    )
    stopped = evaluate.evaluate(path, config, output, wanted, prefix=options.prefix)
    return command.say_stopped(stopped, output) if stopped is not None else 0


def _config_of_run(workdir: str) -> Config:
    from ifm_jax.runs.workdir import Workdir

    return Workdir(workdir).read_config()


def _name(path: str) -> str:
    """Returns the name for the results of a checkpoint: `moco_v2` for `moco_v2.pth.tar`."""
    return pathlib.Path(path).resolve().name.removesuffix(".tar").removesuffix(".pth")


def run(text: str = "") -> None:
    """Runs the command with the arguments of the process, and ends the process; `text` as for `flags`."""
    command.run(main, flags(text))
