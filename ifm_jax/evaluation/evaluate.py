"""Runs the evaluations that the script requests for a checkpoint; prints them and writes them to results.json."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import assembly, files, sharding
from ifm_jax import config as configs
from ifm_jax.augment import example_rngs
from ifm_jax.config import Config
from ifm_jax.data import open_source, steps_per_epoch, training_batches
from ifm_jax.data.holdout import has_held_out
from ifm_jax.data.protocols import Source
from ifm_jax.data.sources import Subset, drawn, subset
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import diagnostics, export, knn, linear, neighbors, pretrained, readout, report
from ifm_jax.evaluation.features import extract
from ifm_jax.evaluation.pretrained import Pretrained
from ifm_jax.models.encoder import Tree
from ifm_jax.runs.loop import Outcome
from ifm_jax.runs.tensorboard import TensorBoardLog
from ifm_jax.runs.workdir import Workdir

_READOUT_LIMIT = 2e10  # images x features x classes up to which logistic regression takes only minutes

# With fewer training images the rate that suits ImageNet is too high: docs/evaluation.md has figures.
_FEW, _LR_FOR_FEW = 2000, (1.0,)

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
      neighbors: file to draw some held-out images into, with the training images nearest to them.
      split: split whose features to write or draw, "train", "test" or "all"; empty: the held-out images, or where the
        source has one set of images only, all of them.
      layer: layer of all these features.
      untrained: also evaluate the untrained network, where a quick evaluation measures accuracy.
      fit_lr: with the fast protocol and fewer than 2,000 training images, use a learning rate that suits few images
        instead of the default one.
    """

    fast: bool = False
    knn: bool = False
    diagnostics: bool = False
    features: str | None = None
    map: str | None = None
    map_method: str = "tsne"
    neighbors: str | None = None
    split: str = ""
    layer: str = "backbone"
    untrained: bool = True
    fit_lr: bool = False

    @property
    def linear(self) -> bool:
        """Whether classifiers are trained: with `fast`, or if nothing else is requested."""
        return self.fast or not (self.knn or self.diagnostics or self.features or self.map or self.neighbors)


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
    for file, suffixes, flag in (
        (wanted.features, (".npz", ".array_record"), "--features"),
        (wanted.map, (".png",), "--map"),
        (wanted.neighbors, (".png",), "--neighbors"),
    ):
        if file:
            export.check_suffix(pathlib.Path(file), suffixes, flag)
    output = pathlib.Path(output)
    of = pretrained.load(path, config, prefix)
    for note in of.snapshot.notes if not quiet else ():
        print(f"{path}: {note}")
    say = (lambda text: None) if quiet or jax.process_index() else print
    if wanted.linear or wanted.knn:  # before anything that takes long
        pretrained.required_labels(of.config, of.images("train"))
    if (wanted.linear or wanted.knn or wanted.neighbors) and not has_held_out(of.config.data):
        train, test = len(of.images("train")), len(of.images("test"))
        say(
            f"{of.config.data.source} has no held-out images of its own: {test:,} of its {train + test:,} are held "
            "out, chosen by their names. Pre-training has seen them, without labels."
        )
    usual, count = Config().linear.lr, len(of.images("train")) if wanted.fast else 0
    if wanted.fast and wanted.fit_lr and of.config.linear.lr == usual and count < _FEW:
        of.config.linear.lr = _LR_FOR_FEW
        say(
            f"{count:,} training images are few: linear.lr={_LR_FOR_FEW[0]:g} instead of {usual[0]:g}; "
            "--config.linear.lr sets another."
        )
    if wanted.linear:
        protocol = "fast" if wanted.fast else "full"
        found = _linear(of, output / f"linear-{protocol}", wanted, devices, quiet, say)
        if isinstance(found, Outcome):
            return found
        add_result(output, of, f"linear_{protocol}", found, {"linear": configs.to_dict(of.config)["linear"]})
    if wanted.fast:
        found = readouts(of, devices, say, wanted.untrained)
        add_result(output, of, "logistic_regression", found)
    if wanted.knn:
        found = nearest_neighbors(of, devices, say, wanted.untrained)
        used = {name: next(iter(found.values()))[name] for name in ("k", "temperature")}
        add_result(output, of, "knn", found, used)
    if wanted.diagnostics:
        _diagnostics(of, output, devices, say)
    if wanted.neighbors:
        _neighbors(of, output, wanted, devices, say)
    if wanted.features or wanted.map:
        _export(of, output, wanted, devices, say)
    return None


def add_result(
    output: pathlib.Path, of: Pretrained, name: str, found: dict[str, Any], settings: Mapping[str, Any] | None = None
) -> None:
    """Adds a result to results.json.

    It replaces a result of the same name, except in the list `history`, which keeps one entry for each checkpoint,
    images and settings: `evaluation` (the name), `settings` and `result`.

    Args:
      output: directory of the file.
      of: what was evaluated.
      name: name of the evaluation.
      found: its result.
      settings: settings of the evaluation; those of its images are added.

    Raises:
      UsageError: if the file cannot be read or written.
    """
    if jax.process_index() > 0:
        return
    path, data = Workdir(output).results, of.config.data
    known = files.read_json(path, "pass another --output") or {}
    result = {"checkpoint": of.path, "step": of.step, "source": data.source} | found
    images = {"image_size": data.image_size, "label": data.label, "classes": data.classes, "limit": data.limit}
    history = known.pop("history", [])
    history = history if isinstance(history, list) else []
    if name in known and not any(entry["evaluation"] == name for entry in history):  # from an earlier version
        history.append({"evaluation": name, "settings": None, "result": known[name]})
    entry = {"evaluation": name, "settings": dict(settings or {}) | images, "result": result}
    history = [other for other in history if _identity(other) != _identity(entry)]
    known |= {name: result, "history": [*history, entry]}
    try:
        output.mkdir(parents=True, exist_ok=True)
        files.write_json(path, known)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): pass another --output") from None


def _identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    result = entry["result"]
    return entry["evaluation"], entry["settings"], *(result.get(name) for name in ("checkpoint", "step", "source"))


def _linear(
    of: Pretrained, directory: pathlib.Path, wanted: Wanted, devices: _Devices, quiet: bool, say: _Say
) -> dict[str, Any] | Outcome:
    """Trains classifiers, prints their accuracy and returns it for results.json; see `linear.run`."""
    options = {"fast": wanted.fast, "beside": True, "devices": devices, "quiet": quiet}
    found = linear.run(of, directory, **options)
    if isinstance(found, Outcome):
        return found
    baselines = _baselines(of, list(found))
    if wanted.fast and wanted.untrained:
        say("\nThe same for the untrained network")
        of_untrained = linear.run(of.untrained(devices), directory.with_name(f"{directory.name}-untrained"), **options)
        if isinstance(of_untrained, Outcome):
            return of_untrained
        for label, result in of_untrained.items():
            baselines[label]["untrained_top1"] = result.best.top1
    say("")
    if not quiet and not jax.process_index():
        report.print_linear(list(found.values()), baselines)
    return {label: result.to_dict() | baselines[label] for label, result in found.items()}


def _baselines(of: Pretrained, labels: list[str]) -> dict[str, dict[str, float]]:
    """Returns label -> what needs no features, in percent.

    `chance` is the accuracy of a guess among all classes, `majority` that of always naming the most frequent class of
    the training images.
    """
    train, test = of.images("train"), of.images("test")
    found: dict[str, dict[str, float]] = {}
    for label in labels:
        count = len(train.label_names[label])
        frequent = np.bincount(train.labels()[label], minlength=count).argmax()
        majority = float(np.mean(test.labels()[label] == frequent))
        found[label] = {"chance": 100 / count, "majority": 100 * majority}
    return found


def readouts(of: Pretrained, devices: _Devices, say: _Say, untrained: bool = False) -> dict[str, dict[str, float]]:
    """Returns the accuracy of logistic regression on the features: label -> top1 in percent, chance and majority.

    A label with too many images for it is left out.

    Args:
      of: what is evaluated.
      devices: devices to run on; None: all.
      say: receives a line for each label.
      untrained: read out the untrained network too, as `untrained_top1`.
    """
    train_source, test_source = of.images("train"), of.images("test")
    labels = pretrained.required_labels(of.config, train_source)

    def top1(of: Pretrained, label: str) -> float:
        train, test = of.features("train", devices), of.features("test", devices)
        return readout.linear_readout(train, train_source.labels()[label], test, test_source.labels()[label])

    found: dict[str, dict[str, float]] = {}
    baselines = _baselines(of, labels)
    for label in labels:
        size, classes = of.features("train", devices).size, len(train_source.label_names[label])
        if size * classes > _READOUT_LIMIT:
            say(f"Logistic regression of {label!r} is skipped: {len(train_source):,} images are too many for it.")
            continue
        found[label] = {"top1": top1(of, label)} | baselines[label]
        if untrained:
            found[label]["untrained_top1"] = top1(of.untrained(devices), label)
        say(f"Logistic regression (L-BFGS) of {label!r}: {found[label]['top1']:.2f} % ({report.beside(found[label])})")
    return found


def nearest_neighbors(
    of: Pretrained, devices: _Devices, say: _Say, untrained: bool = False
) -> dict[str, dict[str, float]]:
    """Returns the accuracy of nearest neighbors: label -> top1 and top5 in percent, and the settings.

    Arguments as for `readouts`.
    """
    settings = of.config.eval
    train_source, test_source = of.images("train"), of.images("test")
    labels = pretrained.required_labels(of.config, train_source)

    def classify(of: Pretrained, label: str) -> dict[str, float]:
        votes = knn.classify(
            of.features("train", devices),
            train_source.labels()[label],
            of.features("test", devices),
            len(train_source.label_names[label]),
            k=settings.neighbors,
            temperature=settings.temperature,
            mesh=of.frozen(devices).mesh,
        )
        truth = test_source.labels()[label]
        return {
            "top1": 100 * float(np.mean(votes.predicted == truth)),
            "top5": 100 * float(np.mean((votes.classes == truth[:, None]).any(axis=1))),
        }

    k = min(settings.neighbors, len(train_source))
    if k < settings.neighbors:
        say(f"There are {k} training images: all of them vote, not eval.neighbors={settings.neighbors}.")
    found: dict[str, dict[str, float]] = {}
    baselines = _baselines(of, labels)
    for label in labels:
        found[label] = classify(of, label) | {
            "k": k,
            "temperature": settings.temperature,
            "train_images": len(train_source),
            "test_images": len(test_source),
        }
        found[label] |= baselines[label]
        if untrained:
            found[label]["untrained_top1"] = classify(of.untrained(devices), label)["top1"]
        top5 = ""
        if linear.has_top5(len(train_source.label_names[label])):
            top5 = f", top-5 {found[label]['top5']:.2f} %"
        say(
            f"{k} nearest neighbors of {label!r}: top-1 {found[label]['top1']:.2f} %{top5}, {len(test_source):,} "
            f"images ({report.beside(found[label])})"
        )
    return found


def _diagnostics(of: Pretrained, output: pathlib.Path, devices: _Devices, say: _Say) -> None:
    found = diagnose(of, devices)
    say(
        f"Alignment {found['alignment']:.3f}, uniformity {found['uniformity']:.3f}; cosine similarity of positives "
        f"{found['positive_mean']:.3f}, of negatives {found['negative_mean']:.3f}; effective rank of the features "
        f"{found['effective_rank']:.1f} of {found['num_features']}"
    )
    settings = {"images": of.config.eval.images, "seed": of.config.linear.seed}
    add_result(output, of, "diagnostics", found, settings)
    if not jax.process_index():
        report.draw_similarities(found, output / "similarities.png")
        with TensorBoardLog(Workdir(output).tensorboard, None) as log:
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


def _neighbors(of: Pretrained, output: pathlib.Path, wanted: Wanted, devices: _Devices, say: _Say) -> None:
    """Draws some held-out images with the training images nearest to them, and writes the names to results.json."""
    test, bank = (of.features(split, devices, wanted.layer) for split in ("test", "train"))
    if jax.process_index():
        return
    train_source, test_source = of.images("train"), of.images("test")
    queries = neighbors.spread(len(test))
    found = neighbors.nearest(test[queries], bank)
    labels = pretrained.chosen_labels(of.config, train_source)
    agree = {
        label: test_source.labels()[label][queries][:, None] == train_source.labels()[label][found.index]
        for label in labels
    }
    report.draw_neighbors(
        test_source.examples(queries)["image"][..., :3],  # without random bits
        [train_source.examples(index)["image"][..., :3] for index in found.index],
        found.similarity,
        agree,
        wanted.neighbors or "",
        title(of, f"held-out images, and the nearest of {len(bank):,} training images"),
    )
    rows = [
        {
            "image": test_source.name(int(query)),
            "neighbors": [
                {"image": train_source.name(int(place)), "similarity": round(float(similarity), 6)}
                for place, similarity in zip(index, of_query, strict=True)
            ],
        }
        for query, index, of_query in zip(queries, found.index, found.similarity, strict=True)
    ]
    add_result(output, of, "neighbors", {"queries": rows}, {"layer": wanted.layer})
    say(
        f"{len(queries)} held-out images with the {found.index.shape[1]} nearest of {len(bank):,} training images "
        f"drawn into {wanted.neighbors}; their names are in {Workdir(output).results}."
    )


def title(of: Pretrained, text: str) -> str:
    """Returns the title of a picture: the run, its step and its method, and on a second line `text`."""
    run = pathlib.Path(of.path).resolve().name
    trained = f"step {of.step:,}" if of.step else "untrained"
    # The config of a PyTorch file has defaults where the file says nothing, among them the method.
    known = of.snapshot.origin is None and of.step
    return f"{run}, {trained}" + (f": {configs.method_name(of.config)}" if known else "") + f"\n{text}"


def _export(of: Pretrained, output: pathlib.Path, wanted: Wanted, devices: _Devices, say: _Say) -> None:
    split = wanted.split or ("test" if has_held_out(of.config.data) else "all")
    features, source = of.features(split, devices, wanted.layer), of.images(split)
    if jax.process_index():
        return
    if wanted.features:
        export.write(wanted.features, features, source)
        say(f"Features of {len(features):,} images, {features.shape[1]} each, written to {wanted.features}.")
    if wanted.map:
        shown, points = export.two_dimensions(features, wanted.map_method)
        labels = pretrained.chosen_labels(of.config, source)
        of_shown = {label: (source.labels()[label][shown], source.label_names[label]) for label in labels}
        images = {"train": "training images", "test": "held-out images", "all": "images"}[split]
        method = {"tsne": "t-SNE", "umap": "UMAP"}[wanted.map_method]
        heading = title(of, f"{method} of the {wanted.layer} features of {len(points):,} {images}")
        chosen = report.thumbnails(points) if not labels else np.array([], int)
        pictures = source.examples(shown[chosen])["image"][..., :3] if len(chosen) else None
        report.draw_map(points, of_shown, wanted.map, heading, chosen, pictures)
        colored = f", colored by {', '.join(labels)}," if labels else ", with some of them,"
        if output.is_dir():  # a map alone makes no directory
            with TensorBoardLog(Workdir(output).tensorboard, None) as log:
                log.write_picture(of.step, "eval/map", wanted.map)
        say(f"A map of {len(points):,} images{colored} drawn into {wanted.map}.")
