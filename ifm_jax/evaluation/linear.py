"""Linear evaluation: trains linear classifiers on the frozen backbone, following the original's protocol.

The backbone of the query encoder is in evaluation mode. SGD with momentum runs for 60 epochs on random crops (0.08 to 1
of the area) and flips. Accuracy is measured on the `central_view` of every held-out image. The held-out features never
change, so they are computed once.

The fast protocol differs only in the views: those of the first `linear.views` epochs are computed once, kept, and
reused in turn. With as many views as epochs it equals the full protocol.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax import config as configs
from ifm_jax import files, sharding
from ifm_jax.augment import ProbeAugmentation, example_rngs, sparing_bits
from ifm_jax.data import BadImages, steps_per_epoch, training_batches
from ifm_jax.data.protocols import Images, Source, ViewSource
from ifm_jax.data.sources import subset
from ifm_jax.errors import RunError, UsageError
from ifm_jax.evaluation import classifiers
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.pretrained import Pretrained, required_labels
from ifm_jax.models.encoder import Tree
from ifm_jax.runs import checkpoint as checkpoints
from ifm_jax.runs import metrics_log
from ifm_jax.runs.curves import PROBE
from ifm_jax.runs.hosts import together
from ifm_jax.runs.loop import Call, Length, Outcome
from ifm_jax.runs.session import Session
from ifm_jax.runs.workdir import Workdir


class ProbeState(NamedTuple):
    """The state of the training of classifiers.

    Attributes:
      step: int32 scalar, updates done.
      heads: label -> its classifiers.
    """

    step: jax.Array
    heads: dict[str, classifiers.HeadsState]


_Batch = dict[str, jax.Array]
_Features = Callable[[tuple[Tree, Tree], _Batch], jax.Array]  # (backbone weights, batch) -> features
_Step = Callable[[ProbeState, tuple[Tree, Tree], _Batch], tuple[ProbeState, dict[str, jax.Array]]]
_HostBatches = Generator[dict[str, np.ndarray], None, None]


@dataclasses.dataclass(frozen=True)
class Head:
    """One classifier: its training settings and its accuracy.

    Attributes:
      lr: base learning rate.
      weight_decay: weight decay of weights and bias.
      top1: held-out accuracy in percent, after the last epoch.
      top5: the same for the five highest logits.
      best_top1: highest top1 of any epoch.
      best_epoch: number of that epoch, from 1.
      holdout_top1: accuracy in percent on the training images held out for the choice; None without a choice.
    """

    lr: float
    weight_decay: float
    top1: float
    top5: float
    best_top1: float
    best_epoch: int
    holdout_top1: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of linear evaluation for one label.

    Attributes:
      label: name of the label.
      protocol: "full" or "fast".
      classes: number of classes.
      train_images: number of images used to train the classifiers.
      test_images: number of held-out images, each counted once.
      heads: all classifiers.
      chosen: index of the classifier that counts, the best on training images set aside.
    """

    label: str
    protocol: str
    classes: int
    train_images: int
    test_images: int
    heads: tuple[Head, ...]
    chosen: int

    @property
    def best(self) -> Head:
        """The classifier that counts."""
        return self.heads[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and those of the classifier that counts, for JSON."""
        return dataclasses.asdict(self.best) | dataclasses.asdict(self)


def has_top5(classes: int) -> bool:
    """Returns whether top-5 accuracy says anything with so many classes: with five or fewer it is always 100 %."""
    return classes > 5


def grid(config: configs.LinearConfig) -> list[tuple[float, float]]:
    """Returns learning rate and weight decay of every classifier."""
    return list(itertools.product(config.lr, config.weight_decay))


def run(
    checkpoint: Pretrained,
    directory: str | os.PathLike[str],
    *,
    fast: bool = False,
    beside: bool = False,
    devices: list[jax.Device] | None = None,
    quiet: bool = False,
) -> dict[str, Result] | Outcome:
    """Trains classifiers on the frozen backbone, or continues the evaluation in the directory.

    Args:
      checkpoint: checkpoint to evaluate.
      directory: directory for config.json, metrics.jsonl, checkpoints/, tensorboard/ and curves.png.
      fast: use the fast protocol.
      beside: if the directory belongs to another evaluation, use the first of DIRECTORY-2, DIRECTORY-3, ... that does
        not.
      devices: devices to run on; None: all.
      quiet: show no progress on the terminal.

    Returns:
      Label -> result, or if a signal stopped the training, its outcome.

    Raises:
      UsageError: if the images have no labels, or the directory belongs to another evaluation (unless `beside`).
      RunError: if images cannot be read, or the loss is no longer finite.
    """
    probe = _Probe(checkpoint, fast, devices)
    config, frozen, digest = checkpoint.config, probe.frozen, probe.frozen.digest()
    workdir = Workdir(directory, "--output")
    if beside:
        workdir = together(lambda: probe.find(workdir, digest), lambda found: {"directory": str(found)})
    with workdir.held():
        together(lambda: probe.open(workdir, digest))
        # Unlike pre-training this starts from scratch if no checkpoint can be read: everything it needs is available.
        stored, damaged = together(
            lambda: checkpoints.find_whole(workdir.checkpoints),
            lambda found: {"step of the checkpoint": int(found[0].state["step"]) if found[0] else 0},
        )
        notes = workdir.set_aside(damaged)
        first = int(stored.state["step"]) if stored else 0
        epochs, batch_size = config.linear.epochs, config.linear.batch_size
        length = Length(first, epochs * probe.epoch_steps, epochs, probe.epoch_steps, batch_size)
        with Session(workdir, config, length, keep=2, quiet=quiet, group="probe") as session:
            session.say(*notes)
            held = probe.held(session)
            state = probe.start(stored)
            if not length.done:
                step_fn, batches = probe.training(first, session)
                with contextlib.closing(batches):
                    outcome, state = session.run(
                        lambda state, batch: step_fn(state, frozen.weights, batch),
                        state,
                        (Call(sharding.put_batch(frozen.mesh, batch)) for batch in batches),
                        frozen.mesh,
                        evaluate=lambda state: _summary(
                            {part: of.evaluate(state) for part, of in held.items()}, probe.classes
                        ),
                        evaluate_every=probe.epoch_steps,
                        panels=PROBE,
                        remedy="A lower linear.lr may help",
                    )
                if outcome.stopped_by is not None:
                    return outcome
    if frozen.digest() != digest:
        raise RunError("a tensor of the frozen backbone has changed: the evaluation is invalid; please report this bug")
    history = [record["heads"] for record in metrics_log.read(workdir.metrics) if "heads" in record]
    return {label: probe.result(label, history) for label in probe.labels}


class _Probe:
    """The parts of an evaluation: the backbone, the images, the classifiers.

    Args:
      checkpoint: checkpoint to evaluate.
      fast: use the fast protocol.
      devices: devices to run on; None: all.

    Raises:
      UsageError: if the images have no labels or are too few, or the batch does not fit the devices.
    """

    def __init__(self, checkpoint: Pretrained, fast: bool, devices: list[jax.Device] | None):
        self._checkpoint, self._devices, self._config = checkpoint, devices, checkpoint.config
        self._protocol = "fast" if fast else "full"
        linear = self._config.linear
        self.frozen = checkpoint.frozen(devices)
        if linear.batch_size % self.frozen.mesh.size:
            raise UsageError(
                f"linear.batch_size={linear.batch_size} is not a multiple of the {self.frozen.mesh.size} devices: "
                "change it, or use fewer devices"
            )
        every, self._test = checkpoint.images("train"), checkpoint.images("test")
        self.labels = required_labels(self._config, every)
        self.classes = {label: len(every.label_names[label]) for label in self.labels}
        self._combinations = grid(linear)
        kept, self._aside = np.arange(len(every)), None
        if len(self._combinations) > 1:
            order = np.random.default_rng(linear.seed).permutation(len(every))
            count = max(1, round(linear.holdout * len(every)))
            if count >= len(every):
                raise UsageError(
                    f"{len(every)} training images are too few to hold out linear.holdout={linear.holdout:g} of them: "
                    "use more images, or a single classifier"
                )
            self._aside, kept = np.sort(order[:count]), np.sort(order[count:])
        self._kept = kept
        self._train = every if self._aside is None else subset(every, kept)
        self.epoch_steps = steps_per_epoch(len(self._train), linear.batch_size, remainder=True)

    def open(self, workdir: Workdir, digest: str) -> None:
        """Writes the identity of this evaluation, or checks that the directory belongs to it.

        Args:
          workdir: working directory of the evaluation.
          digest: hash of the backbone.

        Raises:
          UsageError: if the directory cannot be written or belongs to another evaluation.
        """
        settings, identity = configs.to_dict(self._config), self._identity(digest)
        known = files.read_json(workdir.evaluation, "pass another --output, or delete it")
        if known is not None and known != identity:
            known, now = configs.flatten(known), configs.flatten(identity)
            differing = [name for name in known | now if known.get(name) != now.get(name)]
            raise UsageError(
                f"{workdir} belongs to another evaluation ({', '.join(differing)} differ): pass another --output, or "
                "delete it"
            )
        if jax.process_index() == 0:
            with workdir.writing():
                files.write_json(workdir.config, settings)
                files.write_json(workdir.evaluation, identity)

    def find(self, first: Workdir, digest: str) -> Workdir:
        """Returns the first directory that is free or this evaluation's: the given one, or one numbered from 2.

        Args:
          first: working directory to begin with.
          digest: hash of the backbone.
        """
        identity = self._identity(digest)
        for number in itertools.count(1):
            path = first.path.with_name(f"{first.path.name}-{number}") if number > 1 else first.path
            workdir = Workdir(path, first.flag)
            if files.read_json(workdir.evaluation, f"pass another {first.flag}, or delete it") in (None, identity):
                return workdir
        raise AssertionError

    def _identity(self, digest: str) -> dict[str, Any]:
        return {
            "protocol": self._protocol,
            "backbone": digest,
            "linear": configs.to_dict(self._config)["linear"],
            "label": self._config.data.label,
            "image_size": self._config.data.image_size,
            "train": self._train.fingerprint,
            "test": self._test.fingerprint,
        }

    def held(self, session: Session) -> dict[str, "_Held"]:
        """Returns the images on which the classifiers are tested: "test", and with several classifiers "holdout"."""
        session.say(f"Features of {len(self._test):,} held-out images")
        held = {"test": _Held(self.frozen, self._features("test"), self._test.labels(), self.labels)}
        if self._aside is not None:
            aside = subset(self._checkpoint.images("train"), self._aside)
            # The fast protocol has the features of all training images anyway.
            fast = self._protocol == "fast"
            features = self._features("train")[self._aside] if fast else extract(self.frozen, aside)
            held["holdout"] = _Held(self.frozen, features, aside.labels(), self.labels)
        return held

    def _features(self, split: str) -> np.ndarray:
        return self._checkpoint.features(split, self._devices)

    def start(self, stored: checkpoints.Stored | None) -> ProbeState:
        """Returns the state from which to continue, on the devices; a new one if nothing is stored."""
        features = self._features("test")

        def create() -> ProbeState:
            return ProbeState(
                jnp.zeros((), jnp.int32),
                {
                    label: classifiers.create(
                        jax.random.fold_in(jax.random.key(self._config.linear.seed), number),
                        len(self._combinations),
                        features.shape[1],
                        len(self._train.label_names[label]),
                        features.dtype,
                    )
                    for number, label in enumerate(self.labels)
                },
            )

        placement = sharding.replicated(self.frozen.mesh)
        if stored is None:
            return jax.jit(create, out_shardings=placement)()
        return sharding.place(checkpoints.fitted(stored.state, jax.eval_shape(create)), placement)

    def training(self, first: int, session: Session) -> tuple[_Step, _HostBatches]:
        """Returns the compiled step, `(state, weights, batch) -> (state, metrics)`, and its batches.

        Args:
          first: steps done before.
          session: shows lines and records unreadable images.
        """
        unreadable = session.bad_images(len(self._train))
        views = _Views(self.frozen, self._config, self._train, self.labels, unreadable)
        if self._protocol == "full":
            batches, features = views.fresh(first), views.features
        else:
            features = lambda weights, batch: batch["features"]  # noqa: E731
            without_views = None if self._config.linear.views else self._features("train")[self._kept]
            batches = views.kept(first, session.say, without_views)
        return _step(self._config, self.labels, self.epoch_steps, self.frozen.mesh, features), batches

    def result(self, label: str, history: list[dict[str, Any]]) -> Result:
        """Returns the result of a label.

        Args:
          label: name of the label.
          history: record of each epoch.
        """
        return _result(label, self._protocol, self._combinations, history, self._train, self._test)


class _Held:
    """Test images for classifiers: their features, computed once, on the devices."""

    def __init__(
        self,
        frozen: FrozenEncoder,
        features: np.ndarray,
        labels: Mapping[str, np.ndarray],
        names: list[str],
        batch_size: int = 1024,
    ):
        self._count, self._mesh = len(features), frozen.mesh
        rows = -(-min(batch_size, self._count) // self._mesh.size) * self._mesh.size
        place = sharding.split(self._mesh)
        self._batches = []
        for begin in range(0, self._count, rows):
            index = np.minimum(begin + np.arange(rows), self._count - 1)
            parts = {"features": features[index], "mask": begin + np.arange(rows) < self._count}
            parts |= {f"label/{name}": labels[name][index] for name in names}
            self._batches.append(
                {
                    name: jax.make_array_from_callback(part.shape, place, lambda where, part=part: part[where])
                    for name, part in parts.items()
                }
            )
        whole = sharding.replicated(self._mesh)

        def count(params: dict[str, dict[str, jax.Array]], batch: _Batch) -> dict[str, dict[str, jax.Array]]:
            return {
                name: classifiers.evaluate(params[name], batch["features"], batch[f"label/{name}"], batch["mask"])
                for name in names
            }

        self._evaluate = jax.jit(count, in_shardings=(whole, place), out_shardings=whole)

    def evaluate(self, state: ProbeState) -> dict[str, dict[str, list[float]]]:
        """Returns, for each label, accuracy in percent of every head: `top1` and `top5`."""
        params = {name: of.params for name, of in state.heads.items()}
        counts = [self._evaluate(params, batch) for batch in self._batches]
        total = jax.tree.map(lambda *parts: np.sum([np.asarray(part) for part in parts], axis=0), *counts)
        return {
            name: {top: (100 * found[top] / self._count).tolist() for top in ("top1", "top5")}
            for name, found in total.items()
        }


class _Views:
    """The training batches: crops of the frozen backbone's images, or their features."""

    def __init__(
        self, frozen: FrozenEncoder, config: configs.Config, source: ViewSource, names: list[str], bad_images: BadImages
    ):
        self._frozen, self._config, self._source, self._bad_images = frozen, config, source, bad_images
        self._labels = {name: source.labels()[name] for name in names}
        dtype = jnp.float64 if config.model.compute_dtype == "float64" else jnp.float32
        self._augment = sparing_bits(ProbeAugmentation(dtype=dtype), configs.random_bits(config.data)[0])

    def _batches(self, source: Images, start: int, bad_images: BadImages | None = None) -> _HostBatches:
        linear = self._config.linear
        return training_batches(
            source,
            linear.batch_size,
            seed=linear.seed,
            start=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=self._config.data.workers,
            processes=self._config.data.processes,
            bad_images=bad_images,
            indices=True,
            remainder=True,
        )

    def _with_labels(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        index = batch["index"]
        return {name: value for name, value in batch.items() if name != "index"} | {
            f"label/{name}": values[index] for name, values in self._labels.items()
        }

    def fresh(self, start: int) -> _HostBatches:
        """Yields crops with labels and weights; every epoch has new crops."""
        for number, batch in enumerate(self._batches(self._source, start, self._bad_images), start):
            yield self._with_labels(batch) | {"number": np.full(len(batch["views"]), number, np.int32)}

    def features(self, weights: tuple[Tree, Tree], batch: _Batch) -> jax.Array:
        """Returns the features of a batch of crops; part of the compiled step."""
        rng = jax.random.fold_in(jax.random.key(self._config.linear.seed), batch["number"][0])
        place = jnp.arange(batch["views"].shape[0], dtype=jnp.int32)
        return self._frozen.apply(weights, self._augment(example_rngs(rng, place), batch["views"][:, 0]))

    def kept(self, start: int, say: Callable[[str], None], features: np.ndarray | None) -> _HostBatches:
        """Computes the features of the first epochs' crops, then yields them in turn with labels and weights.

        Args:
          start: steps done before.
          say: shows a line to the user.
          features: features of the evaluation views, `(N, D)`, to be used without random views; None: with views.
        """
        count, linear = len(self._source), self._config.linear
        stored = self._compute(min(linear.views, linear.epochs), say) if features is None else features[None]
        steps = steps_per_epoch(count, self._config.linear.batch_size, remainder=True)
        order = self._batches(_Order(count), start)
        for number, batch in enumerate(order, start):
            of_batch = stored[number // steps % len(stored), batch["index"]]
            yield self._with_labels({"features": of_batch, "index": batch["index"], "weight": batch["weight"]})

    def _compute(self, views: int, say: Callable[[str], None]) -> np.ndarray:
        """Returns the features of every image's first views, `(views, N, D)`."""
        mesh, count = self._frozen.mesh, len(self._source)
        whole, split = sharding.replicated(mesh), sharding.split(mesh)
        compute = jax.jit(
            lambda weights, batch: (self.features(weights, batch), batch["index"]),
            in_shardings=(whole, split),
            out_shardings=whole,
        )
        steps = steps_per_epoch(count, self._config.linear.batch_size, remainder=True)
        stored = None
        batches = self._batches(self._source, 0, self._bad_images)
        for number in range(views * steps):
            if number % steps == 0:
                say(f"Features of {count:,} training images, view {number // steps + 1} of {views}")
            batch = next(batches)
            batch["number"] = np.full(len(batch["index"]), number, np.int32)
            # Padding copies another row of the batch but has its own flip: only the first copy counts.
            batch["index"] = np.where(batch.pop("weight") > 0, batch["index"], -1)
            features, index = compute(self._frozen.weights, sharding.put_batch(mesh, batch))
            features, index = np.asarray(features), np.asarray(index)
            if stored is None:
                stored = np.empty((views, count, features.shape[1]), features.dtype)
            stored[number // steps, index[index >= 0]] = features[index >= 0]
        batches.close()
        assert stored is not None  # there is at least one view of one image
        return stored


class _Order:
    """A source that has only the order of its images."""

    label_names: dict[str, tuple[str, ...]] = {}  # noqa: RUF012

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns no images."""
        return {"image": np.empty((len(indices), 0), np.uint8)}


def _step(
    config: configs.Config, names: list[str], epoch_steps: int, mesh: jax.sharding.Mesh, features: _Features
) -> _Step:
    """Returns the compiled step, `(state, weights, batch) -> (state, metrics)`."""
    linear = config.linear
    combinations = grid(linear)
    table = classifiers.learning_rates(
        [lr for lr, _ in combinations],
        epochs=linear.epochs,
        steps_per_epoch=epoch_steps,
        milestones=tuple(linear.milestones),
    )
    decay = [weight_decay for _, weight_decay in combinations]

    def step(state: ProbeState, weights: tuple[Tree, Tree], batch: _Batch) -> tuple[ProbeState, dict[str, jax.Array]]:
        of_images = features(weights, batch)
        new: dict[str, classifiers.HeadsState] = {}
        found: dict[str, dict[str, jax.Array]] = {}
        dtype = state.heads[names[0]].params["weight"].dtype  # all heads and the features have this dtype
        lr = jnp.asarray(table, dtype)[state.step]
        for name in names:
            new[name], found[name] = classifiers.update(
                state.heads[name],
                of_images,
                batch[f"label/{name}"],
                lr,
                jnp.asarray(decay, dtype),
                linear.momentum,
                mask=batch["weight"],
            )
        # Use the best classifier: one with too high a learning rate may diverge while the others are fine.
        mean = {
            metric: jnp.mean(jnp.stack([choose(found[name][metric]) for name in names]))
            for metric, choose in (("loss", jnp.nanmin), ("acc1", jnp.nanmax), ("acc5", jnp.nanmax))
        }
        return ProbeState(state.step + 1, new), mean | {"lr": lr[0]}

    whole, split = sharding.replicated(mesh), sharding.split(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, whole, split), out_shardings=(whole, whole))


def _summary(found: dict[str, dict[str, dict[str, list[float]]]], classes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the record of an epoch: the accuracy of the best classifier so far and of all of them.

    Top-5 is left out for a label with too few `classes`.
    """
    record: dict[str, Any] = {}
    for name, test in found["test"].items():
        chosen = int(np.argmax(found.get("holdout", found["test"])[name]["top1"]))
        suffix = "" if len(found["test"]) == 1 else f"/{name}"
        record[f"val_acc1{suffix}"] = test["top1"][chosen]
        if has_top5(classes[name]):
            record[f"val_acc5{suffix}"] = test["top5"][chosen]
    if len(found["test"]) > 1:
        for top in ("val_acc1", "val_acc5"):
            if of_labels := [value for name, value in record.items() if name.startswith(f"{top}/")]:
                record[top] = float(np.mean(of_labels))
    return record | {"heads": found}


def _result(
    label: str,
    protocol: str,
    combinations: Sequence[tuple[float, float]],
    history: list[dict[str, Any]],
    source: Source,
    test: Source,
) -> Result:
    """Combines the records of all epochs into a result."""
    top1 = np.array([record["test"][label]["top1"] for record in history])  # (epochs, heads)
    last = history[-1]
    aside = last["holdout"][label]["top1"] if "holdout" in last else None
    made = tuple(
        Head(
            lr=lr,
            weight_decay=weight_decay,
            top1=float(top1[-1, number]),
            top5=last["test"][label]["top5"][number],
            best_top1=float(top1[:, number].max()),
            best_epoch=int(top1[:, number].argmax()) + 1,
            holdout_top1=aside[number] if aside else None,
        )
        for number, (lr, weight_decay) in enumerate(combinations)
    )
    chosen = int(np.argmax(aside)) if aside else 0
    return Result(label, protocol, len(source.label_names[label]), len(source), len(test), made, chosen)
