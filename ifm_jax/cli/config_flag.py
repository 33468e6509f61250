"""`--config=RECIPE` and `--config.field=value` on the command line: a recipe, and changes to its fields."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ifm_jax import recipes
from ifm_jax.config import Config, Field, did_you_mean, fields, find, get_field, set_field, shown
from ifm_jax.errors import UsageError

UNSET = "is empty: an unset shell variable?"
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclasses.dataclass(frozen=True)
class ConfigFlag:
    """The config flags on the command line.

    Attributes:
      default: recipe used without `--config`; None: there is none.
      recipe: path or name as given; None: not given.
      changes: new values of the changed fields, by name.
    """

    default: str | None = None
    recipe: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether the command line has any config flag."""
        return self.recipe is not None or bool(self.changes)

    def name(self) -> str:
        """Returns the name of the recipe: `trifeature` for `configs/trifeature.py`."""
        return recipes.name_of(self.recipe or self.default or "config")

    def __call__(self) -> Config:
        """Returns the recipe's config with the changes.

        Raises:
          UsageError: if the recipe cannot be loaded.
        """
        recipe = self.recipe or self.default
        if recipe is None:
            raise UsageError(
                f"--config.{next(iter(self.changes), 'field')} changes a recipe: expected --config=FILE.py as well"
            )
        return self._changed(recipes.load(recipe))

    def over(self, base: Callable[[], Config]) -> Config:
        """Returns the recipe's config, or `base` if `--config` is not given, with the changes."""
        return self() if self.recipe is not None else self._changed(base())

    def _changed(self, config: Config) -> Config:
        for name, value in self.changes.items():
            set_field(config, name, value)
        return config


def names() -> Iterator[tuple[str, Field, Mapping[Any, Any]]]:
    """Yields every name under which a field can be set, the field, and the new names of former values."""
    for name, known in fields().items():
        if not known.is_group:
            yield name, known, {}
            for former, renamed in known.declared.formerly.items():
                yield f"{name.rpartition('.')[0]}.{former}", known, renamed


def read_recipe(text: str | None, given: str) -> str:
    """Returns the path or name of a recipe.

    Args:
      text: value of the flag; None: it has none.
      given: spelling of the flag, such as `--config`.

    Raises:
      UsageError: if there is no text.
    """
    if text is None:
        raise UsageError(f"{given} has no value: expected {given}=VALUE, a recipe")
    if not text.strip():
        raise UsageError(f"--config= {UNSET}")
    return text


def reader(name: str, known: Field, renamed: Mapping[Any, Any]) -> Callable[[str | None, str], Any]:
    """Returns the function that reads the value of a field; the arguments come from `names`."""

    def read(text: str | None, given: str) -> Any:
        if text is None:
            raise UsageError(f"{given} has no value: expected {given}=VALUE, {known.expected()}")
        return parse(known, renamed, text, f"--config.{name}={shortened(text)}")

    return read


def unknown_field(argument: str) -> str:
    """Returns the error for an argument such as `--config.lr=1`, which names no field."""
    name = argument.lstrip("-").partition("=")[0].partition("config.")[2]
    found = find(name)
    if found is None or not found[0].is_group or argument.lstrip("-").startswith("no"):
        near = did_you_mean(name, fields()) or "; --help lists the fields"
        return f"{shortened(argument)}: there is no config field {shown(name)}{near}"
    one = next(each for each in fields() if each.startswith(f"{name}.") and not fields()[each].is_group)
    return f"{shortened(argument)}: {name} is a group of fields: expected one of them, such as --config.{one}"


def parse(known: Field, renamed: Mapping[Any, Any], text: str, as_given: str) -> Any:
    """Parses the value of a field from a text.

    Args:
      known: the field.
      renamed: former values and their new names.
      text: `0.2`; `true`, `false`, `1` or `0`; `1,3,10` or `(1,3,10)`; `none` if that is a value.
      as_given: argument as given, for the message.

    Raises:
      UsageError: if the text is no value, or one that the field cannot have.
    """
    value = parse_unchecked(known, text, as_given)
    value = renamed.get(value, value)
    known.check(value, as_given)
    return value


def parse_unchecked(known: Field, text: str, as_given: str) -> Any:
    """Parses a value of the field's type, which may be out of its bounds; see `parse`."""
    try:
        if known.optional and text.lower() == "none":
            return None
        if text.lower() in known.words:
            return text.lower()
        if not known.many:
            return _parse_one(known.kind, text)
        inner = text.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1]
        parts = inner.strip().removesuffix(",").split(",") if inner.strip() else []
        return tuple(_parse_one(known.kind, part.strip()) for part in parts)
    except (ValueError, KeyError):
        raise UsageError(f"{as_given}: expected {known.expected()}") from None


def _parse_one(kind: type, text: str) -> Any:
    if kind is bool:
        return BOOLEANS[text.lower()]
    if kind is int:
        return int(text, 0) if re.match(r"[+-]?0[xXoObB]", text) else int(text)
    return kind(text)


def shortened(text: str) -> str:
    """Shortens a text for a message."""
    return text if len(text) <= 120 else f"{text[:100]}..."


def describe(flag: ConfigFlag, line: Callable[..., list[str]], kind: Callable[[Field], str]) -> list[str]:
    """Returns the help on the config: every field, by group, with its type, default and meaning.

    Args:
      flag: config flag whose recipe gives the defaults.
      line: formats the lines of a flag: `(name, meaning, type, default)`.
      kind: names the type of a field.

    Raises:
      UsageError: if the recipe cannot be loaded.
    """
    recipe = flag.recipe or flag.default
    config = recipes.load(recipe) if recipe else Config()
    lines = ["", "Config:"]
    lines += line("config", "A recipe: a Python file with get_config(), or the name of one in configs/.")
    lines += line(
        "config.FIELD=VALUE", "Changes a field of the recipe; for a bool also --config.FIELD and --noconfig.FIELD."
    )
    whose = f"the defaults of the recipe {flag.name()}" if recipe else "the original's defaults"
    lines += ["", f"Config fields, with {whose}:"]
    by_group: dict[str, list[str]] = {"": []}
    for name, known in fields().items():
        if known.is_group:
            by_group[name] = ["", f"{name}: {known.declared.meaning}"]
        else:
            group = name.rpartition(".")[0]
            by_group[group] += line(
                f"config.{name}", known.declared.meaning, kind(known), as_text(get_field(config, name))
            )
    return lines + [text for group in by_group.values() for text in group]


def as_text(value: Any) -> str:
    """Formats a value for the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value) or "(empty)"
