"""The flags of a command: declared on a dataclass, parsed by argparse, with one-line errors."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import pathlib
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from ifm_jax import config as configs
from ifm_jax.cli import config_flag
from ifm_jax.cli.config_flag import BOOLEANS, UNSET, ConfigFlag
from ifm_jax.config import Field, Group
from ifm_jax.errors import UsageError

# argparse (2 ms to import) and not tyro 1.0 (45 ms): tyro reports an error in a box of 6 to 14 lines that no public API
# changes, and accepts neither `--config=FILE` beside `--config.field`, `--noconfig.field`, one dash nor `1,3,10`.

_HELP = ("--help", "-h", "--helpfull")
_FLAG = re.compile(r"--?([^-=][^=]*)")
_WIDTH = 120

Read = Callable[[str | None, str], Any]


@dataclasses.dataclass(frozen=True)
class Given:
    """The parsed command line.

    Attributes:
      options: the command's own flags, an object of its dataclass.
      config: the config flags; none for a command without a config.
      arguments: the arguments that are not flags, in order.
    """

    options: Any
    config: ConfigFlag
    arguments: list[str]

    def refuse_arguments(self) -> None:
        """Rejects arguments that are not flags.

        Raises:
          UsageError: if there are any.
        """
        if self.arguments:
            raise UsageError(f"{self.arguments[0]!r} is not a flag: expected --name=value; --help lists the flags")


@dataclasses.dataclass(slots=True)
class NoOptions(Group):
    """A command without flags of its own."""


class Flags:
    """The flags of one command.

    A flag is `--name=value` or `--name value`, a switch `--name`, `--noname` or `--name=true`; one dash works as well
    as two. The last of several counts. Flags can come before and after other arguments; nothing after `--` is a flag.
    `--flagfile=FILE` inserts the lines of a file.

    Args:
      options: a dataclass of `field(...)`. A field and its flag have the same name; a group is a heading in the help;
        `for_` is `--for`. An empty text by default means that the flag is not given.
      text: describes the command and how to call it.
      config: adds `--config=RECIPE` and `--config.field=value`; its default is the command's.
    """

    def __init__(self, options: type[Group] = NoOptions, text: str = "", config: ConfigFlag | None = None):
        self._options, self._text, self._config = options, text, config
        self._parser = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
        )
        self._names: dict[str, None] = {}  # an ordered set
        self._switches: dict[str, Collection[str]] = {}  # and the words that may follow each
        self._help: list[str] = []
        for known in configs.fields(options).values():
            if known.is_group:
                self._help.append(f"\n{_sentence(known.declared.meaning)}:")
                continue
            name = _flag_name(known)
            self.add(name, _reader(known, name), dest=known.name, switch=known.kind is bool)
            self._help += _described(name, known.declared.meaning, type_name(known), known.default or None)
        if config is not None:
            self.add("config", config_flag.read_recipe)
            for name, known, renamed in config_flag.names():
                read = config_flag.reader(name, known, renamed)
                switch = known.kind is bool
                self.add(f"config.{name}", read, dest=f"config.{known.name}", switch=switch, words=known.words)

    def add(
        self,
        name: str,
        read: Read,
        *,
        dest: str = "",
        switch: bool = False,
        words: tuple[str, ...] = (),
        meaning: str = "",
    ) -> None:
        """Adds a flag.

        Args:
          name: name without dashes.
          read: converts its text, or None if there is none, and the spelling of the flag to the value.
          dest: key under which the value is kept; empty: the name.
          switch: whether it means `true` without a value and has a `--noname`.
          words: values of a switch beside true and false.
          meaning: text for the help; empty: it is described elsewhere.
        """
        self._parser.add_argument(f"--{name}", action=_Read, read=read, dest=dest or name)
        self._names[name] = None
        if switch:
            self._switches[name] = {*BOOLEANS, *words}
            self._parser.add_argument(f"--no{name}", action="store_const", const=False, dest=dest or name)
        if meaning:
            self._help += _described(name, meaning)

    def parse(self, arguments: list[str]) -> Given:
        """Parses the arguments; `--help` prints and ends the process.

        Raises:
          UsageError: if a flag is unknown, or a flag or a field cannot have its value.
        """
        arguments = list(_with_files(arguments))
        end = arguments.index("--") if "--" in arguments else len(arguments)
        arguments, rest = arguments[:end], arguments[end + 1 :]
        if any(argument in _HELP for argument in arguments):
            self._print_help([argument for argument in arguments if argument not in _HELP])
            raise SystemExit(0)
        values, config, others = self._known(arguments)
        for argument in others:
            if argument.startswith("-") and argument != "-":
                raise UsageError(self._unknown(argument))
        options = self._options()
        for name in configs.fields(self._options):
            if name in values:
                configs.set_field(options, name, values[name])
        return Given(options, config, others + rest)

    def _known(self, arguments: list[str]) -> tuple[dict[str, Any], ConfigFlag, list[str]]:
        """Returns the values of the flags, the config flags, and all other arguments."""
        try:
            found, others = self._parser.parse_known_args(list(self._spelled(arguments)))
        except argparse.ArgumentError as error:
            raise UsageError(f"{error}; --help lists the flags") from None
        values = vars(found)
        if self._config is None:
            return values, ConfigFlag(), others
        changes = {name.removeprefix("config."): values[name] for name in values if name.startswith("config.")}
        return values, ConfigFlag(self._config.default, values.get("config"), changes), others

    def _spelled(self, arguments: list[str]) -> Iterator[str]:
        """Yields the arguments with two dashes, and each switch with its value."""
        pending = list(arguments)
        while pending:
            argument = pending.pop(0)
            match = _FLAG.match(argument)
            name = match[1] if match else ""
            if name in self._names or name.removeprefix("no") in self._switches:
                argument = f"--{argument.lstrip('-')}"
                if name in self._switches and "=" not in argument:
                    # A field consumes the next argument only if that can be its value, so that it does not swallow a
                    # path.
                    follows = name.startswith("config.") and pending and pending[0].lower() in self._switches[name]
                    argument += f"={pending.pop(0) if follows else 'true'}"
            yield argument

    def _unknown(self, argument: str) -> str:
        """Returns the error for an unknown flag."""
        name = argument.lstrip("-").partition("=")[0]
        if self._config is not None and name.removeprefix("no").startswith("config."):
            return config_flag.unknown_field(argument)
        own = [known for known in self._names if not known.startswith("config.")]
        group, dot, rest = name.partition(".")
        near = difflib.get_close_matches(group, own, n=1)
        hint = f": did you mean --{near[0]}{dot}{rest}?" if near else ""
        return f"{argument[:120]}: there is no flag --{name[:120]}{hint or '; --help lists the flags'}"

    def _print_help(self, arguments: list[str]) -> None:
        """Prints text and flags; the fields have the defaults of the recipe that the arguments name."""
        of_config: list[str] = []
        if self._config is not None:
            config = self._config
            with contextlib.suppress(UsageError):  # a user who asks for help may have made a mistake
                _, config, _ = self._known(arguments)
            of_config = config_flag.describe(config, _described, type_name)
        print("\n".join([self._text.strip(), "\nFlags:", *self._help, *of_config]))


class _Read(argparse.Action):
    """Stores the value that a function reads from a flag's text."""

    def __init__(self, *arguments: Any, read: Read, **options: Any):
        super().__init__(*arguments, nargs="?", **options)
        self.read = read

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Reads the text and stores the value."""
        setattr(namespace, self.dest, self.read(values, option_string or ""))


def _with_files(arguments: Iterable[str], within: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the arguments; replaces `--flagfile=FILE` by the lines of the file without blank ones and comments."""
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--":
            yield from (argument, *pending)
            return
        name, equals, path = argument.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            yield argument
            continue
        path = path if equals else pending.pop(0) if pending else ""
        if not path.strip():
            raise UsageError(f"--flagfile= {UNSET}")
        path = os.path.abspath(os.path.expanduser(path))
        if path in within:
            raise UsageError(f"--flagfile={path} includes itself: expected a file without that line")
        try:
            lines = [line.strip() for line in pathlib.Path(path).read_text().splitlines()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--flagfile={path} cannot be read ({reason}): expected a file with one flag per line"
            ) from None
        flags = [line for line in lines if line and not line.startswith(("#", "//"))]
        yield from _with_files(flags, (*within, path))


def _flag_name(known: Field) -> str:
    """Returns the name of an option's flag, without its group."""
    return known.name.rpartition(".")[2].removesuffix("_")


def _reader(known: Field, name: str) -> Read:
    """Returns the function that reads an option of the command."""

    def read(text: str | None, _: str) -> Any:
        if text is None:
            raise UsageError(f"--{name} has no value: expected --{name}=VALUE")
        if not text.strip():
            raise UsageError(f"--{name}= {UNSET}")
        as_given = f"--{name}={config_flag.shortened(text)}"
        value = config_flag.parse_unchecked(known, text, as_given)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{as_given}: expected a finite number")
        known.check(value, as_given)
        return value

    return read


def type_name(known: Field) -> str:
    """Returns the type of a field, such as `int`, and its allowed values if the type alone does not tell them."""
    kind, expected = f"list of {known.kind.__name__}" if known.many else known.kind.__name__, known.expected()
    for words in ("a whole number", "a number", "an integer"):
        if expected.startswith(words):
            return kind + expected.removeprefix(words)
    return kind if expected in ("text", "true or false") else f"{kind}, {expected}"


def _described(name: str, meaning: str, kind: str = "", default: Any = None) -> list[str]:
    """Returns the help lines of a flag."""
    lines = textwrap.wrap(f"--{name}: {meaning}", _WIDTH, initial_indent="  ", subsequent_indent="      ")
    if default is not None:
        lines += textwrap.wrap(
            f"{kind}; default {default}", _WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    return lines


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
