"""Evaluation of frozen features: linear evaluation, nearest neighbors, readouts, diagnostics."""

from ifm_jax.evaluation.features import FrozenEncoder, extract
from ifm_jax.evaluation.readout import linear_readout, linear_readouts

__all__ = ["FrozenEncoder", "extract", "linear_readout", "linear_readouts"]
