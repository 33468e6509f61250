"""What the commands have in common: how one runs, and how it ends, said in one line."""

import atexit
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

import jax

from ifm_jax import process, sharding
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import RunError, UsageError, name_too_long

if TYPE_CHECKING:
    from ifm_jax.runs.loop import Outcome

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def say_stopped(result: "Outcome", workdir: str | os.PathLike[str]) -> int:
    """Says how to go on with a run that a signal stopped; returns the exit status, 0 for one that none stopped."""
    if result.stopped_by is None:
        return 0
    text = (
        f"Stopped by {result.stopped_by.name} after step {result.step} of {result.total_steps}, saved in {workdir}. "
        "The same command goes on from there."
    )
    if result.stopped_by == signal.SIGPIPE:  # nobody reads standard output
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
    else:
        print(text)
    return 128 + result.stopped_by


@dataclasses.dataclass(slots=True)
class Hosts(Group):
    """Options of a command that may be one of several processes."""

    coordinator: str = field("", "HOST:PORT of process 0, where a cluster is not recognized.")
    num_processes: int | None = field(None, "How many processes take part, with --coordinator.", expected="an integer")
    process_id: int | None = field(None, "Which of them this is, with --coordinator.", expected="an integer")


def join_hosts(hosts: Hosts) -> None:
    """Joins the other processes of the run, if there are any.

    Raises:
      UsageError: if the options do not fit together.
      RunError: if the processes do not find each other.
    """
    try:
        sharding.initialize(hosts.coordinator or None, hosts.num_processes, hosts.process_id)
    except TimeoutError as error:
        # Not the ordinary end: JAX's runtime is still looking for them, in a thread that nothing stops.
        _say(os.path.basename(sys.argv[0]), error, 1)
        sys.stdout.flush()
        os._exit(1)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except RuntimeError as error:
        raise RunError(f"the processes of the run did not find each other: {_first_line(error)}") from None


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


def workdir(path: str | os.PathLike[str]) -> None:
    """Says where the results of this process go, which is where `run` writes what helps to find a mistake of ours."""
    global _workdir
    _workdir = pathlib.Path(path)


_workdir: pathlib.Path | None = None


def run(main: Callable[[Given], int | None], flags: Flags, argv: list[str] | None = None) -> None:
    """Parses the flags, runs `main` with what they say and ends the process.

    Exit status: 0 done; 2 for a mistake of the caller's, 1 for a failure of the run, each with one line on stderr;
    128 + the signal's number for a run that a signal stopped and that can go on, SIGPIPE for a reader of standard
    output that has closed it. What nobody has foreseen is one line and status 1 too, and its traceback is in a file of
    the workdir. A full disk under standard output ends no run: its workdir holds all that is printed.

    Args:
      main: does the work; returns the exit status, None for 0.
      flags: flags of the command.
      argv: the command line; None: the process's.
    """
    argv = sys.argv if argv is None else argv
    name = os.path.basename(argv[0])
    # The libraries' own remarks are for their authors; what concerns the user is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _keep_memory()
    process.prepare_streams()
    if signal.getsignal(signal.SIGINT) is process.interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stdout = sys.stdout
    sys.stdout = process.Output(
        stdout,
        strict=True,
        on_failure=lambda error: _say(
            name, f"standard output cannot be written to ({error.strerror}): what does not fit is lost", 0
        ),
    )
    try:
        status, alone = _outcome(main, flags, argv, name)
        status = _end_output(sys.stdout, status)
    finally:
        sys.stdout = stdout
    if alone and jax.distributed.is_initialized():
        _leave_the_others(status)
    # From here to the end of the interpreter there is nothing to interrupt in an orderly way.
    atexit.register(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    sys.exit(status)


def _outcome(main: Callable[[Given], int | None], flags: Flags, argv: list[str], name: str) -> tuple[int, bool]:
    """Runs `main`; returns the exit status, and whether other processes of the run may know nothing of this end."""
    try:
        status = main(flags.parse(argv[1:])) or 0
        return status, 0 < status < 128
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else bool(ended.code), bool(ended.code)
    except UsageError as error:
        return _say(name, error, 2), True
    except RunError as error:
        return _say(name, error, 1), True
    except process.OutputClosedError:
        return 128 + signal.SIGPIPE, True
    except KeyboardInterrupt:
        return _say(name, process.INTERRUPTED, 128 + signal.SIGINT), True
    except Exception as error:
        if isinstance(error, OSError) and (mistake := name_too_long(error)) is not None:
            return _say(name, mistake, 2), True
        if jax.distributed.is_initialized() and sharding.is_of_a_peer(error):
            return _say(name, f"{process.PEER_ENDED} ({_first_line(error)})", 1), True
        where = _write_traceback(argv)
        return _say(name, f"unexpected {type(error).__name__}: {_first_line(error)}; the traceback is {where}", 1), True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _write_traceback(argv: list[str]) -> str:
    """Writes the error under way, with all that led to it, and what it was found with; returns where."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ifm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    text = "\n".join(
        [
            f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()}, in {os.getcwd()}",
            shlex.join(argv),
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            traceback.format_exc(),
        ]
    )
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"  # of several processes each has its own
    for directory in ([_workdir] if _workdir else []) + [pathlib.Path(tempfile.gettempdir())]:
        with contextlib.suppress(OSError):
            path = directory.absolute() / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"in {path}"
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    return "above: no file could be written"


def _end_output(output: process.Output, status: int) -> int:
    """Writes what standard output still holds; returns the exit status, now that it is known whether that worked."""
    with contextlib.suppress(process.OutputClosedError):
        output.flush()
    if output.closed_by_reader or output.failure:
        _to_nowhere(output)
    if output.closed_by_reader:
        return status or 128 + signal.SIGPIPE
    if output.failure and _workdir is None:  # else the results are there
        return status or 1
    return status


def _to_nowhere(stream: IO[str] | process.Output) -> None:
    """Has all that is still written to a stream vanish: Python tries once more as it ends, and would complain."""
    with contextlib.suppress(OSError, ValueError):  # without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave_the_others(status: int) -> None:
    """Ends a process of several that has failed, perhaps alone.

    The ordinary end would wait for the others, which may wait for this one. Once process 0 is gone the runtime ends all
    the others at once; where all of them have failed alike they have a few seconds to say so.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # all is said; the runtime says more
    if sharding.process_index() == 0:
        time.sleep(3.0)
    os._exit(status)


def _say(name: str, error: object, status: int) -> int:
    try:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    except OSError:
        _to_nowhere(sys.stderr)
    return status
