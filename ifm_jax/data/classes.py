"""Chooses among a source's classes by the names that a file lists; formats names for display."""

import pathlib
import re
from collections.abc import Sequence

from ifm_jax.errors import UsageError


def chosen(path: str, found: Sequence[str], where: str) -> list[str]:
    """Returns the names of the classes to keep, sorted if a file chooses them, else in the order of `found`.

    Args:
      path: path of the file; see `read_names`. Empty: keep all classes.
      found: names of all classes.
      where: description of the classes, for the error.

    Raises:
      UsageError: if the file names a class that does not exist.
    """
    if not path:
        return list(found)
    names = read_names(path)
    if unknown := sorted(set(names) - set(found)):
        raise UsageError(
            f"data.classes={path!r}: {some(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"{len(found)} {where} ({some(found)}); remove or correct the name"
        )
    return names


def read_names(path: str) -> list[str]:
    """Returns the class names that a file lists, sorted.

    Each line holds one name; a # at the start of a line or after a space begins a comment.

    Raises:
      UsageError: if the file cannot be read or names no class.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data.classes={path!r} cannot be read ({getattr(error, 'strerror', None) or error}): expected a text "
            "file of class names, one per line"
        ) from None
    names = {re.split(r"(?:^|\s)#", line)[0].strip() for line in lines} - {""}
    if not names:
        raise UsageError(f"data.classes={path!r} names no class: expected class names, one per line")
    return sorted(names)


def shown(name: str) -> str:
    """Returns a file's name as one printable line, with unprintable characters escaped."""
    if name.isprintable():
        return name
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # bytes that are not UTF-8
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def some(names: Sequence[str], count: int = 3) -> str:
    """Returns the first few names, quoted."""
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")
