"""The process of a script: its streams, Ctrl-C during the start, and a supervisor if it is one of several processes.

This uses only the standard library: a script calls `begin` before imports that take seconds. Modules that `begin` does
not need are imported where they are used, since until that call Ctrl-C prints a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys

TYPE_CHECKING = False  # same as typing's, without its slow import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, Any

INTERRUPTED = "interrupted; everything saved before is intact"
PEER_ENDED = (
    "another process of the run has ended or cannot be reached: see its own message; the same command on all hosts "
    "resumes from the last checkpoint"
)

_SUPERVISOR = "IFM_JAX_SUPERVISOR"  # in the environment of the supervised process: the supervisor's number
_FLAGS = ("coordinator", "num_processes", "process_id")
# Each launcher of several processes sets one of these; supervising a single process does no harm.
_LAUNCHERS = ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ABORTED_FOR_A_PEER = b"JAX distributed service detected fatal errors"  # message of JAX's runtime before it aborts
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h
_PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h


def begin(hosts: bool = False) -> None:
    """Prepares the process of a script; only the script calls this, before anything else.

    From then on Ctrl-C gives one line and status 130; `command.run` later handles it in its own way.

    Args:
      hosts: whether the script may be one of several processes (`command.Hosts`). If it is, a child does the work, and
        this process reports how it ended.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
    prepare_streams()
    if hosts:
        supervisor = os.environ.pop(_SUPERVISOR, None)
        if supervisor == str(os.getppid()):
            _end_with_the_supervisor()
        elif one_of_several(sys.argv[1:]):
            _supervise()


def prepare_streams() -> None:
    """Makes the standard streams writable: closed ones lead to the null device, and none rejects a character."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file opened would get its number and everything printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (until the process ends)
    # Same as stderr's default. A replaced stream keeps the error handling of its author.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and getattr(sys.stdout, "errors", None) == "strict":
        reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line of this program on stderr, past Python's buffers; raises nothing if stderr is closed."""
    name = os.path.basename(sys.argv[0])
    with contextlib.suppress(OSError):
        os.write(2, f"{name}: {text}\n".encode(errors="backslashreplace"))


def one_of_several(arguments: list[str]) -> bool:
    """Returns whether the arguments or a launcher's environment indicate several processes."""
    names = [argument.partition("=")[0] for argument in arguments]
    given = any(name.lstrip("-") in _FLAGS for name in names if name.startswith("-"))
    # A single TPU machine lists only itself; so does a process that compiles for absent TPUs.
    alone = "," not in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return given or any(name in os.environ and not (alone and name.startswith("TPU")) for name in _LAUNCHERS)


def keep_memory() -> None:
    """Makes glibc keep freed memory if there is no accelerator.

    A compiled program allocates all its temporary memory anew in every step. glibc returns blocks of this size to the
    kernel each time, and the kernel clears them page by page: 20,000 page faults and a tenth to a fifth of a small step
    (docs/benchmarks.md). Call this before JAX starts its threads, which would have their own arenas.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    if has_accelerator():
        return  # here threads that decode images would block each other
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(parameter, value)


def has_accelerator() -> bool:
    """Returns whether JAX has a plugin for an accelerator here, unless `JAX_PLATFORMS=cpu` keeps it from that.

    Starting JAX to see would take the accelerator's memory.
    """
    import importlib.metadata
    import importlib.util

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return bool(importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))


def interrupted(*_) -> None:
    """Handles Ctrl-C while a script starts: there is nothing to clean up."""
    say(INTERRUPTED)
    os._exit(128 + signal.SIGINT)


# ----------------------------------------------------------------------------------------------------------------------
# Standard output


class OutputClosedError(Exception):
    """The reader of standard output has closed it. This is no `OSError`, which would look like a disk error."""


class Output:
    """A text stream whose failures do not stop the writer: it records them and drops the text.

    Args:
      stream: stream to write to.
      strict: raise `OutputClosedError` if the reader has closed the stream; else only record it.
      on_failure: called once, with the first other failure (such as a full disk).

    Attributes:
      closed_by_reader: whether the reader has closed the stream, so that nothing more can be written.
      failure: the first other failure; later lines may succeed.
    """

    def __init__(self, stream: IO[str], strict: bool = False, on_failure: Callable[[OSError], object] = lambda _: None):
        self._stream, self._strict, self._on_failure = stream, strict, on_failure
        self.closed_by_reader = False
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, or records a failure."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or records a failure."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            if not self.closed_by_reader:
                action(*arguments)
        except OutputClosedError:  # the stream is itself an `Output`
            self.closed_by_reader = True
        except OSError as error:
            if error.errno == errno.EPIPE:
                self.closed_by_reader = True
            elif self.failure is None:
                self.failure = error
                self._on_failure(error)
        if self.closed_by_reader and self._strict:
            raise OutputClosedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# ----------------------------------------------------------------------------------------------------------------------
# One of several processes
#
# JAX's runtime learns in its own thread that a peer has died, and aborts whatever Python is doing (on TPUs Python waits
# for the peer forever). It accepts no callback: that of jaxlib 0.10 cannot be called (std::bad_cast). Nothing in the
# aborting process is reliable, so another process reports how it ended.


def _supervise() -> None:
    """Does the work in a child, passes signals on to it, and ends the same way.

    Only if the runtime has aborted the child because of a peer does this add a line and use status 1; every other end,
    including a crash of the child itself, is passed on unchanged.
    """
    import resource
    import subprocess
    import threading

    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    # In its own process group: it gets a terminal's Ctrl-C from here, once.
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_SUPERVISOR: str(os.getpid())},
        stderr=subprocess.PIPE,
        process_group=0,
    )
    for number in early:
        child.send_signal(number)

    said, stderr = bytearray(), child.stderr
    assert stderr is not None  # a pipe, as requested

    def copy() -> None:
        while chunk := os.read(stderr.fileno(), 1 << 16):
            said.extend(chunk)
            del said[: -(1 << 17)]
            with contextlib.suppress(OSError):
                while chunk:
                    chunk = chunk[os.write(2, chunk) :]

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    status = child.wait()
    copying.join(timeout=2.0)  # a process that outlives the child may keep its stderr open
    if status == -signal.SIGABRT and _ABORTED_FOR_A_PEER in said:
        say(PEER_ENDED)
        status = 1
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _end_with_the_supervisor() -> None:
    """Makes the kernel kill this process when its supervisor ends, if the kernel can (Linux)."""
    import ctypes

    supervisor = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != supervisor:  # it has ended meanwhile
        os._exit(128 + signal.SIGKILL)
