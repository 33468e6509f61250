"""Studies: does a change of method change what an encoder learns? Sources x arms x seeds, compared in pairs."""

from ifm_jax.studies.study import Comparison, Run, Study

__all__ = ["Comparison", "Run", "Study"]
