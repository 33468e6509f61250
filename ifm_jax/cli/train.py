"""Pre-trains an encoder with MoCo-v2 or SimCLR and implicit feature modification: `train.py`."""

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
    hosts: Hosts = field(Hosts, "one of several processes")


def flags(text: str = "") -> Flags:
    """Returns the flags of the command.

    Args:
      text: text of `--help`, which tells how to call the command; empty: the module's docstring.
    """
    return Flags(Options, text or __doc__, ConfigFlag(recipes.DEFAULT))


def main(given: Given) -> int:
    """Trains; returns the exit status."""
    given.refuse_arguments()
    options, config = given.options, given.config()
    workdir = options.workdir or pathlib.Path("runs") / given.config.name()
    command.workdir(workdir)
    command.join_hosts(options.hosts)
    from ifm_jax.runs import training  # takes a second, too long for --help or a usage error

    result = training.train(config, workdir)
    return command.say_stopped(result, workdir)


def run(text: str = "") -> None:
    """Runs the command with the arguments of the process, and ends the process; `text` as for `flags`."""
    command.run(main, flags(text))
