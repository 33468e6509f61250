"""Prints the fields of a config: name, type, value and meaning; and recommends a config for your images.

    ifm-jax config                                  every field, with the original's defaults
    ifm-jax config --config=NAME                    a recipe; marks what differs from the defaults
    ifm-jax config --config=NAME --config.epochs=9  with a field changed
    ifm-jax config --list                           the recipes, one a line
    ifm-jax config --suggest --images=N             a recipe for N images: batch size, queue, learning rate, epochs
    ... --suggest --images=N --memory=GB            for an accelerator with that much memory

On a terminal the fields are a table. In a pipe each is a line of five columns, separated by tabs: name, type, value,
the default if the value differs from it, and meaning.
"""

import dataclasses
import sys
import textwrap

from ifm_jax import config as configs
from ifm_jax import recipes
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import ConfigFlag, as_text
from ifm_jax.cli.flags import Flags, Given, type_name
from ifm_jax.config import Config, Field, Group, field
from ifm_jax.errors import UsageError


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    list: bool = field(False, "List the recipes.")
    suggest: bool = field(False, "Recommend a config for a number of images.")
    images: int | None = field(None, "Number of training images, with --suggest.", expected="an integer")
    memory: float = field(16.0, "Memory of the accelerator in GB, with --suggest.", above=0)


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag())


def main(given: Given) -> int:
    """Prints fields, recipes or a recommendation; returns the exit status."""
    given.refuse_arguments()
    options = given.options
    if options.images is not None and not options.suggest:
        raise UsageError(f"--images={options.images} has no effect: expected --suggest as well")
    if options.list:
        _print_recipes()
    elif options.suggest:
        _print_suggestion(options, given.config)
    else:
        _print_fields(given.config)
    return 0


def _print_recipes() -> None:
    described = recipes.described()
    width = max(map(len, described))
    print(*(f"{name:<{width}}  {text}" for name, text in described.items()), sep="\n")


def _print_fields(flag: ConfigFlag) -> None:
    """Prints every field of the config that the flags describe."""
    config = flag.over(Config)
    rows = [
        (known, as_text(configs.get_field(config, name)), as_text(known.default))
        for name, known in configs.fields().items()
        if not known.is_group
    ]
    if sys.stdout.isatty():
        _print_table(flag, rows)
    else:
        for known, value, default in rows:
            differs = default if value != default else ""
            print(known.name, type_name(known), value, differs, known.declared.meaning, sep="\t")
    try:
        configs.validate(config)
    except UsageError as error:
        print(f"As it is, this config cannot be run: {error}", file=sys.stderr)


def _print_table(flag: ConfigFlag, rows: list[tuple[Field, str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    differing = sum(value != default for _, value, default in rows)
    title = f"{flag.name()}: {recipes.described().get(flag.name(), '')}".removesuffix(": ") if flag.recipe else "Config"
    title += f" ({differing} of {len(rows)} fields differ from the defaults)"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    table.add_column("field", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("value", overflow="fold", width=16)
    table.add_column("meaning")
    for known, value, default in rows:
        differs = value != default
        shown = Text(value, "bold")
        if differs:
            shown.append(f"\n(default {default})", "not bold dim")
        # The meaning tells the choices too.
        kind = "list" if known.many else known.kind.__name__
        style = "bold" if differs else ""
        table.add_row(Text(known.name, style), Text(kind, "dim"), shown if differs else value, known.declared.meaning)
    Console().print(table)


def _print_suggestion(options: Options, flag: ConfigFlag) -> None:
    """Prints what is recommended, why, and the command."""
    if options.images is None:
        raise UsageError("--suggest needs the number of your images: expected --images=N as well")
    if flag.given:
        raise UsageError("--suggest chooses the recipe: expected no --config; change fields of the command it prints")
    import jax

    from ifm_jax.runs import suggestion  # imports Flax and traces the network: a few seconds

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, so no accelerator need be taken
    found = suggestion.suggest(options.images, options.memory * 1e9)
    shown = {"recipe": found.recipe}
    shown |= {
        name: as_text(configs.get_field(found.config, name))
        for name in found.reasons
        if name not in ("recipe", "memory")
    }
    shown["memory"] = f"{found.bytes / 1e9:.1f} GB"
    print(f"For {options.images:,} images and an accelerator with {options.memory:g} GB (rules of thumb, not tuned):\n")
    for name, reason in found.reasons.items():
        first, *more = textwrap.wrap(reason, 120 - 35)
        print(f"  {name:<15}  {shown[name]:<14}  {first}", *(" " * 35 + line for line in more), sep="\n")
    changes = "".join(f" --config.{name}={as_text(value)}" for name, value in found.changes.items())
    print(
        f"\n    ifm-jax train --config={found.recipe} --config.data.source=folder:PATH{changes} --workdir=runs/own\n\n"
        "With too little memory, halve batch_size, moco.queue_size and the rate of SGD."
    )


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags(), with_jax=False)
