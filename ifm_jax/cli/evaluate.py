"""Evaluates a frozen backbone: on labeled images, and with pictures and features that need no labels.

    ifm-jax eval --workdir=DIR                      a run, with the original's linear-evaluation protocol
    ifm-jax eval --pretrained=FILE.pth.tar ...      a PyTorch checkpoint, or an Orbax checkpoint (a folder)
    ... --pretrained=FILE --prefix=backbone.        another library's checkpoint, whose names have that prefix
    ... --config.linear.lr=1,3,10,30                several classifiers at once; reports the best
    ... --fast                                      minutes instead of hours: stored features of a few views
    ... --knn                                       k nearest neighbors (Wu et al. 2018), without training
    ... --diagnostics                               alignment, uniformity, effective rank, similarities
    ... --features=FILE.npz [--split=train] [--layer=projection]     writes the features, with labels and names
    ... --map=FILE.png                              draws the features in two dimensions, colored by label
    ... --neighbors=FILE.png                        draws some images with the training images nearest to them

The last four need no labels. Where a source has no held-out images of its own, a tenth of its images is held out.
With --workdir, the evaluation uses the run's own config, and --config.field=value changes a field of it. With
--pretrained, the network follows from the file's tensors; --config=NAME or --config.data.source=... selects the images.
Results go into results.json in the workdir or in --output. The same command resumes a stopped evaluation. In a clone,
python eval_linear.py is the same.
"""

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
    verbose: bool = field(False, "Where the output is no terminal, print each line of metrics, not one an epoch.")
    untrained: bool = field(True, "Evaluate the untrained network too, with --knn and --fast.")
    hosts: Hosts = field(Hosts, "one of several processes")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag())


def main(given: Given) -> int:
    """Evaluates; returns the exit status."""
    given.refuse_arguments()
    options = given.options
    if bool(options.workdir) == bool(options.pretrained):
        raise UsageError("expected either --workdir (the directory of a training run) or --pretrained (a checkpoint)")
    path = options.workdir or options.pretrained
    config = given.config.over(lambda: _config_of_run(options.workdir) if options.workdir else Config())
    config.verbose |= options.verbose
    output = pathlib.Path(options.output or options.workdir or pathlib.Path("runs") / _name(path))
    command.workdir(output)
    command.join_hosts(options.hosts)
    from ifm_jax import sharding  # this and the next take seconds, too long for a usage error
    from ifm_jax.evaluation import evaluate
    from ifm_jax.runs.workdir import Workdir

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
    if stopped is not None:
        return command.say_stopped(stopped, output)
    results = Workdir(output).results
    if results.exists() and sharding.process_index() == 0:
        print(f"Results: {results}")
    return 0


def _config_of_run(workdir: str) -> Config:
    from ifm_jax.runs.workdir import Workdir

    return Workdir(workdir).read_config()


def _name(path: str) -> str:
    """Returns the name for the results of a checkpoint: `moco_v2` for `moco_v2.pth.tar`."""
    return pathlib.Path(path).resolve().name.removesuffix(".tar").removesuffix(".pth")


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
