"""What the scripts have in common: flags, and endings said in one line."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

import jax
from absl import flags

from ifm_jax import sharding
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def say_stopped(result, workdir: str | os.PathLike) -> int:
    """Says how to go on with a run that a signal stopped; returns the exit status."""
    print(
        f"Stopped by {result.stopped_by.name} after step {result.step} of {result.total_steps}, saved in {workdir}. "
        "The same command goes on from there."
    )
    return 128 + result.stopped_by


def define_hosts() -> Callable[[], None]:
    """Defines --coordinator, --num_processes and --process_id; returns the function that joins the hosts."""
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where a cluster is not recognised.")
    num_processes = flags.DEFINE_integer("num_processes", None, "How many processes take part, with --coordinator.")
    process_id = flags.DEFINE_integer("process_id", None, "Which of them this is, with --coordinator.")

    def initialize() -> None:
        try:
            sharding.initialize(coordinator.value, num_processes.value, process_id.value)
        except ValueError as error:
            raise UsageError(str(error)) from None
        except RuntimeError as error:
            raise RunError(f"the processes of the run did not find each other: {error}") from None

    return initialize


def recipe_name() -> str:
    """Returns the name of the recipe that --config gives: `trifeature` for `configs/trifeature.py`."""
    from ml_collections import config_flags  # of the scripts that take a config

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
    from ml_collections import config_flags  # of the scripts that take a config

    # The library looks at the command line's --config.field already here, where no one would catch a mistake.
    try:
        holder = config_flags.DEFINE_config_file("config", default, "A recipe: a Python file with get_config().")
    except Exception as error:
        _mistakes_at_definition.append(_config_mistake(error))
        return Config

    def config() -> Config:
        value = holder.value
        if isinstance(value, Config):
            return value
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        # A file that could not be loaded gives an object that holds the error.
        error = vars(value).get("_error") if hasattr(value, "__dict__") else None
        if not os.path.exists(path):
            raise UsageError(f"--config={path} is not there: expected a recipe, for example configs/trifeature.py")
        if error is not None:
            raise UsageError(f"--config={path} cannot be loaded: {type(error).__name__}: {error}")
        raise UsageError(
            f"--config={path}: get_config() returned a {type(value).__name__}, expected an ifm_jax.config.Config"
        )

    return config


def define_config_over(base: Callable[[], Config]) -> Callable[[], Config]:
    """Defines `--config=FILE.py` and `--config.field=value` on top of a config that is read from somewhere else.

    Args:
      base: reads it; called now, since the fields' flags are made of it.

    Returns:
      The function that gives the config once parsed: the file's where one is given, else `base`'s; with the fields
      changed.
    """
    from ml_collections import config_flags  # of the scripts that take a config

    if any(re.fullmatch(r"--?config(=.*)?", argument) for argument in sys.argv[1:]):
        return define_config(default="")
    try:
        config = base()
        holder = config_flags.DEFINE_config_dataclass("config", config, help_string="Fields to change.")
    except UsageError as error:
        _mistakes_at_definition.append(error)
        return Config
    except Exception as error:
        _mistakes_at_definition.append(_config_mistake(error))
        return Config
    return lambda: holder.value


def flag_on_command_line(name: str) -> str | None:
    """Returns the value of `--name=value` or `--name value` before flags are parsed; None: not there."""
    arguments = sys.argv[1:]
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            return value if equals else next(iter(arguments[place + 1 :]), None)
    return None


_mistakes_at_definition: list[UsageError] = []


def _config_mistake(error: Exception) -> UsageError:
    """What the flags library raises for a --config.field=value, said so that it helps."""
    if isinstance(error, KeyError):
        field = re.match(r"Field (\S+) not found", str(error.args[0]))
        name = repr(field[1]) if field else error.args[0]
        given = next((a for a in sys.argv if field and a.startswith("--") and field[1] in a.split("=")[0]), "--config")
        return UsageError(f"{given}: there is no config field {name}; ifm_jax/config.py lists the fields")
    if isinstance(error, flags.Error):
        return UsageError(f"{error}; --help lists the flags")
    return UsageError(f"the config cannot be read: {type(error).__name__}: {error}")


def _keep_memory() -> None:
    """Lets glibc keep what is freed, where there is no accelerator.

    A compiled program asks for all its temporary memory anew in every step; glibc gives so much back to the kernel each
    time, and the kernel clears it page by page: 20,000 page faults and a tenth to a fifth of a small step
    (docs/benchmarks.md). To be called before JAX starts its threads, which would have arenas of their own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    if importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"):
        return  # threads that decode images for an accelerator would wait for each other
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(parameter, value)


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
    # The libraries' own remarks are for their authors; what concerns the user is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _keep_memory()
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
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            status = _say(name, f"{sharding.PEER_ENDED} ({str(error).strip().splitlines()[0][:200]})", 1)
        else:
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    if status and status < 128 and jax.distributed.is_initialized():
        _leave_the_others(status)
    sys.exit(status or 0)


def _leave_the_others(status: int) -> None:
    """Ends a process of several that has failed, perhaps alone.

    The ordinary end would wait for the others, which may wait for this one. Once process 0 is gone the runtime ends all
    the others at once; where all of them have failed alike they have a few seconds to say so.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno())  # all is said; the runtime says more
    if jax.process_index() == 0:
        time.sleep(3.0)
    os._exit(status)


def _say(name: str, error: object, status: int) -> int:
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parse(argv: list[str]) -> list[str]:
    """Parses absl's flags; every kind of mistake becomes a `UsageError`."""
    if any(argument in ("--help", "-h", "--helpfull") for argument in argv[1:]):
        _help(argv[0])
    if _mistakes_at_definition:
        raise _mistakes_at_definition[0]
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        raise _config_mistake(error) from None


def _help(program: str) -> None:
    """Prints the script's docstring and its own flags, and ends the process."""
    print((sys.modules["__main__"].__doc__ or "").strip())
    print("\nFlags:")
    own = {program, __name__}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module in own else ():
            print(f"  --{flag.name}: {flag.help}")
    print("  --config.FIELD=VALUE: changes one field of the recipe; ifm_jax/config.py describes them.")
    sys.exit(0)
