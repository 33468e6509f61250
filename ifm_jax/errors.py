"""The two ways in which a run ends badly, each said in one line."""


class UsageError(ValueError):
    """A mistake of the caller's: names the value, what was expected, and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """A failure of the run itself; what was saved up to then is intact. Exit status 1."""
