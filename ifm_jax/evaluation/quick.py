"""Nearest neighbors and linear readouts of a backbone, as a Python function."""

import os

import jax
import numpy as np
from flax import nnx

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate as evaluation
from ifm_jax.evaluation import pretrained
from ifm_jax.methods import MoCoMemory
from ifm_jax.models import ARCHITECTURES, ResNet, without_head
from ifm_jax.pretrain import TrainState
from ifm_jax.runs import loading
from ifm_jax.runs.snapshot import Snapshot


def evaluate(
    model: str | os.PathLike[str] | ResNet,
    source: str = "",
    *,
    config: Config | None = None,
    image_size: int = 0,
    label: str = "",
    knn: bool = True,
    readout: bool = True,
    prefix: str = "",
    devices: list[jax.Device] | None = None,
    quiet: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates a frozen backbone on labeled images by the two protocols that train no network.

    Both use the features of the evaluation view, extracted once. The original's linear protocol, which takes hours, is
    `eval_linear.py`; docs/evaluation.md compares them. Nothing is written.

    Args:
      model: anything that `ifm_jax.load` reads, or what it returns: a live `ResNet`.
      source: images, as in `data.source`: "folder:PATH", "array:FILE.npz", "tfds:NAME", "trifeature"; empty: those of
        `config`.
      config: its `data` and `eval` say which images, which label, how many neighbors at which temperature; None: the
        run's own config, and for a PyTorch file or a live model the defaults. It is not changed.
      image_size: side of the images in pixels; 0: that of `config`.
      label: label to evaluate; empty: all, or that of `config`.
      knn: whether to classify by nearest neighbors (Wu et al. 2018), `eval.neighbors` of them.
      readout: whether to fit a logistic regression on standardized features.
      prefix: what the network's names in a PyTorch file begin with; see `ifm_jax.load`.
      devices: devices to run on; None: all.
      quiet: print nothing.

    Returns:
      `{"knn": {label: {"top1", "top5", ...}}, "logistic_regression": {label: {"top1"}}}`, held-out accuracy in
      percent, as in results.json.

    Raises:
      UsageError: if there is nothing to read, or the images have no labels.
      RunError: if images cannot be read.

    Example:
      >>> ifm_jax.evaluate("runs/trifeature")["knn"]["shape"]["top1"]      # doctest: +SKIP
    """
    if isinstance(model, ResNet):
        found, path = _snapshot(model), f"a live {type(model).__name__}"
    else:
        found, path = loading.read(model, prefix=prefix), os.fspath(model)
    config = configs.from_dict(configs.to_dict(found.config if config is None else config))
    config.data.source = source or config.data.source
    config.data.image_size = image_size or config.data.image_size
    config.data.label = label or config.data.label
    of = pretrained.of_snapshot(found, config, path)

    def say(text: str) -> None:
        if not quiet and not jax.process_index():
            print(text)

    results: dict[str, dict[str, dict[str, float]]] = {}
    if knn:
        results["knn"] = evaluation.nearest_neighbors(of, devices, say)
    if readout:
        results["logistic_regression"] = evaluation.readouts(of, devices, say)
    return results


def _snapshot(model: ResNet) -> Snapshot:
    """Returns a snapshot with the backbone of a live model."""
    config = Config()
    names = [name for name, each in ARCHITECTURES.items() if each._replace(width=model.arch.width) == model.arch]
    if not names:
        raise UsageError(f"{model.arch} is not one of ifm_jax.models.ARCHITECTURES: expected a network of these")
    config.model.arch, config.model.stem = names[0], model.stem
    config.model.width = 0 if ARCHITECTURES[names[0]] == model.arch else model.arch.width
    _, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, batch_stats = (without_head(jax.tree.map(np.asarray, nnx.to_pure_dict(state))) for state in states)
    nothing = MoCoMemory(None, None, None, None)
    return Snapshot(config, TrainState(np.int32(0), params, batch_stats, None, nothing))
