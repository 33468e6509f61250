"""`ifm-jax COMMAND ...`: the door to all commands. The scripts of a clone and `python -m ifm_jax` are the same door.

Only the standard library is imported until the command is known and its process is prepared: the rest takes seconds, in
which Ctrl-C must already give one line.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from ifm_jax import process

TYPE_CHECKING = False  # same as typing's, without its slow import
if TYPE_CHECKING:
    from typing import NoReturn

_PROGRAM = "ifm-jax"
# name -> what it does, in a line.
COMMANDS = {
    "train": "pre-trains an encoder with MoCo-v2 or SimCLR, with or without IFM; resumes a run",
    "eval": "evaluates a run or a checkpoint: linear probe, nearest neighbors, features, maps",
    "config": "prints every config field of a recipe; --list: all recipes; --suggest: one for your images",
    "convert": "converts checkpoints between PyTorch and JAX, and describes them",
    "study": "runs a study: settings x seeds, compared in pairs",
    "suppression": "reads out every label of several runs; compares methods over seeds",
    "replay": "trains on recorded views and compares with a reference, step by step",
    "demo": "pre-trains with InfoNCE and IFM on drawn images, and shows what each has learned",
}
_MODULES = {"eval": "evaluate"}  # where its name is not the command's
_SEVERAL_HOSTS = ("train", "eval")  # commands that may be one of several processes


def main() -> NoReturn:
    """Runs the command that the command line names, and ends the process."""
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        # The name with which every message of this process begins.
        sys.argv = [f"{_PROGRAM} {name}", *rest]
        run(name)
    sys.argv = [_PROGRAM, *sys.argv[1:]]
    process.prepare_streams()
    if name in ("", "help", "--help", "-h", "--helpfull"):
        _print(_described())
    if name == "--version":
        from ifm_jax import __version__

        _print(f"{_PROGRAM} {__version__}")
    process.say(_unknown(name))
    sys.exit(2)


def run(name: str) -> NoReturn:
    """Runs a command with the arguments of the process, and ends the process.

    Args:
      name: one of `COMMANDS`.
    """
    process.begin(hosts=name in _SEVERAL_HOSTS)  # first: the imports below take a while
    module = importlib.import_module(f"ifm_jax.cli.{_MODULES.get(name, name)}")
    module.run()
    raise AssertionError  # it has ended the process


def _described() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            "Contrastive pre-training with implicit feature modification (IFM), on MoCo-v2 and SimCLR, in JAX.",
            "",
            f"    {_PROGRAM} COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            f"{_PROGRAM} COMMAND --help lists the flags of a command. A first run, on images that it draws itself: "
            f"{_PROGRAM} train",
        ]
    )


def _unknown(name: str) -> str:
    """Returns the error for a first argument that is no command."""
    import difflib

    if name.startswith("-"):
        return f"{name[:120]}: expected a command before the flags: one of {', '.join(COMMANDS)}"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
    return f"there is no command {' '.join(name.split())[:120]!r}: {hint}"


def _print(text: str) -> NoReturn:
    """Prints a text and ends the process."""
    output = process.Output(sys.stdout)
    print(text, file=output, flush=True)
    os._exit(128 + signal.SIGPIPE if output.closed_by_reader else 1 if output.failure else 0)
