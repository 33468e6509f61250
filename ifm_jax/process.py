"""The process that a script is: its streams, Ctrl-C while it starts, and a supervisor where it is one of several.

Standard library alone: a script calls `begin` before it imports what takes seconds. What `begin` can do without is
imported where it is used: until it is called Ctrl-C is a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys

TYPE_CHECKING = False  # as typing has it, which takes its time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, Any

INTERRUPTED = "interrupted; what was saved is intact"
PEER_ENDED = (
    "another process of the run has ended, or cannot be reached: see its own message; the same command on all hosts "
    "goes on from the last checkpoint"
)

_SUPERVISOR = "IFM_JAX_SUPERVISOR"  # in the environment of the supervised process: the supervisor's number
_FLAGS = ("coordinator", "num_processes", "process_id")
# Each launcher of several processes sets one of these; a process that is alone is supervised to no harm.
_LAUNCHERS = ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ABORTED_FOR_A_PEER = b"JAX distributed service detected fatal errors"  # what JAX's runtime says before it aborts
_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def begin(hosts: bool = False) -> None:
    """Prepares the process of a script; to be called first, by the script alone.

    From here on Ctrl-C is one line and status 130; `command.run` has its own way with it.

    Args:
      hosts: the script may be one of several processes (`command.Hosts`): where it is, the work is done by a
        child, and this process says how it ended.
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
    """Makes the standard streams fit to be written to: closed ones lead nowhere, and none refuses a letter."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file opened would have its number, and all that is printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (until the process ends)
    # As stderr is from the start. Whoever has put another kind of stream there has decided about its letters.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and getattr(sys.stdout, "errors", None) == "strict":
        reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line of this program on stderr, past Python's buffers; nothing is raised where that is closed."""
    name = os.path.basename(sys.argv[0])
    with contextlib.suppress(OSError):
        os.write(2, f"{name}: {text}\n".encode(errors="backslashreplace"))


def one_of_several(arguments: list[str]) -> bool:
    """Returns whether the arguments or a launcher's environment speak of several processes."""
    names = [argument.partition("=")[0] for argument in arguments]
    given = any(name.lstrip("-") in _FLAGS for name in names if name.startswith("-"))
    # A TPU machine that is alone names itself; so does whoever compiles for TPUs that are not there.
    alone = "," not in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return given or any(name in os.environ and not (alone and name.startswith("TPU")) for name in _LAUNCHERS)


def interrupted(*_) -> None:
    """Handles Ctrl-C while a script starts: there is nothing to put in order."""
    say(INTERRUPTED)
    os._exit(128 + signal.SIGINT)


# ----------------------------------------------------------------------------------------------------------------------
# Standard output


class OutputClosedError(Exception):
    """Whoever read standard output has closed it; no `OSError`, which would be taken for the disk's."""


class Output:
    """A text stream whose failures do not stop who writes to it: they are noted, and what cannot be written is lost.

    Args:
      stream: to write to.
      strict: `OutputClosedError` is raised where the reader has closed it; else that too is only noted.
      on_failure: called once, with the first failure of another kind (a full disk).

    Attributes:
      closed_by_reader: nothing can be written any more.
      failure: the first of another kind; later lines may be written again.
    """

    def __init__(self, stream: IO[str], strict: bool = False, on_failure: Callable[[OSError], object] = lambda _: None):
        self._stream, self._strict, self._on_failure = stream, strict, on_failure
        self.closed_by_reader = False
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, or takes note."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or takes note."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            if not self.closed_by_reader:
                action(*arguments)
        except OutputClosedError:  # the stream is one of these itself
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
# JAX's runtime learns in a thread of its own that a peer has died, and aborts whatever Python is doing (on TPUs that is
# waiting for the peer, for ever). It takes no callback: that of jaxlib 0.10 cannot be called (std::bad_cast). Nothing
# in the aborting process can be relied on, so that another one says how it ended.


def _supervise() -> None:
    """Does the work in a child, passes signals on to it, and ends as it ends.

    Only where the runtime has aborted it for a peer there is a line more, and the status is 1; every other end, a crash
    of its own among them, stays what it is.
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
    # In a process group of its own: it gets a terminal's Ctrl-C from here, once.
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_SUPERVISOR: str(os.getpid())},
        stderr=subprocess.PIPE,
        process_group=0,
    )
    for number in early:
        child.send_signal(number)

    said, stderr = bytearray(), child.stderr
    assert stderr is not None  # a pipe, as asked for

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
    copying.join(timeout=2.0)  # a process that outlives the child may hold its stderr open
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
    """Has the kernel kill this process once its supervisor is gone, where the kernel can (Linux)."""
    import ctypes

    supervisor = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != supervisor:  # gone meanwhile
        os._exit(128 + signal.SIGKILL)
