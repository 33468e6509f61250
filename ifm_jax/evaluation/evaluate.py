"""Runs the evaluations that the script requests for a checkpoint; prints them and writes them to results.json."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import assembly, files, sharding
from ifm_jax.augment import example_rngs
from ifm_jax.config import Config
from ifm_jax.data import open_source, steps_per_epoch, training_batches
from ifm_jax.data.sources import Source, Subset, drawn, subset
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import diagnostics, export, knn, linear, pretrained, readout, report
from ifm_jax.evaluation.features import extract
from ifm_jax.evaluation.pretrained import Pretrained
from ifm_jax.models.encoder import Tree
from ifm_jax.runs.loop import Outcome
from ifm_jax.runs.tensorboard import TensorBoardLog
from ifm_jax.runs.workdir import Workdir

_READOUT_LIMIT = 2e10  # images x features x classes up to which logistic regression takes only minutes

_Devices = list[jax.Device] | None
_Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The requested evaluations. The default is the full linear protocol.

    Attributes:
      fast: the fast linear protocol.
      knn: k nearest neighbors.
      diagnostics: alignment, uniformity, effective rank, similarities.
      features: file to write features to.
      map: file to draw the features into.
      map_method: "tsne" or "umap".
      split: split whose features to write or draw.
      layer: layer of these features.
    """

    fast: bool = False
    knn: bool = False
    diagnostics: bool = False
    features: str | None = None
    map: str | None = None
    map_method: str = "tsne"
    split: str = "test"
    layer: str = "backbone"


def evaluate(
    path: str | os.PathLike[str],
    config: Config,
    output: str | os.PathLike[str],
    wanted: Wanted = Wanted(),
    *,
    prefix: str = "",
    devices: list[jax.Device] | None = None,
    quiet: bool = False,
) -> Outcome | None:
    """Evaluates a checkpoint and adds the results to results.json.

    Args:
      path: a run's workdir, one of its checkpoints, or a PyTorch file.
      config: config of the evaluation.
      output: directory of results.json.
      wanted: the requested evaluations.
      prefix: what the network's names in a PyTorch file begin with; see `torch_interop.reading.read`.
      devices: devices to run on; None: all.
      quiet: print nothing on the terminal.

    Returns:
      None, or if a signal stopped the evaluation, its outcome, with all progress saved.

    Raises:
      UsageError: if the caller made a mistake.
      RunError: if images cannot be read.
    """
    output = pathlib.Path(output)
    of = pretrained.load(path, config, prefix)
    for note in of.snapshot.notes if not quiet else ():
        print(f"{path}: {note}")
    say = (lambda text: None) if quiet or jax.process_index() else print
    others = wanted.knn or wanted.diagnostics or wanted.features or wanted.map
    if wanted.fast or not others:
        protocol = "fast" if wanted.fast else "full"
        found = linear.run(of, output / f"linear-{protocol}", fast=wanted.fast, devices=devices, quiet=quiet)
        if isinstance(found, Outcome):
            return found
        say("")
        if not quiet and not jax.process_index():
            report.print_linear(list(found.values()))
        add_result(output, of, f"linear_{protocol}", {name: result.to_dict() for name, result in found.items()})
    if wanted.fast:
        add_result(output, of, "logistic_regression", readouts(of, devices, say))
    if wanted.knn:
        add_result(output, of, "knn", nearest_neighbors(of, devices, say))
    if wanted.diagnostics:
        _diagnostics(of, output, devices, say)
    if wanted.features or wanted.map:
        _export(of, wanted, devices, say)
    return None


def add_result(output: pathlib.Path, of: Pretrained, name: str, found: dict[str, Any]) -> None:
    """Adds a result to results.json; replaces a result of the same name.

    Raises:
      UsageError: if the file cannot be read or written.
    """
    if jax.process_index() > 0:
        return
    path = Workdir(output).results
    known = files.read_json(path, "pass another --output") or {}
    known[name] = {"checkpoint": of.path, "step": of.step, "source": of.config.data.source} | found
    try:
        output.mkdir(parents=True, exist_ok=True)
        files.write_json(path, known)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): pass another --output") from None


def readouts(of: Pretrained, devices: _Devices, say: _Say) -> dict[str, dict[str, float]]:
    """Returns the accuracy of logistic regression on the features: label -> top1 in percent.

    A label with too many images for it is left out.

    Args:
      of: what is evaluated.
      devices: devices to run on; None: all.
      say: receives a line for each label.
    """
    train, test = of.features("train", devices), of.features("test", devices)
    train_source, test_source = of.images("train"), of.images("test")
    found = {}
    for label in pretrained.chosen_labels(of.config, train_source):
        classes = len(train_source.label_names[label])
        if train.size * classes > _READOUT_LIMIT:
            say(f"Logistic regression of {label!r} is skipped: {len(train):,} images are too many for it.")
            continue
        found[label] = {
            "top1": readout.linear_readout(train, train_source.labels()[label], test, test_source.labels()[label])
        }
        say(f"Logistic regression (L-BFGS) of {label!r}: {found[label]['top1']:.2f} %")
    return found


def nearest_neighbors(of: Pretrained, devices: _Devices, say: _Say) -> dict[str, dict[str, float]]:
    """Returns the accuracy of nearest neighbors: label -> top1 and top5 in percent, and the settings.

    Arguments as for `readouts`.
    """
    settings = of.config.eval
    train, test = of.features("train", devices), of.features("test", devices)
    train_source, test_source = of.images("train"), of.images("test")
    found = {}
    for label in pretrained.chosen_labels(of.config, train_source):
        votes = knn.classify(
            train,
            train_source.labels()[label],
            test,
            len(train_source.label_names[label]),
            k=settings.neighbors,
            temperature=settings.temperature,
            mesh=of.frozen(devices).mesh,
        )
        truth = test_source.labels()[label]
        found[label] = {
            "top1": 100 * float(np.mean(votes.predicted == truth)),
            "top5": 100 * float(np.mean((votes.classes == truth[:, None]).any(axis=1))),
            "k": min(settings.neighbors, len(train)),
            "temperature": settings.temperature,
            "train_images": len(train),
            "test_images": len(test),
        }
        say(
            f"{found[label]['k']} nearest neighbors of {label!r}: top-1 {found[label]['top1']:.2f} %, top-5 "
            f"{found[label]['top5']:.2f} %, {len(test):,} images"
        )
    return found


def _diagnostics(of: Pretrained, output: pathlib.Path, devices: _Devices, say: _Say) -> None:
    found = diagnose(of, devices)
    say(
        f"Alignment {found['alignment']:.3f}, uniformity {found['uniformity']:.3f}; cosine similarity of positives "
        f"{found['positive_mean']:.3f}, of negatives {found['negative_mean']:.3f}; effective rank of the features "
        f"{found['effective_rank']:.1f} of {found['num_features']}"
    )
    add_result(output, of, "diagnostics", found)
    if not jax.process_index():
        report.draw_similarities(found, output / "similarities.png")
        with TensorBoardLog(Workdir(output).tensorboard, of.step) as log:
            log.write(of.step, {f"diagnostics/{name}": value for name, value in found.items()})
            log.write_histograms(
                of.step,
                {
                    f"diagnostics/{kind} similarity": (np.array(found["edges"]), np.array(found[f"{kind}_histogram"]))
                    for kind in ("positive", "negative")
                },
            )


def diagnose(of: Pretrained, devices: list[jax.Device] | None = None) -> dict[str, Any]:
    """Returns the diagnostics of held-out images, or of the training images if there are no others.

    Similarities, alignment and uniformity use the embeddings (or the features, if a checkpoint has no head) of two
    views as in pre-training; the effective rank uses the features of the evaluation views. At most `eval.images` images
    are used, drawn at random, since a source may be sorted by class; the same ones on all hosts.
    """
    config = of.config
    split_name = "test"
    try:
        every = open_source(config.data, split_name)
    except UsageError:  # one set of images, all of them for training
        split_name = "train"
        every = open_source(config.data, split_name)
    source = drawn(every, config.eval.images, config.linear.seed)
    count = len(source)
    layer = "projection" if of.snapshot.state.params.get("fc") is not None else "backbone"
    embed = of.frozen(devices, layer)
    augment = assembly.make_augmentation(config)
    whole, split = sharding.replicated(embed.mesh), sharding.split(embed.mesh)

    def embeddings(weights: tuple[Tree, Tree], batch: dict[str, jax.Array], number: jax.Array) -> list[jax.Array]:
        place = jnp.arange(batch["views"].shape[0], dtype=jnp.int32)
        rngs = jax.random.split(jax.random.fold_in(jax.random.key(config.linear.seed), number))
        images = batch["views"][:, 0], batch["views"][:, -1]
        return [
            embed.apply(weights, augment(example_rngs(rng, place), view))
            for rng, view in zip(rngs, images, strict=True)
        ]

    compute = jax.jit(embeddings, in_shardings=(whole, split, whole), out_shardings=whole)
    batch_size = -(-min(256, count) // embed.mesh.size) * embed.mesh.size
    batches = training_batches(
        source,
        batch_size,
        seed=config.linear.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        remainder=True,
    )
    parts = []
    for number in range(steps_per_epoch(count, batch_size, remainder=True)):
        batch = next(batches)
        batch.pop("weight")
        views = compute(embed.weights, sharding.put_batch(embed.mesh, batch), jnp.asarray(number, jnp.int32))
        parts.append([np.asarray(view) for view in views])
    batches.close()
    # The padding of the last batch comes last.
    first, second = (np.concatenate(view)[:count] for view in zip(*parts, strict=True))
    found = diagnostics.diagnose(first, second)
    features = _features_of_drawn(of, split_name, len(every), source, devices)
    found |= {
        "effective_rank": diagnostics.effective_rank(features),
        "effective_rank_embeddings": found["effective_rank"],
        "num_features": features.shape[1],
        "images": count,
    }
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


def _features_of_drawn(
    of: Pretrained, split: str, count: int, chosen: Source, devices: list[jax.Device] | None
) -> np.ndarray:
    """Returns the features of drawn images as they are evaluated; those of another evaluation where it has them.

    Args:
      of: what is evaluated.
      split: that the images are drawn from.
      count: images of the split.
      chosen: the drawn ones.
      devices: to run on.
    """
    try:
        labeled = of.images(split)
    except UsageError:  # without labels there are no others
        return extract(of.frozen(devices), chosen)
    if len(labeled) != count:
        return extract(of.frozen(devices), chosen)
    indices = chosen.indices if isinstance(chosen, Subset) else np.arange(count)
    if of.has_features(split, devices):
        return of.features(split, devices)[indices]
    return extract(of.frozen(devices), subset(labeled, indices))


def _export(of: Pretrained, wanted: Wanted, devices: _Devices, say: _Say) -> None:
    for path, suffixes, flag in (
        (wanted.features, (".npz", ".array_record"), "--features"),
        (wanted.map, (".png",), "--map"),
    ):
        if path:
            export.check_suffix(pathlib.Path(path), suffixes, flag)
    features, source = of.features(wanted.split, devices, wanted.layer), of.images(wanted.split)
    if jax.process_index():
        return
    if wanted.features:
        export.write(wanted.features, features, source)
        say(f"Features of {len(features):,} images, {features.shape[1]} each, written to {wanted.features}.")
    if wanted.map:
        shown, points = export.two_dimensions(features, wanted.map_method)
        labels = pretrained.chosen_labels(of.config, source)
        of_shown = {label: (source.labels()[label][shown], source.label_names[label]) for label in labels}
        report.draw_map(points, of_shown, wanted.map)
        say(f"A map of {len(points):,} images, colored by {', '.join(labels)}, drawn into {wanted.map}.")
