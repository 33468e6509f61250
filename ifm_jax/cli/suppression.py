"""Reports which features runs have learned and suppressed: linear readouts of every label, run by run.

    ifm-jax suppression WORKDIR [WORKDIR ...] [--output=DIR]

Runs that differ in their seed only are one method: mean and standard error over seeds; methods are compared with the
first one, paired by seed. Writes suppression.json, suppression.md and suppression.png.
"""

import dataclasses

from ifm_jax.cli import command
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    output: str = field(".", "Directory for suppression.json, suppression.md and suppression.png.")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__)


def main(given: Given) -> int:
    """Reads out the given runs; returns the exit status."""
    if not given.arguments:
        raise UsageError("no workdir given: expected the workdirs of one or more training runs")
    from ifm_jax.evaluation import comparison

    comparison.compare(given.arguments, given.options.output)
    return 0


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
