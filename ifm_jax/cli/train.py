"""Pre-trains an encoder with MoCo-v2 or SimCLR and implicit feature modification.

    ifm-jax train                                       the embedded default, into runs/trifeature
    ifm-jax train --config=NAME --workdir=DIR           a recipe, one of `ifm-jax config --list` or a file of yours
    ifm-jax train --config.ifm.epsilon=0.2 ...          with a field changed

The same command resumes the run in the workdir. In a clone, python train.py is the same.
"""

import dataclasses
import pathlib

from ifm_jax import recipes
from ifm_jax.cli import command
from ifm_jax.cli.command import Hosts
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    workdir: str = field("", "Directory of the run; default: runs/<recipe>.")
    verbose: bool = field(False, "Where the output is no terminal, print each line of metrics, not one an epoch.")
    hosts: Hosts = field(Hosts, "one of several processes")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag(recipes.DEFAULT))


def main(given: Given) -> int:
    """Trains; returns the exit status."""
    given.refuse_arguments()
    options, config = given.options, given.config()
    workdir = options.workdir or pathlib.Path("runs") / given.config.name()
    config.verbose |= options.verbose
    command.workdir(workdir)
    command.join_hosts(options.hosts)
    from ifm_jax.runs import training  # takes a second, too long for --help or a usage error

    result = training.train(config, workdir, recipe=given.config.name())
    return command.say_stopped(result, workdir)


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
