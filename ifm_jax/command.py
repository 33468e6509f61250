"""What the scripts have in common: flags, and endings said in one line."""

import os
import signal
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from ifm_jax import sharding
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError


def define_hosts() -> Callable[[], None]:
    """Defines --coordinator, --num_processes and --process_id; returns the function that joins the hosts once parsed."""
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where a cluster is not recognised.")
    num_processes = flags.DEFINE_integer("num_processes", None, "How many processes take part, with --coordinator.")
    process_id = flags.DEFINE_integer("process_id", None, "Which of them this is, with --coordinator.")

    def initialize() -> None:
        try:
            sharding.initialize(coordinator.value, num_processes.value, process_id.value)
        except ValueError as error:
            raise UsageError(str(error)) from None

    return initialize


def recipe_name() -> str:
    """Returns the name of the recipe that --config gives: `trifeature` for `configs/trifeature.py`."""
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    return os.path.splitext(os.path.basename(filename))[0]


def refuse_arguments(arguments: list[str]) -> None:
    """Raises a `UsageError` for arguments that are no flags."""
    if arguments:
        raise UsageError(f"{arguments[0]!r} is no flag: expected --name=value; --help lists the flags")


def define_config(default: str) -> Callable[[], Config]:
    """Defines `--config=FILE.py` and `--config.field=value`; returns the function that gives the config once parsed.

    Args:
      default: path of the recipe that is taken without the flag.
    """
    holder = config_flags.DEFINE_config_file("config", default, "A recipe: a Python file with get_config().")

    def config() -> Config:
        value = holder.value
        if not isinstance(value, Config):
            raise UsageError(f"--config: get_config() returned a {type(value).__name__}, expected ifm_jax.config.Config")
        return value

    return config


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Parses the flags, runs `main` with the remaining arguments and ends the process.

    Exit status: 0 done; 2 for a mistake of the caller's, 1 for a failure of the run, each with one line on stderr;
    128 + the signal's number for a run that a signal stopped and that can go on.

    Args:
      main: returns the exit status, None for 0.
      argv: the command line; None: the process's.
    """
    argv = sys.argv if argv is None else argv
    name = os.path.basename(argv[0])
    try:
        status = main(_parse(argv)[1:])
    except UsageError as error:
        status = _say(name, error, 2)
    except RunError as error:
        status = _say(name, error, 1)
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = _say(name, "interrupted; what was saved is intact", 128 + signal.SIGINT)
    sys.stdout.flush()
    sys.exit(status or 0)


def _say(name: str, error: object, status: int) -> int:
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parse(argv: list[str]) -> list[str]:
    """Parses absl's flags; every kind of mistake becomes a `UsageError`."""
    if any(argument in ("--help", "-h", "--helpfull") for argument in argv[1:]):
        _help(argv[0])
    try:
        # A recipe that is missing or broken raises whatever it raises, while the flags are parsed.
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UsageError(f"{error}; --help lists the flags") from None
    except KeyError as error:
        raise UsageError(f"{error.args[0]}; config.json of a run, or ifm_jax/config.py, lists the fields") from None
    except Exception as error:
        raise UsageError(f"the config cannot be read: {type(error).__name__}: {error}") from None


def _help(program: str) -> None:
    """Prints the script's docstring and its own flags, and ends the process."""
    main = sys.modules["__main__"]
    print((main.__doc__ or "").strip())
    print("\nFlags:")
    for flag in flags.FLAGS.get_key_flags_for_module(program) or flags.FLAGS.get_key_flags_for_module(main):
        print(f"  --{flag.name}: {flag.help}")
    sys.exit(0)
