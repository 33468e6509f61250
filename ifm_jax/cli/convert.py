"""Converts checkpoints between PyTorch and JAX, and describes them.

    ifm-jax convert to-jax FILE.pth.tar DIR                       reads the original's or torchvision's checkpoint
    ifm-jax convert to-jax FILE DIR --prefix=backbone.            another library's, with that prefix
    ifm-jax convert to-torch DIR FILE.pth.tar                     writes a run in the original's format
    ifm-jax convert to-torch DIR FILE.pth --for=torchvision       its backbone, as torchvision's ResNet
    ifm-jax convert inspect PATH                                  describes the contents of a file or a run

DIR has the layout of a run's working directory, and is accepted wherever one is. A file name that ends in .safetensors
selects that format. MoCo's own scripts, including the one for detectron2, read what the default, --for=moco, writes.
Code in a file is never executed. Existing output is replaced only with --overwrite. In a clone,
python convert_checkpoints.py is the same.
"""

import dataclasses
import os
import sys

from ifm_jax.choices import TARGETS
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import UNSET, ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError

_COMMANDS = {"to-jax": ("FILE.pth.tar", "DIR"), "to-torch": ("DIR", "FILE.pth.tar"), "inspect": ("PATH",)}


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    for_: str = field(
        "moco",
        "to-torch: format of the file, named after the program that reads it.",
        choices=TARGETS,
        expected=f"one of {', '.join(TARGETS)}",
    )
    prefix: str = field("", "Prefix of the network's names in a PyTorch file, such as backbone.")
    step: int | None = field(
        None, "to-jax: updates done, if the file does not tell.", least=0, expected="a non-negative integer"
    )
    epoch: int | None = field(
        None, "to-torch: epochs done, if the run does not tell.", least=0, expected="a non-negative integer"
    )
    overwrite: bool = field(False, "Replace existing output.")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag())  # to-jax: the recipe of the run, checked against the file


def main(given: Given) -> int:
    """Converts; returns the exit status."""
    name, *paths = given.arguments or [""]
    if name not in _COMMANDS:
        raise UsageError(f"{name or 'no command'}: expected one of {', '.join(_COMMANDS)}; --help describes them")
    if len(paths) != len(_COMMANDS[name]):
        raise UsageError(f"{name} with {len(paths)} arguments: expected {name} {' '.join(_COMMANDS[name])}")
    for what, path in zip(_COMMANDS[name], paths, strict=True):
        if not path.strip():
            raise UsageError(f"{name}: {what} {UNSET}")
    from ifm_jax.runs import loading
    from ifm_jax.torch_interop import reading, writing
    from ifm_jax.torch_interop.description import describe

    options = given.options
    if name == "to-jax":
        config = given.config() if given.config.given else None
        source, directory = paths
        found = reading.to_jax(
            source, directory, config=config, step=options.step, prefix=options.prefix, overwrite=options.overwrite
        )
    elif name == "to-torch":
        source, file = paths
        found = writing.to_torch(
            source, file, options.for_, epoch=options.epoch, prefix=options.prefix, overwrite=options.overwrite
        )
    else:
        found = loading.read(paths[0], prefix=options.prefix)
    _print_table(" -> ".join(paths), describe(found))
    for note in found.notes:
        print(f"{os.path.basename(sys.argv[0])}: warning: {note}", file=sys.stderr)
    return 0


def _print_table(title: str, rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
