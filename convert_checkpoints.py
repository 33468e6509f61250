"""Converts checkpoints between PyTorch and JAX, and says what one holds.

    python convert_checkpoints.py to-jax FILE.pth.tar DIR       the original's checkpoint, or torchvision's, into DIR
    python convert_checkpoints.py to-jax FILE DIR --prefix=backbone.          another library's, under that prefix
    python convert_checkpoints.py to-torch DIR FILE.pth.tar     a run, as the original's code loads it
    python convert_checkpoints.py to-torch DIR FILE.pth --for=torchvision     its backbone, as torchvision's ResNet
    python convert_checkpoints.py inspect PATH                  what a file or a run holds

DIR is laid out as the working directory of a run: whatever takes one takes it. A name that ends in .safetensors writes
that format. MoCo's own scripts, that for detectron2 among them, read what the default, --for=moco, writes. Nothing in a
file is executed. Existing output is refused without --overwrite.
"""

if __name__ == "__main__":  # first: what is imported below takes seconds
    from ifm_jax import process

    process.begin()

import pathlib
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from ifm_jax.cli import command
from ifm_jax.errors import UsageError
from ifm_jax.runs import snapshot
from ifm_jax.torch_interop import reading, writing
from ifm_jax.torch_interop.description import describe

_CONFIG = command.define_config()  # to-jax: the recipe of the run, checked against the file
_FOR = flags.DEFINE_enum("for", "moco", writing.TARGETS, "to-torch: who is to read the file.")
_PREFIX = flags.DEFINE_string("prefix", "", "What the network's names in a PyTorch file begin with, as backbone.")
_STEP = flags.DEFINE_integer("step", None, "to-jax: updates done, where the file does not say.", lower_bound=0)
_EPOCH = flags.DEFINE_integer("epoch", None, "to-torch: epochs done, where the run does not say.", lower_bound=0)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace existing output.")

_COMMANDS = {"to-jax": ("FILE.pth.tar", "DIR"), "to-torch": ("DIR", "FILE.pth.tar"), "inspect": ("PATH",)}


def main(arguments: list[str]) -> int:
    """Converts; returns the exit status."""
    name, paths = (arguments[0] if arguments else None), arguments[1:]
    if name not in _COMMANDS:
        raise UsageError(f"{name or 'no command'}: expected one of {', '.join(_COMMANDS)}; --help shows them")
    if len(paths) != len(_COMMANDS[name]):
        raise UsageError(f"{name} takes {' '.join(_COMMANDS[name])}, {len(paths)} arguments were given")
    for what, path in zip(_COMMANDS[name], paths, strict=True):
        if not path.strip():
            raise UsageError(f"{name}: {what} {command.UNSET}")
    if name == "to-jax":
        config = _CONFIG() if _CONFIG.recipe or _CONFIG.changes else None
        options = {"step": _STEP.value, "prefix": _PREFIX.value, "overwrite": _OVERWRITE.value}
        found = reading.to_jax(*paths, config=config, **options)
    elif name == "to-torch":
        options = {"epoch": _EPOCH.value, "prefix": _PREFIX.value, "overwrite": _OVERWRITE.value}
        found = writing.to_torch(*paths, _FOR.value, **options)
    else:
        found = snapshot.read(*paths, prefix=_PREFIX.value)
    _print_table(" -> ".join(paths), describe(found))
    for note in found.notes:
        print(f"{pathlib.Path(__file__).name}: warning: {note}", file=sys.stderr)
    return 0


def _print_table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may stand after the paths
    command.run(main)
