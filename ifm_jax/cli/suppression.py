"""Reports which features runs have learned and suppressed: `python -m ifm_jax.evaluation.suppression`."""

import dataclasses

from ifm_jax.cli import command
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    output: str = field(".", "Directory for suppression.json, suppression.md and suppression.png.")


def flags(text: str = "") -> Flags:
    """Returns the flags of the command.

    Args:
      text: text of `--help`, which tells how to call the command; empty: the module's docstring.
    """
    return Flags(Options, text or __doc__)


def main(given: Given) -> int:
    """Reads out the given runs; returns the exit status."""
    if not given.arguments:
        raise UsageError("no workdir given: expected the workdirs of one or more training runs")
    from ifm_jax.evaluation import suppression

    suppression.compare(given.arguments, given.options.output)
    return 0


def run(text: str = "") -> None:
    """Runs the command with the arguments of the process, and ends the process; `text` as for `flags`."""
    command.run(main, flags(text))
