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
from ifm_jax.data.sources import SPLITS, Source, ViewSource, open_views, subset
from ifm_jax.errors import UsageError
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.runs import loading, snapshot
from ifm_jax.runs.snapshot import Snapshot

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
        """Returns the labeled images of a split; see `labeled`."""
        return self._once(("images", split), lambda: labeled(self.config, split))

    def features(self, split: str, devices: list[jax.Device] | None = None, layer: str = "backbone") -> np.ndarray:
        """Returns the features of the labeled images of a split, `(images, features)`, extracted once.

        Args:
          split: "train" or "test".
          devices: see `frozen`.
          layer: likewise.
        """
        return self._once(
            self._key(split, devices, layer), lambda: extract(self.frozen(devices, layer), self.images(split))
        )

    def has_features(self, split: str, devices: list[jax.Device] | None = None) -> bool:
        """Returns whether the features of the backbone are extracted already; arguments as for `features`."""
        return self._key(split, devices, "backbone") in self._known

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


def labeled(config: Config, split: str, count: int = 1, least_area: float = PROBE_LEAST_AREA) -> ViewSource:
    """Returns the labeled images of a split, for evaluation or to train a classifier.

    Args:
      config: validated config.
      split: "train" or "test".
      count: number of views per image.
      least_area: least area of a view, relative to the image's.

    Returns:
      The source; if `data.label` names a label, the source has only that one.

    Raises:
      UsageError: if there are no labels, no label of that name, or no images.
    """
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    source = open_views(config.data, split, count=count, least_area=least_area)
    said = f"data.source={config.data.source!r}"
    if not source.label_names:
        raise UsageError(f"{said} has no labels: expected a source with labels, such as a folder for each class")
    chosen_labels(config, source)
    known = np.all([values >= 0 for values in source.labels().values()], axis=0)
    if split == "train" and config.data.limit:
        known[config.data.limit :] = False
    if not known.any():
        raise UsageError(f"{said}: none of its {len(source)} {split} images has a label; expected labeled ones")
    return source if known.all() else subset(source, np.flatnonzero(known))


def chosen_labels(config: Config, source: Source) -> list[str]:
    """Returns the names of the labels to evaluate.

    Raises:
      UsageError: if the source lacks the label that the config names.
    """
    if config.data.label and config.data.label not in source.label_names:
        raise UsageError(
            f"data.label={config.data.label!r} is not a label of data.source={config.data.source!r}: expected one of "
            f"{', '.join(source.label_names)}"
        )
    return [config.data.label] if config.data.label else list(source.label_names)
