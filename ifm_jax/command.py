"""What the scripts have in common: flags, and endings said in one line."""

import ctypes
import difflib
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import flags

from ifm_jax import sharding
from ifm_jax.config import did_you_mean
from ifm_jax.config_flag import UNSET, ConfigFlag
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
    return _config_flag.name()


def refuse_arguments(arguments: list[str]) -> None:
    """Raises a `UsageError` for arguments that are no flags."""
    if arguments:
        raise UsageError(f"{arguments[0]!r} is no flag: expected --name=value; --help lists the flags")


def define_config(default: str | None = None) -> ConfigFlag:
    """Defines `--config=RECIPE` and `--config.field=value`; returns what gives the config once parsed.

    Args:
      default: path of the recipe that is taken without the flag; None: there is none.
    """
    global _config_flag
    _config_flag = ConfigFlag(default)
    return _config_flag


_config_flag: ConfigFlag | None = None  # of the script


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
    """Parses all flags; every kind of mistake becomes a `UsageError`."""
    if any(argument in ("--help", "-h", "--helpfull") for argument in argv[1:]):
        _help(argv[0])
    try:
        arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        if _config_flag is not None:
            arguments = _config_flag.take(arguments)
        positional = flags.FLAGS([argv[0], *arguments])
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname, argv)) from None
    except flags.IllegalFlagValueError as error:
        raise UsageError(_illegal_value(str(error))) from None
    except flags.Error as error:
        raise UsageError(f"{error}; --help lists the flags") from None
    for flag in _own_flags(argv[0]):
        if flag.present and isinstance(flag.value, str) and not flag.value.strip():
            raise UsageError(f"--{flag.name}= {UNSET}")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UsageError(f"--{flag.name}={flag.value}: expected a finite number")
    return positional


def _own_flags(program: str) -> Iterator[flags.Flag]:
    """Yields the flags of the script, and of this module, not the flags library's own."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        yield from defined if module in (program, __name__) else ()


def _unknown_flag(name: str, argv: list[str]) -> str:
    """Returns what is said of a flag that is none."""
    as_given = next((a for a in argv[1:] if a.lstrip("-").partition("=")[0] == name), f"--{name}")
    known = [flag.name for flag in _own_flags(argv[0])] + (["config"] if _config_flag is not None else [])
    group, dot, field = name.partition(".")
    near = difflib.get_close_matches(group, known, n=1)
    hint = f": did you mean --{near[0]}{dot}{field}?" if near else ""
    return f"{as_given[:120]}: there is no flag --{name[:120]}{hint or '; --help lists the flags'}"


def _illegal_value(text: str) -> str:
    """Returns what is said of a flag whose value is none of its kind, from the flags library's own words."""
    match = re.match(r"flag --(\w+)=(.*?): ", text, re.DOTALL)
    if match is None or match[1] not in flags.FLAGS:
        return f"{text}; --help lists the flags"
    name, value = match.groups()
    parser = flags.FLAGS[name].parser
    if not value.strip():
        return f"--{name}= {UNSET}"
    if isinstance(parser, flags.EnumParser):
        choices = parser.enum_values
        return f"--{name}={value[:120]}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}"
    expected = "true or false" if isinstance(parser, flags.BooleanParser) else parser.syntactic_help
    return f"--{name}={value[:120]}: expected {expected}"


def _help(program: str) -> None:
    """Prints the script's docstring and its own flags, and ends the process."""
    print((sys.modules["__main__"].__doc__ or "").strip())
    print("\nFlags:")
    for flag in _own_flags(program):
        print(f"  --{flag.name}: {flag.help}")
    if _config_flag is not None:
        print("  --config: A recipe: a Python file with get_config(), or the name of one in configs/.")
        print("  --config.FIELD=VALUE: changes one field of the recipe; ifm_jax/config.py describes them.")
    sys.exit(0)
