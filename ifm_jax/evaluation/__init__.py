"""Evaluation of frozen features: linear evaluation, nearest neighbors, readouts, diagnostics."""

import importlib

TYPE_CHECKING = False  # same as typing's, without its slow import
if TYPE_CHECKING:
    from ifm_jax.evaluation.features import FrozenEncoder, extract
    from ifm_jax.evaluation.readout import linear_readout, linear_readouts

__all__ = ["FrozenEncoder", "extract", "linear_readout", "linear_readouts"]

# Imported at their first use: JAX and scikit-learn take seconds, too long for a command's --help.
_HOMES = {
    "FrozenEncoder": "features",
    "extract": "features",
    "linear_readout": "readout",
    "linear_readouts": "readout",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
