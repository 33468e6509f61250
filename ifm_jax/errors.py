"""The two kinds of failure, each reported in one line."""

import errno


class UsageError(ValueError):
    """A mistake of the caller: the message names the value, the expectation and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """A failure of the run itself; all data saved before are intact. Exit status 1."""


def name_too_long(error: OSError) -> UsageError | None:
    """Returns the error for a path that is too long for the file system, which the caller can fix; else None.

    The error comes from the first access to the path, which can be anywhere.
    """
    if error.errno != errno.ENAMETOOLONG:
        return None
    path = str(error.filename)
    shown = path if len(path) <= 120 else f"{path[:60]} ... {path[-40:]}"
    return UsageError(f"{shown}: {error.strerror} ({len(path)} characters): expected a path that the file system takes")
