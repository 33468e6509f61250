"""Evaluation during pre-training: nearest neighbors and a linear readout on frozen features of some of the images.

Nothing is trained along with the encoder, so the steps in between cost no more and no extra gradient reaches it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ifm_jax import assembly
from ifm_jax.config import Config
from ifm_jax.data.sources import drawn
from ifm_jax.evaluation import diagnostics, knn
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.pretrained import chosen_labels, labeled
from ifm_jax.pretrain import DeviceState

# A feature counts as erased once so much of its readout above chance is lost: a shape read out with 99 instead of 100 %
# may be a significant loss on many images, but it is still there.
_ERASED_SHARE = 0.2


class OnlineEvaluation:
    """Evaluates a state of pre-training: `(state) -> record`.

    Args:
      config: resolved config.
      mesh: mesh of the devices.

    Attributes:
      labels: names of the labels that are read out.
      before: `readouts` of the network with which the run started, from which gains count; None: no gains.

    Raises:
      UsageError: if the source has no labels, or no held-out images.
    """

    before: Mapping[str, float] | None = None

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._frozen: FrozenEncoder | None = None
        self._sources = [drawn(labeled(config, split), config.eval.images, config.seed) for split in ("train", "test")]
        self.labels = chosen_labels(config, self._sources[0])

    @property
    def measures(self) -> tuple[str, ...]:
        """The names in a record by which the best checkpoint can be chosen."""
        single = [f"{kind}/{label}" for label in self.labels for kind in ("knn", "linear")]
        return ("knn", "linear", *(single if len(self.labels) > 1 else ()), "effective_rank")

    def __call__(self, state: DeviceState[Any]) -> dict[str, Any]:
        """Evaluates the query encoder.

        Args:
          state: state on the devices of the mesh.

        Returns:
          `knn` and `linear`, held-out accuracy in percent (with several labels their mean, and each one as
          `knn/<label>`, `linear/<label>`): weighted nearest neighbors, and ridge regression on standardized features
          in closed form; `effective_rank` of the held-out features. With `before`, also the differences from it in
          points, `gain` of the linear readout and `knn_gain` of the neighbors (with several labels `gain/<label>`,
          `knn_gain/<label>` too), and `erased`, the labels that training has erased, if there are any.
        """
        found = self.readouts(state)
        record: dict[str, Any] = self._with_means("knn", "linear", found)
        record["effective_rank"] = found["effective_rank"]
        if self.before is None:
            return record
        gains = {
            f"{gain}/{label}": found[f"{kind}/{label}"] - self.before[f"{kind}/{label}"]
            for label in self.labels
            for gain, kind in (("gain", "linear"), ("knn_gain", "knn"))
        }
        record |= self._with_means("gain", "knn_gain", gains)
        of_test = self._sources[1].labels()
        gone = [
            label
            for label in self.labels
            if erased(self.before[f"linear/{label}"], found[f"linear/{label}"], of_test[label])
        ]
        return record | ({"erased": gone} if gone else {})

    def _with_means(self, first: str, second: str, found: Mapping[str, float]) -> dict[str, float]:
        """Returns the means of two kinds of numbers over the labels, and if there are several labels, each number."""
        each = {f"{kind}/{label}": found[f"{kind}/{label}"] for label in self.labels for kind in (first, second)}
        means = {kind: float(np.mean([each[f"{kind}/{label}"] for label in self.labels])) for kind in (first, second)}
        return means | each if len(self.labels) > 1 else means

    def readouts(self, state: DeviceState[Any]) -> dict[str, float]:
        """Reads every label out of the query encoder.

        Args:
          state: state on the devices of the mesh.

        Returns:
          `knn/<label>` and `linear/<label>` for every label, also for a single one, and `effective_rank`; see
          `__call__`.
        """
        if self._frozen is None:
            encoder = assembly.make_encoder(self._config)
            self._frozen = FrozenEncoder(encoder, state.params, state.batch_stats, mesh=self._mesh)
        frozen = self._frozen.holding(state.params, state.batch_stats)
        train, test = (extract(frozen, source) for source in self._sources)
        found: dict[str, float] = {}
        for label in self.labels:
            of_train, of_test = (source.labels()[label] for source in self._sources)
            votes = knn.classify(
                train,
                of_train,
                test,
                len(self._sources[0].label_names[label]),
                k=self._config.eval.neighbors,
                temperature=self._config.eval.temperature,
                mesh=self._mesh,
            )
            found[f"knn/{label}"] = 100 * float(np.mean(votes.predicted == of_test))
            readout = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1e-3 * len(train)))
            found[f"linear/{label}"] = 100 * float(readout.fit(train, of_train).score(test, of_test))
        return found | {"effective_rank": diagnostics.effective_rank(test)}


def erased(before: float, now: float, labels: np.ndarray) -> bool:
    """Returns whether training has erased a feature that the network had before.

    Three conditions: before training, the readout was above chance by more than two standard errors; since then it has
    fallen by more than two standard errors; and by at least a fifth of what it was above chance. A standard error is
    that of a proportion of the held-out images, or of the difference of two independent ones. Both readouts are of the
    same images, so the true error of their difference is smaller, and a warning is rarely false.

    Args:
      before: held-out accuracy in percent before training.
      now: held-out accuracy in percent now.
      labels: labels of the held-out images, `(N,)`; always guessing their most frequent one is chance.
    """
    count = len(labels)
    chance = 100 * np.unique(labels, return_counts=True)[1].max() / count
    variance, variance_now = (accuracy * (100 - accuracy) / count for accuracy in (before, now))
    had, lost = before - chance, before - now
    significant = had > 2 * math.sqrt(variance) and lost > 2 * math.sqrt(variance + variance_now)
    return bool(significant and lost >= _ERASED_SHARE * had)
