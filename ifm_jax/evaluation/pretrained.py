"""The inputs of an evaluation: a frozen encoder from any kind of checkpoint, and labeled images."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ifm_jax import assembly, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data.holdout import open_evaluated
from ifm_jax.data.protocols import Source, ViewSource
from ifm_jax.data.sources import ViewSubset, subset
from ifm_jax.errors import UsageError
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.runs import loading, snapshot
from ifm_jax.runs.snapshot import Snapshot

WITHOUT_LABELS = "--neighbors=FILE.png, --map=FILE.png, --features=FILE.npz and --diagnostics"
PROBE_LEAST_AREA = 0.08  # of a training crop, relative to the image's


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint and the config for its evaluation.

    Attributes:
      config: resolved config; it describes the checkpoint's network.
      snapshot: snapshot of a run, one of its checkpoints, or a PyTorch file.
      path: path of the checkpoint.
    """

    config: Config
    snapshot: Snapshot
    path: str
    _known: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        """Number of updates in its training."""
        return int(self.snapshot.state.step)

    def frozen(self, devices: list[jax.Device] | None = None, layer: str = "backbone") -> FrozenEncoder:
        """Returns its query encoder.

        Args:
          devices: devices to run on; None: all.
          layer: one of `features.LAYERS`.
        """

        def make() -> FrozenEncoder:
            return FrozenEncoder(
                assembly.make_encoder(self.config),
                self.snapshot.state.params,
                self.snapshot.state.batch_stats,
                mesh=sharding.make_mesh(devices),
                layer=layer,
            )

        return self._once(self._key("encoder", devices, layer), make)

    def images(self, split: str) -> ViewSource:
        """Returns the images of a split; see `evaluated`."""
        return self._once(("images", split), lambda: evaluated(self.config, split))

    def features(self, split: str, devices: list[jax.Device] | None = None, layer: str = "backbone") -> np.ndarray:
        """Returns the features of the images of a split, `(images, features)`, extracted once.

        Args:
          split: see `evaluated`.
          devices: see `frozen`.
          layer: likewise.
        """
        return self._once(
            self._key(split, devices, layer), lambda: extract(self.frozen(devices, layer), self.images(split))
        )

    def has_features(self, split: str, devices: list[jax.Device] | None = None) -> bool:
        """Returns whether the features of the backbone are extracted already; arguments as for `features`."""
        return self._key(split, devices, "backbone") in self._known

    def untrained(self, devices: list[jax.Device] | None = None) -> "Pretrained":
        """Returns the network as a run of this config and seed begins, with random weights, for the same images.

        Args:
          devices: see `frozen`.
        """

        def make() -> Pretrained:
            frozen, create = self.frozen(devices), assembly.state_creator(self.config)
            params, batch_stats = jax.jit(
                lambda: (create().params, create().batch_stats), out_shardings=sharding.replicated(frozen.mesh)
            )()
            state = self.snapshot.state._replace(
                step=np.int32(0), params=params, batch_stats=batch_stats, opt_state=None
            )
            fresh = Pretrained(self.config, dataclasses.replace(self.snapshot, state=state), "untrained")
            fresh._known[self._key("encoder", devices, "backbone")] = frozen.holding(params, batch_stats)
            for split in ("train", "test"):
                fresh._known["images", split] = self.images(split)
            return fresh

        return self._once(self._key("untrained", devices, "backbone"), make)

    @staticmethod
    def _key(split: str, devices: list[jax.Device] | None, layer: str) -> tuple[Any, ...]:
        return split, layer, None if devices is None else tuple(device.id for device in devices)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def load(path: str | os.PathLike[str], config: Config | None = None, prefix: str = "") -> Pretrained:
    """Reads the checkpoint to evaluate.

    Args:
      path: a run's workdir (its newest checkpoint), one of its checkpoints, or a `.pth.tar`.
      config: config of the evaluation; None: the checkpoint's own. Fields of the network that have their default follow
        the checkpoint.
      prefix: what the network's names in a PyTorch file begin with; see `loading.read`.

    Raises:
      UsageError: if there is nothing to read at `path`, or the config describes another network.
    """
    return of_snapshot(loading.read(path, prefix=prefix), config, os.fspath(path))


def of_snapshot(found: Snapshot, config: Config | None, path: str) -> Pretrained:
    """Returns a snapshot with the config for its evaluation.

    Args:
      found: snapshot to evaluate.
      config: see `load`.
      path: path of the snapshot, for results and errors.

    Raises:
      UsageError: if the config describes another network.
    """
    config = configs.from_dict(configs.to_dict(found.config if config is None else config))
    plain = Config()
    if config.method == plain.method:
        config.method = found.config.method
    own = snapshot.structure(found.config)
    for name, given in snapshot.structure(config).items():
        if name in own and given == configs.get_field(plain, name):
            configs.set_field(config, name, own[name])
    snapshot.check_config(config, found, path)
    configs.validate(config)
    config = assembly.resolve(config, found.config if found.config.model.compute_dtype != "auto" else None)
    assembly.configure_jax(config.model.compute_dtype)
    return Pretrained(config, found, path)


def evaluated(config: Config, split: str, count: int = 1, least_area: float = PROBE_LEAST_AREA) -> ViewSource:
    """Returns the images of a split for evaluation: the labeled ones, or if the source has no labels, all of them.

    Where a source has no held-out images of its own, a tenth of its training images is held out; see `data.holdout`.

    Args:
      config: validated config.
      split: "train", "test" or, where the source has one set of images only, "all".
      count: number of views per image.
      least_area: least area of a view, relative to the image's.

    Returns:
      The source.

    Raises:
      UsageError: if there is no label of the name in `data.label`, or there are no images.
    """
    source = open_evaluated(config.data, split, count=count, least_area=least_area)
    if not chosen_labels(config, source):
        return source
    known = np.all([values >= 0 for values in source.labels().values()], axis=0)
    if not known.any():
        raise UsageError(
            f"data.source={config.data.source!r}: none of its {len(source)} {split} images has a label; expected "
            "labeled ones"
        )
    if known.all():
        return source
    if isinstance(source, ViewSubset):
        return subset(source.source, source.indices[known])
    return subset(source, np.flatnonzero(known))


def labeled(config: Config, split: str) -> ViewSource:
    """Returns the labeled images of a split; see `evaluated`.

    Raises:
      UsageError: if there are no labels, no label of the name in `data.label`, or no images.
    """
    source = evaluated(config, split)
    required_labels(config, source)
    return source


def required_labels(config: Config, source: Source) -> list[str]:
    """Returns the names of the labels to evaluate, at least one.

    Raises:
      UsageError: if there is none, or one that all images share, or the source lacks the label that the config names.
    """
    said = f"data.source={config.data.source!r}"
    if not (names := chosen_labels(config, source)):
        raise UsageError(
            f"{said} has no labels, which --knn, --fast, the linear protocol and eval.every need: expected a folder "
            f"for each class; {WITHOUT_LABELS} need none"
        )
    for name in names:
        if len(source.label_names[name]) < 2:
            raise UsageError(
                f"{said} has a single {name}, {source.label_names[name][0]!r}, so there is nothing to classify: "
                f"expected at least two; {WITHOUT_LABELS} need none"
            )
    return names


def chosen_labels(config: Config, source: Source) -> list[str]:
    """Returns the names of the labels to evaluate; none if the source has no labels.

    Raises:
      UsageError: if the source lacks the label that the config names.
    """
    if config.data.label and config.data.label not in source.label_names:
        raise UsageError(
            f"data.label={config.data.label!r} is not a label of data.source={config.data.source!r}: expected "
            + (f"one of {', '.join(source.label_names)}" if source.label_names else "none, since it has no labels")
        )
    return [config.data.label] if config.data.label else list(source.label_names)
