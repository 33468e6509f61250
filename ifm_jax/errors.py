"""The two ways in which a run ends badly, each said in one line."""

import errno


class UsageError(ValueError):
    """A mistake of the caller's: names the value, what was expected, and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """A failure of the run itself; what was saved up to then is intact. Exit status 1."""


def name_too_long(error: OSError) -> UsageError | None:
    """Returns what is said of a path that no file system takes, which whoever named it can mend; None: it is not that.

    It comes out of the first look at the path, wherever that is.
    """
    if error.errno != errno.ENAMETOOLONG:
        return None
    path = str(error.filename)
    shown = path if len(path) <= 120 else f"{path[:60]} ... {path[-40:]}"
    return UsageError(f"{shown}: {error.strerror} ({len(path)} characters): expected a path that the file system takes")
