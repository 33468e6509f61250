"""Which features runs have learned and suppressed: linear readouts of every label, methods compared over seeds.

    python -m ifm_jax.evaluation.suppression WORKDIR [WORKDIR ...] [--output=DIR]

The same as `ifm-jax suppression`; `comparison.py` does the work.
"""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("suppression")

from ifm_jax.config import method_name
from ifm_jax.evaluation.comparison import (
    Difference,
    compare,
    differences,
    grouped,
    markdown,
    mean,
    read_out,
    read_out_untrained,
    read_out_workdir,
    standard_errors,
    summary,
    write,
)
from ifm_jax.evaluation.readout import Readouts

__all__ = [
    "Difference",
    "Readouts",
    "compare",
    "differences",
    "grouped",
    "markdown",
    "mean",
    "method_name",
    "read_out",
    "read_out_untrained",
    "read_out_workdir",
    "standard_errors",
    "summary",
    "write",
]
