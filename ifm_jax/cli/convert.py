"""Converts checkpoints between PyTorch and JAX, and describes them.

    ifm-jax convert to-jax FILE.pth.tar DIR                       reads the original's or torchvision's checkpoint
    ifm-jax convert to-jax FILE DIR --prefix=backbone.            another library's, with that prefix
    ifm-jax convert to-torch DIR FILE.pth.tar                     writes a run in the original's format
    ifm-jax convert to-torch DIR FILE.pth --for=torchvision       its backbone, as torchvision's ResNet
    ifm-jax convert to-torch DIR FOLDER --for=timm [--push=USER/REPO]     for timm and the Hugging Face hub
    ifm-jax convert export DIR FILE                               writes the backbone as a program that needs only JAX
    ifm-jax convert inspect PATH                                  describes the contents of a file or a run

DIR has the layout of a run's working directory, and is accepted wherever one is. A file name that ends in .safetensors
selects that format. With --for=timm, a name that ends in .pth, .pth.tar, .pt or .safetensors is a file, any other one a
folder, which timm loads as local-dir:FOLDER. MoCo's own scripts, including the one for detectron2, read what the
default, --for=moco, writes. Code in a file is never executed. Existing output is replaced only with --overwrite. In a
clone, python convert_checkpoints.py is the same.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable

from ifm_jax.choices import TARGETS
from ifm_jax.cli import command
from ifm_jax.cli.config_flag import UNSET, ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError

_COMMANDS = {
    "to-jax": ("FILE.pth.tar", "DIR"),
    "to-torch": ("DIR", "FILE.pth.tar"),
    "export": ("DIR", "FILE"),
    "inspect": ("PATH",),
}
_ANY = "polymorphic"


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    for_: str = field(
        "moco",
        "to-torch: format, named after the program that reads it; timm: also a folder with config and model card.",
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
    push: str = field("", "to-torch --for=timm: upload the folder to USER/REPO on the Hugging Face hub.")
    private: bool = field(False, "With --push: create the repository as a private one.")
    batch: str = field(
        _ANY,
        f"export: number of images in a call, or {_ANY}: each call decides.",
        expected=f"a whole number of at least 1, or {_ANY}",
    )
    platforms: str = field(
        "cpu,cuda,tpu", "export: platforms that can run the program, of cpu, cuda, rocm, tpu; none is needed here."
    )
    image_size: int = field(0, "export: side of the images in pixels; 0: the run's (a PyTorch file: 224).", least=0)
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
    from ifm_jax.torch_interop import reading, timm_folder, writing
    from ifm_jax.torch_interop.description import describe

    options = given.options
    if name == "to-jax":
        config = given.config() if given.config.given else None
        source, directory = paths
        found = reading.to_jax(
            source, directory, config=config, step=options.step, prefix=options.prefix, overwrite=options.overwrite
        )
    elif name == "to-torch" and options.for_ == "timm" and timm_folder.is_folder(paths[1]):
        return _to_timm(paths[0], paths[1], options)
    elif name == "export":
        return _export(paths[0], paths[1], options)
    elif name == "to-torch":
        source, file = paths
        if options.push:
            raise UsageError(f"--push={options.push} uploads a folder: expected to-torch DIR FOLDER --for=timm")
        found = writing.to_torch(
            source, file, options.for_, epoch=options.epoch, prefix=options.prefix, overwrite=options.overwrite
        )
    else:
        found = loading.read(paths[0], prefix=options.prefix)
    _print_table(" -> ".join(paths), describe(found))
    _warn(found.notes)
    return 0


def _to_timm(source: str, folder: str, options: Options) -> int:
    """Writes a folder for timm and uploads it if that is asked for; returns the exit status."""
    from ifm_jax.torch_interop import hub, timm_folder
    from ifm_jax.torch_interop.description import describe

    if options.push:  # mistakes first: what follows takes a while
        hub.check_repo(options.push, f"--push={options.push}")
        hub.require()
    found, check = timm_folder.write(source, folder, prefix=options.prefix, overwrite=options.overwrite)
    rows = describe(found)
    if check is not None:
        rows["compared"] = f"features of timm {check.timm} and ours: relative difference at most {check.difference:.1e}"
    _print_table(f"{source} -> {folder}", rows)
    _warn(found.notes)
    if options.push:
        print(f"Uploaded: {hub.push(folder, options.push, private=options.private)}")
    return 0


def _export(source: str, path: str, options: Options) -> int:
    """Writes the backbone as a program for JAX alone; returns the exit status."""
    from ifm_jax.runs import exporting
    from ifm_jax.torch_interop.description import describe

    batch = None if options.batch == _ANY else int(options.batch) if options.batch.isdecimal() else 0
    if batch == 0:
        raise UsageError(f"--batch={options.batch}: expected a whole number of at least 1, or {_ANY}")
    found, content = exporting.export(
        source,
        path,
        batch=batch,
        platforms=options.platforms.split(","),
        image_size=options.image_size,
        prefix=options.prefix,
        overwrite=options.overwrite,
    )
    shapes = [" x ".join(map(str, content[name]["shape"])) for name in ("input", "output")]
    _print_table(
        f"{source} -> {path}",
        describe(found) | {"program": " -> ".join(shapes), "platforms": ", ".join(content["platforms"])},
    )
    _warn(found.notes)
    print(f"{path}.json tells how to prepare the images.")
    return 0


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"{os.path.basename(sys.argv[0])}: warning: {note}", file=sys.stderr)


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
