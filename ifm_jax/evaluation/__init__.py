"""What the frozen features hold: linear readouts on them."""

from ifm_jax.evaluation.features import backbone, extract
from ifm_jax.evaluation.readout import linear_readout, linear_readouts

__all__ = ["backbone", "extract", "linear_readout", "linear_readouts"]
