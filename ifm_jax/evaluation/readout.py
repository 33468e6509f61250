"""Linear readouts: how well a linear classifier can read each label from a frozen representation.

This follows Hermann and Lampinen (2020) and Robinson et al. (2021, section 4.2): one classifier for each of shape,
texture and color on the features before the projection head, and its accuracy on held-out images.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@dataclasses.dataclass(frozen=True)
class Readouts:
    """The linear readouts of one encoder, or their mean over seeds.

    Attributes:
      name: name of the run.
      step: number of updates; 0: untrained.
      accuracy: label -> held-out accuracy in percent.
      seed: seed of the run.
    """

    name: str
    step: int
    accuracy: dict[str, float]
    seed: int = 0

    @property
    def mean(self) -> float:
        """The mean over the labels."""
        return float(np.mean(list(self.accuracy.values())))

    @property
    def worst(self) -> float:
        """The label read out worst."""
        return min(self.accuracy.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the two summaries, for JSON."""
        return dataclasses.asdict(self) | {"mean": self.mean, "worst": self.worst}


def linear_readout(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    l2: float = 1e-3,
    max_iter: int = 300,
) -> float:
    """Returns the held-out accuracy, in percent, of a multinomial logistic regression on standardized features.

    Args:
      train_features: `(N, D)`.
      train_labels: int `(N,)`.
      test_features: `(M, D)`.
      test_labels: int `(M,)`.
      l2: penalty on the weights, relative to the mean loss.
      max_iter: greatest number of iterations of the L-BFGS solver.
    """
    if len(known := np.unique(train_labels)) == 1:  # of a few images; the solver needs at least two classes
        return 100.0 * float(np.mean(test_labels == known[0]))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * len(train_labels)), max_iter=max_iter))
    classifier.fit(train_features, train_labels)
    return 100.0 * float(np.mean(classifier.predict(test_features) == test_labels))


def linear_readouts(
    train_features: np.ndarray,
    train_labels: Mapping[str, np.ndarray],
    test_features: np.ndarray,
    test_labels: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Returns the held-out accuracy in percent for every label; arguments as for `linear_readout`."""
    return {
        name: linear_readout(train_features, train_labels[name], test_features, test_labels[name])
        for name in train_labels
    }
