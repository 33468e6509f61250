"""Evaluation during pre-training: nearest neighbors and a linear readout on frozen features of some of the images.

Nothing is trained along with the encoder, so the steps in between cost no more and no extra gradient reaches it.
"""

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


class OnlineEvaluation:
    """Evaluates a state of pre-training: `(state) -> record`.

    Args:
      config: resolved config.
      mesh: mesh of the devices.

    Raises:
      UsageError: if the source has no labels, or no held-out images.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._frozen: FrozenEncoder | None = None
        self._sources = [drawn(labeled(config, split), config.eval.images, config.seed) for split in ("train", "test")]
        self._labels = chosen_labels(config, self._sources[0])

    @property
    def measures(self) -> tuple[str, ...]:
        """The names in a record."""
        single = [f"{kind}/{label}" for label in self._labels for kind in ("knn", "linear")]
        return ("knn", "linear", *(single if len(self._labels) > 1 else ()), "effective_rank")

    def __call__(self, state: DeviceState[Any]) -> dict[str, float]:
        """Evaluates the query encoder.

        Args:
          state: state on the devices of the mesh.

        Returns:
          `knn` and `linear`, held-out accuracy in percent (with several labels their mean, and each one as
          `knn/<label>`, `linear/<label>`): weighted nearest neighbors, and ridge regression on standardized features
          in closed form; `effective_rank` of the held-out features.
        """
        if self._frozen is None:
            encoder = assembly.make_encoder(self._config)
            self._frozen = FrozenEncoder(encoder, state.params, state.batch_stats, mesh=self._mesh)
        frozen = self._frozen.holding(state.params, state.batch_stats)
        train, test = (extract(frozen, source) for source in self._sources)
        record: dict[str, float] = {}
        for label in self._labels:
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
            record[f"knn/{label}"] = 100 * float(np.mean(votes.predicted == of_test))
            readout = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1e-3 * len(train)))
            record[f"linear/{label}"] = 100 * float(readout.fit(train, of_train).score(test, of_test))
        means = {
            kind: float(np.mean([record[f"{kind}/{label}"] for label in self._labels])) for kind in ("knn", "linear")
        }
        if len(self._labels) == 1:
            record = {}
        return means | record | {"effective_rank": diagnostics.effective_rank(test)}
