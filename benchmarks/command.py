"""Runs a benchmark like a command of ifm_jax, with flags defined with absl."""

import sys
from collections.abc import Callable

from absl import flags

from ifm_jax.cli import command
from ifm_jax.cli.config_flag import UNSET, ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Config
from ifm_jax.errors import UsageError


def define_config(default: str) -> Callable[[], Config]:
    """Defines `--config=RECIPE` and `--config.field=value`; returns what gives the config once parsed.

    Args:
      default: path of the recipe that is taken without the flag.
    """
    global _config_flag
    _config_flag = ConfigFlag(default)
    return lambda: _config_flag()


_config_flag: ConfigFlag | None = None  # of the benchmark


def define_hosts() -> Callable[[], None]:
    """Defines --coordinator, --num_processes and --process_id; returns the function that joins the hosts."""
    coordinator = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
    num_processes = flags.DEFINE_integer("num_processes", None, "Number of processes.")
    process_id = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    return lambda: command.join_hosts(command.Hosts(coordinator.value, num_processes.value, process_id.value))


def refuse_arguments(arguments: list[str]) -> None:
    """Raises a `UsageError` for arguments that are no flags."""
    if arguments:
        raise UsageError(f"{arguments[0]!r} is not a flag: expected --name=value; --help lists the flags")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, runs `main` with the remaining arguments and ends the process."""
    parser = Flags(text=sys.modules["__main__"].__doc__ or "", config=_config_flag)
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module in (sys.argv[0], __name__) else ():
            switch = isinstance(flag.parser, flags.BooleanParser)
            parser.add(flag.name, _reader(flag), switch=switch, meaning=flag.help)
    flags.FLAGS.mark_as_parsed()

    def run_with(given: Given) -> int | None:
        global _config_flag
        _config_flag = given.config
        return main(given.arguments)

    command.run(run_with, parser)


def _reader(flag: flags.Flag) -> Callable[[str | None, str], object]:
    """Returns what parses a flag."""

    def read(text: str | None, _: str) -> object:
        if text is None or not text.strip():
            raise UsageError(f"--{flag.name}= {UNSET}")
        try:
            flag.parse(text)
        except flags.IllegalFlagValueError:
            raise UsageError(f"--{flag.name}={text}: expected {flag.parser.syntactic_help or 'another'}") from None
        return flag.value

    return read
