"""Evaluates a frozen backbone on labelled images.

    python eval_linear.py --workdir=DIR                     a run: the original's linear-evaluation protocol
    python eval_linear.py --pretrained=FILE.pth.tar ...     a PyTorch checkpoint, or one of Orbax's (a folder)
    ... --pretrained=FILE --prefix=backbone.                another library's, its network under that prefix
    ... --config.linear.lr=1,3,10,30                        several classifiers at once, the best chosen honestly
    ... --fast                                              minutes instead of hours: the features of a few views, kept
    ... --knn                                               k nearest neighbours (Wu et al. 2018), nothing is trained
    ... --diagnostics                                       alignment, uniformity, effective rank, similarities
    ... --features=FILE.npz [--split=train] [--layer=projection]     the features, with labels and names
    ... --map=FILE.png                                      the features in two dimensions (t-SNE), coloured by label

A run's own config is taken, with --config.field=value on top; a file's network is read off its tensors, and
--config=FILE.py or --config.data.source=... says on which images. Results go into results.json of the workdir, or of
--output; the same command goes on with an evaluation that was stopped.
"""

if __name__ == "__main__":  # first: what is imported below takes seconds
    from ifm_jax import process

    process.begin(hosts=True)

import pathlib

from absl import flags

from ifm_jax.cli import command
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.runs.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to evaluate.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "A .pth.tar, a checkpoint or a workdir to evaluate instead.")
_PREFIX = flags.DEFINE_string("prefix", "", "--pretrained: what the network's names begin with, as backbone.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results go: the workdir, or runs/NAME for --pretrained=NAME.")
_FAST = flags.DEFINE_boolean("fast", False, "The fast protocol.")
_KNN = flags.DEFINE_boolean("knn", False, "k nearest neighbours.")
_DIAGNOSTICS = flags.DEFINE_boolean("diagnostics", False, "Alignment, uniformity, effective rank, similarities.")
_FEATURES = flags.DEFINE_string("features", None, "Write features to this .npz or .array_record file.")
_MAP = flags.DEFINE_string("map", None, "Draw the features in two dimensions into this .png file.")
_MAP_METHOD = flags.DEFINE_enum("map_method", "tsne", ["tsne", "umap"], "How the map is made.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "test"], "Whose features to write or to draw.")
_LAYER = flags.DEFINE_enum("layer", "backbone", ["backbone", "projection"], "Which features to write or to draw.")
_CONFIG = command.define_config()
_JOIN_HOSTS = command.define_hosts()


def main(arguments: list[str]) -> int:
    """Evaluates; returns the exit status."""
    command.refuse_arguments(arguments)
    if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
        raise UsageError("expected either --workdir, the directory of a training run, or --pretrained, a checkpoint")
    path = _WORKDIR.value or _PRETRAINED.value
    config = _CONFIG.over(lambda: Workdir(_WORKDIR.value).read_config() if _WORKDIR.value else Config())
    output = pathlib.Path(_OUTPUT.value or _WORKDIR.value or pathlib.Path("runs") / _name(path))
    command.workdir(output)
    _JOIN_HOSTS()
    from ifm_jax.evaluation import evaluate  # with scikit-learn and matplotlib, once it is known what is wanted

    wanted = evaluate.Wanted(
        fast=_FAST.value,
        knn=_KNN.value,
        diagnostics=_DIAGNOSTICS.value,
        features=_FEATURES.value,
        map=_MAP.value,
        map_method=_MAP_METHOD.value,
        split=_SPLIT.value,
        layer=_LAYER.value,
    )
    stopped = evaluate.evaluate(path, config, output, wanted, prefix=_PREFIX.value)
    return command.say_stopped(stopped, output) if stopped is not None else 0


def _name(path: str) -> str:
    """Returns what to call the results of a checkpoint: `moco_v2` for `moco_v2.pth.tar`."""
    return pathlib.Path(path).resolve().name.removesuffix(".tar").removesuffix(".pth")


if __name__ == "__main__":
    command.run(main)
