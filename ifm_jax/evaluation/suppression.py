"""Which features a run has learned and which it has suppressed: linear readouts of every label, run by run.

Robinson et al. 2021, section 4.2: on images with several independent labels, a contrastive encoder may do well with one
of them and leave the others; how much of each is linearly readable shows it.
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np

from ifm_jax import data, training
from ifm_jax.checkpoint import Checkpoints, abstract_state
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.readout import linear_readouts
from ifm_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Readouts:
    """The linear readouts of one encoder.

    Attributes:
      name: of the run.
      step: updates it had; 0: untrained.
      accuracy: label -> held-out accuracy in percent.
    """

    name: str
    step: int
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over the labels."""
        return float(np.mean(list(self.accuracy.values())))

    @property
    def worst(self) -> float:
        """The label read out worst."""
        return min(self.accuracy.values())

    def to_dict(self) -> dict:
        """Returns the fields and the two summaries, for JSON."""
        return dataclasses.asdict(self) | {"mean": self.mean, "worst": self.worst}


def read_out(name: str, config: Config, train_state: TrainState) -> Readouts:
    """Reads every label of the config's source out of the frozen backbone of the query encoder.

    Args:
      name: for the result.
      config: a resolved config.
      train_state: whose query encoder is read.

    Raises:
      UsageError: if the source has no labels.
    """
    train_source, test_source = data.open_source(config.data, "train"), data.open_source(config.data, "test")
    if not train_source.label_names:
        raise UsageError(f"data.source={config.data.source!r} has no labels: expected a source with labels to read out")
    function = FrozenEncoder(training.make_encoder(config), train_state.params, train_state.batch_stats)
    accuracy = linear_readouts(
        extract(function, train_source), train_source.labels(), extract(function, test_source), test_source.labels()
    )
    return Readouts(name, int(train_state.step), accuracy)


def read_out_untrained(config: Config) -> Readouts:
    """Reads out the network that the config's runs start from."""
    return read_out("untrained", config, jax.jit(training.state_creator(config))())


def read_out_workdir(workdir: str | os.PathLike, name: str | None = None) -> Readouts:
    """Reads out the newest checkpoint of a run.

    Args:
      workdir: of the run.
      name: for the result; None: the directory's.

    Raises:
      UsageError: if there is no run or no checkpoint there.
    """
    config, train_state = restore(workdir)
    return read_out(name or pathlib.Path(workdir).resolve().name, config, train_state)


def restore(workdir: str | os.PathLike) -> tuple[Config, TrainState]:
    """Returns the config and the newest state of a run, on this process's first device.

    Raises:
      UsageError: if there is no run or no checkpoint there.
    """
    config = training.read_config(workdir)
    training.configure_jax(config.model.compute_dtype)
    placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with Checkpoints(pathlib.Path(workdir) / training.CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UsageError(f"{workdir}: no checkpoint there yet; expected a run that has saved one")
        return config, checkpoints.restore(step, abstract_state(training.state_creator(config), placement))
