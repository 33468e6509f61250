"""Code shared by the commands: runs one and reports its end in one line."""

import atexit
import contextlib
import dataclasses
import importlib
import importlib.metadata
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
from typing import IO, TYPE_CHECKING, NoReturn

from ifm_jax import process
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import RunError, UsageError, name_too_long

if TYPE_CHECKING:
    from ifm_jax.runs.loop import Outcome


def say_stopped(result: "Outcome", workdir: str | os.PathLike[str]) -> int:
    """Tells how to resume a run that a signal stopped; returns the exit status, 0 if no signal stopped it."""
    if result.stopped_by is None:
        return 0
    text = (
        f"Stopped by {result.stopped_by.name} after step {result.step} of {result.total_steps}, saved in {workdir}. "
        "The same command resumes it."
    )
    if result.stopped_by == signal.SIGPIPE:  # the reader has closed standard output
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
    else:
        print(text)
    return 128 + result.stopped_by


@dataclasses.dataclass(slots=True)
class Hosts(Group):
    """Options of a command that may be one of several processes."""

    coordinator: str = field("", "HOST:PORT of process 0, if no cluster is detected.")
    num_processes: int | None = field(None, "Number of processes, with --coordinator.", expected="an integer")
    process_id: int | None = field(None, "Number of this process, from 0, with --coordinator.", expected="an integer")


def join_hosts(hosts: Hosts) -> None:
    """Joins the other processes of the run, if there are any.

    Raises:
      UsageError: if the options do not fit together.
      RunError: if the processes do not connect.
    """
    from ifm_jax import sharding

    try:
        sharding.initialize(hosts.coordinator or None, hosts.num_processes, hosts.process_id)
    except TimeoutError as error:
        # No ordinary exit: JAX's runtime is still trying to connect, in a thread that cannot be stopped.
        _say(os.path.basename(sys.argv[0]), error, 1)
        sys.stdout.flush()
        os._exit(1)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except RuntimeError as error:
        raise RunError(f"the processes of the run did not find each other: {_first_line(error)}") from None


def workdir(path: str | os.PathLike[str]) -> None:
    """Sets the directory of this process's results, where `run` also writes tracebacks of our own mistakes."""
    global _workdir
    _workdir = pathlib.Path(path)


_workdir: pathlib.Path | None = None


def run(
    main: Callable[[Given], int | None], flags: Flags, argv: list[str] | None = None, *, with_jax: bool = True
) -> NoReturn:
    """Parses the flags, runs `main` with the result and ends the process.

    The exit status is 0 for success; 2 for a mistake of the caller and 1 for a failure of the run, each with one line
    on stderr; 128 + the signal's number for a run that a signal stopped and that can be resumed, with SIGPIPE if the
    reader of standard output has closed it. An unexpected error also gives one line and status 1, and its traceback is
    in a file in the workdir. A full disk behind standard output does not end a run: its workdir holds all that is
    printed.

    Args:
      main: does the work; returns the exit status, None for 0.
      flags: flags of the command.
      argv: the command line; None: the process's.
      with_jax: import JAX before `main` is called, while Ctrl-C still ends the process at once.
    """
    argv = sys.argv if argv is None else argv
    name = os.path.basename(argv[0])
    # Library warnings are for developers; problems of the user are raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    process.keep_memory()
    process.prepare_streams()
    stdout = sys.stdout
    sys.stdout = process.Output(
        stdout,
        strict=True,
        on_failure=lambda error: _say(
            name, f"cannot write to standard output ({error.strerror}): the rest of the output is lost", 0
        ),
    )
    try:
        status, alone = _outcome(main, flags, argv, name, with_jax)
        status = _end_output(sys.stdout, status)
    finally:
        sys.stdout = stdout
    if alone and _is_of_several():
        _leave_the_others(status)
    # From here to the interpreter's exit nothing can be interrupted cleanly.
    atexit.register(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    sys.exit(status)


def _outcome(
    main: Callable[[Given], int | None], flags: Flags, argv: list[str], name: str, with_jax: bool
) -> tuple[int, bool]:
    """Runs `main`; returns the exit status, and whether other processes of the run may not know of this end."""
    try:
        given = flags.parse(argv[1:])
        if with_jax:
            importlib.import_module("jax")
        if signal.getsignal(signal.SIGINT) is process.interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(given) or 0
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
        if _is_of_several() and _is_of_a_peer(error):
            return _say(name, f"{process.PEER_ENDED} ({_first_line(error)})", 1), True
        where = _write_traceback(argv)
        return _say(name, f"unexpected {type(error).__name__}: {_first_line(error)}; the traceback is {where}", 1), True


def _is_of_several() -> bool:
    """Whether this process has joined others in a run, for which it must have imported JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_of_a_peer(error: Exception) -> bool:
    from ifm_jax import sharding

    return sharding.is_of_a_peer(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _write_traceback(argv: list[str]) -> str:
    """Writes the current error, its chain of causes and the environment to a file; returns its path."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ifm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    text = "\n".join(
        [
            f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()}, in {os.getcwd()}",
            f"{argv[0]} {shlex.join(argv[1:])}",  # the first may be "ifm-jax train"
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            traceback.format_exc(),
        ]
    )
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"  # each process has its own file
    for directory in ([_workdir] if _workdir else []) + [pathlib.Path(tempfile.gettempdir())]:
        with contextlib.suppress(OSError):
            path = directory.absolute() / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"in {path}"
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    return "above: no file could be written"


def _end_output(output: process.Output, status: int) -> int:
    """Flushes standard output; returns the final exit status, which depends on whether that worked."""
    with contextlib.suppress(process.OutputClosedError):
        output.flush()
    if output.closed_by_reader or output.failure:
        _to_nowhere(output)
    if output.closed_by_reader:
        return status or 128 + signal.SIGPIPE
    if output.failure and _workdir is None:  # else the results are in the workdir
        return status or 1
    return status


def _to_nowhere(stream: IO[str] | process.Output) -> None:
    """Discards all further writes to a stream: Python flushes it again at exit and would complain."""
    with contextlib.suppress(OSError, ValueError):  # the stream has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave_the_others(status: int) -> None:
    """Ends one of several processes after a failure that may be its own alone.

    An ordinary exit would wait for the others, which may wait for this one. Once process 0 has ended, the runtime ends
    the others at once; if all of them have failed alike, they have a few seconds to report it.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # our messages are out; hide the runtime's
    from ifm_jax import sharding

    if sharding.process_index() == 0:
        time.sleep(3.0)
    os._exit(status)


def _say(name: str, error: object, status: int) -> int:
    try:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    except OSError:
        _to_nowhere(sys.stderr)
    return status
