"""`--config=RECIPE` and `--config.field=value` on the command line: a recipe, and fields changed on top of it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ifm_jax import recipes
from ifm_jax.config import Config, Field, did_you_mean, fields, find, set_field, shown
from ifm_jax.errors import UsageError

UNSET = "is empty: an unset shell variable?"
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_FLAG = re.compile(r"--?(?P<no>no)?config(?:\.(?P<field>[^=]*))?(?:=(?P<text>.*))?", re.DOTALL)


class ConfigFlag:
    """What the command line says of the config.

    Taken are `--config=RECIPE`, `--config.field=value`, either with a space instead of `=`; `--config.field` and
    `--noconfig.field` for booleans; one dash instead of two. Of repeated ones the last counts.

    Args:
      default: the recipe that is taken without `--config`; None: there is none.

    Attributes:
      recipe: path or name as given; None: not given.
      changes: values of the fields that are changed, by name.
    """

    def __init__(self, default: str | None = None):
        self.default = default
        self.recipe: str | None = None
        self.changes: dict[str, Any] = {}

    def take(self, arguments: list[str]) -> list[str]:
        """Takes what is about the config from the command line; returns the other arguments.

        Raises:
          UsageError: for a field that does not exist, or a value that it cannot have.
        """
        self.recipe, self.changes = None, {}
        others, pending = [], list(arguments)
        while pending:
            argument = pending.pop(0)
            match = _FLAG.fullmatch(argument)
            if argument == "--":
                return [*others, argument, *pending]
            if match is None:
                others.append(argument)
            elif match["field"] is None and not match["no"]:
                self.recipe = match["text"] if match["text"] is not None else _next(pending, argument, "a recipe")
                if not self.recipe.strip():
                    raise UsageError(f"--config= {UNSET}")
            else:
                name, value = _change(argument, match, pending)
                self.changes[name] = value
        return others

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
                f"--config.{next(iter(self.changes), 'field')} changes a recipe: expected --config=FILE.py"
            )
        return self._changed(recipes.load(recipe))

    def over(self, base: Callable[[], Config]) -> Config:
        """Returns the recipe's config, or `base`'s where `--config` is not given, with the changes."""
        return self() if self.recipe is not None else self._changed(base())

    def _changed(self, config: Config) -> Config:
        for name, value in self.changes.items():
            set_field(config, name, value)
        return config


def _change(argument: str, match: re.Match, pending: list[str]) -> tuple[str, Any]:
    """Returns name and value of the field that an argument changes; takes its value from `pending` if it is there."""
    name, text, negated = match["field"] or "", match["text"], match["no"] is not None
    found = find(name)
    if found is None or (negated and (found[0].kind is not bool or text is not None)):
        near = did_you_mean(name, fields()) or "; ifm_jax/config.py lists the fields"
        raise UsageError(f"{_shortened(argument)}: there is no config field {shown(name)}{near}")
    known, renamed = found
    if known.is_group:
        one = next(
            each.name for each in fields().values() if each.name.startswith(f"{known.name}.") and not each.is_group
        )
        raise UsageError(
            f"{_shortened(argument)}: {name} is a group of fields: expected one of them, as --config.{one}"
        )
    if negated:
        return known.name, False
    if text is None:
        if known.kind is bool and (not pending or pending[0].lower() not in _BOOLEANS):
            return known.name, True
        text = _next(pending, argument, known.expected())
    as_given = f"--config.{name}={_shortened(text)}"
    return known.name, parse(known, renamed, text, as_given)


def parse(known: Field, renamed: Mapping[Any, Any], text: str, as_given: str) -> Any:
    """Returns the value of a field that a text stands for.

    Args:
      known: the field.
      renamed: former values, and what they are called now.
      text: `0.2`; `true`, `false`, `1` or `0`; `1,3,10` or `(1,3,10)`; `none` where that is a value.
      as_given: the argument, for the message.

    Raises:
      UsageError: if it stands for none, or for one that the field cannot have.
    """
    try:
        if known.optional and text.lower() == "none":
            value = None
        elif known.many:
            inner = text.strip()
            if inner[:1] + inner[-1:] in ("()", "[]"):
                inner = inner[1:-1]
            parts = inner.strip().removesuffix(",").split(",") if inner.strip() else []
            value = tuple(_parse_one(known.kind, part.strip()) for part in parts)
        else:
            value = _parse_one(known.kind, text)
    except (ValueError, KeyError):
        raise UsageError(f"{as_given}: expected {known.expected()}") from None
    value = renamed.get(value, value)
    known.check(value, as_given)
    return value


def _parse_one(kind: type, text: str) -> Any:
    if kind is bool:
        return _BOOLEANS[text.lower()]
    if kind is int:
        return int(text, 0) if re.match(r"[+-]?0[xXoObB]", text) else int(text)
    return kind(text)


def _next(pending: list[str], argument: str, expected: str) -> str:
    """Takes the value of a flag that is followed by a space."""
    if not pending or pending[0].startswith("--"):
        raise UsageError(f"{argument} has no value: expected {argument}=VALUE, {expected}")
    return pending.pop(0)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}..."
