"""Watches the health of a run: knows its metrics at chance level, and warns if they stay there."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ifm_jax.methods import Method

LEAST_WINDOW = 20  # logged steps; single steps are noisy
_RISE = 0.05  # of the loss, relative, over the lowest mean since the queue was full
_NEAR_CHANCE = 3.0  # times chance level
_EPOCHS = 2  # before a warning about contrast accuracy at chance


class Health:
    """Watches the logged metrics of one run.

    Args:
      negatives: number of negatives per query, K.
      images: number of images in the training set.
      queue: whether the negatives come from a queue.
      full_step: step after which all negatives are real keys; 0: from the start.
      window: number of logged steps in a mean; those of an epoch, so that its order does not matter.
      remedy: advice for the user when training erases a feature, a sentence.
    """

    def __init__(
        self,
        negatives: int,
        images: int,
        *,
        queue: bool,
        full_step: int,
        window: int = LEAST_WINDOW,
        remedy: str = "A lower temperature or more epochs may bring it back.",
    ):
        self._negatives, self._images, self._queue, self.full_step = negatives, images, queue, full_step
        self._remedy = remedy
        self._window = max(window, LEAST_WINDOW)
        self._losses: collections.deque[float] = collections.deque(maxlen=self._window)
        self._accuracies: collections.deque[float] = collections.deque(maxlen=self._window)
        self._lowest = math.inf
        self._warned: set[str] = set()

    @classmethod
    def of(cls, method: Method[Any], batch_size: int, images: int, window: int, remedy: str) -> "Health":
        """Returns the `Health` of a run of a method.

        Args:
          method: method of the run.
          batch_size: number of images in a global batch.
          images: number of images in the training set.
          window: number of logged steps in an epoch.
          remedy: advice for the user when training erases a feature, a sentence.
        """
        full_step = method.full_step(batch_size)
        queue = full_step > 0
        return cls(method.negatives(batch_size), images, queue=queue, full_step=full_step, window=window, remedy=remedy)

    @property
    def chance(self) -> float:
        """InfoNCE loss of embeddings that distinguish nothing: log(1 + K)."""
        return math.log1p(self._negatives)

    def introduction(self) -> list[str]:
        """Returns the messages for the user at the start, one per line."""
        lines = [
            f"Chance level: InfoNCE {self.chance:.2f} (the logarithm of 1 + {self._negatives:,} negatives), contrast "
            f"accuracy {100 / (1 + self._negatives):.2g} %."
        ]
        if self.full_step:
            lines.append(
                "The queue starts with random vectors, which are easy negatives: the loss is low at first and rises "
                f"until step {self.full_step:,}, when all keys in the queue are real."
            )
        if self._queue and self._negatives > self._images:
            lines.append(
                f"Warning: the queue holds {self._negatives:,} keys, more than the {self._images:,} images: an image's "
                "own earlier keys are among its negatives. A moco.queue_size below the number of images avoids this."
            )
        return lines

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        """Processes a logged record; returns warnings, each only once per run.

        Args:
          record: record with `step`, `epoch`, `loss_clean` and `acc1`, as in metrics.jsonl, and what an evaluation
            found, if there was one.
        """
        return self._of_features(record) + self._of_training(record)

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes note of the warnings about features that an earlier process of the run has given.

        Args:
          records: records of that process.
        """
        for record in records:
            self._of_features(record)

    def _of_features(self, record: Mapping[str, Any]) -> list[str]:
        said: list[str] = []
        for label in record.get("erased", ()):
            now, gain = (record.get(f"{name}/{label}", record.get(name)) for name in ("linear", "gain"))
            if now is not None and gain is not None:
                said += self._once(
                    f"erased {label}",
                    f"Warning: training has erased {label}, in whole or in part: a linear readout finds "
                    f"{now - gain:.1f} % before training, {now:.1f} % after step {record['step']}. {self._remedy}",
                )
        return said

    def _of_training(self, record: Mapping[str, Any]) -> list[str]:
        if record["step"] <= self.full_step:
            return []
        self._losses.append(record["loss_clean"])
        self._accuracies.append(record["acc1"])
        if len(self._losses) < self._window:
            return []
        loss, accuracy = (sum(values) / self._window for values in (self._losses, self._accuracies))
        self._lowest = min(self._lowest, loss)
        said = []
        if loss > (1 + _RISE) * self._lowest:
            since = "since the queue became full" if self.full_step else "since the start"
            said += self._once(
                "rise",
                f"Warning: the loss rises, from {self._lowest:.3f} to {loss:.3f} {since} (InfoNCE, means of "
                f"{self._window} logged steps). A lower optim.lr, or a moco.momentum nearer 1 with MoCo, may help.",
            )
        if record["epoch"] >= _EPOCHS and accuracy <= _NEAR_CHANCE * 100 / (1 + self._negatives):
            said += self._once(
                "chance",
                f"Warning: contrast accuracy is {accuracy:.2g} % after {record['epoch']:.3g} epochs, about chance: the "
                "encoder does not tell the views of one image from those of others. Check the images and their "
                "augmentation; a higher optim.lr may help, or a lower one after a collapse.",
            )
        return said

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._warned:
            return []
        self._warned.add(name)
        return [text]
