"""What a run says of itself: in a line at its start, and at its end with the command to type next."""

import os
import pathlib
import shlex

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.runs.loop import Outcome


def introduction(config: Config, images: int, workdir: str | os.PathLike[str], recipe: str = "") -> str:
    """Returns the first line of a run: recipe, method, images and workdir.

    Args:
      config: config of the run.
      images: number of training images.
      workdir: working directory of the run.
      recipe: name of the recipe; empty: it is not named.
    """
    if config.method == "moco":
        negatives = f"K = {config.moco.queue_size:,}"
    else:
        negatives = f"negatives from the batch of {config.batch_size:,}"
    method = f"{configs.method_name(config)}, {negatives}"
    of = f"{images:,} images of {config.data.source} at {config.data.image_size} px"
    return f"{f'{recipe}: ' if recipe else ''}{method}; {of}; workdir {_shown(workdir)}"


def conclusion(outcome: Outcome, workdir: str | os.PathLike[str], *, labels: bool) -> list[str]:
    """Returns the last lines of a complete run: what is where, and what to do next.

    Args:
      outcome: end of the loop.
      workdir: working directory of the run.
      labels: whether the images have labels.
    """
    path = _shown(workdir)
    evaluation = "--fast" if labels else "--neighbors=neighbors.png --map=map.png"
    hint = "; without --fast: the original's protocol of 60 epochs" if labels else "; other evaluations need labels"
    return [
        f"Done. {path} has the checkpoint of step {outcome.step} (checkpoints/), metrics.jsonl, curves.png, "
        "samples.png and tensorboard/.",
        f"Next: ifm-jax eval --workdir={shlex.quote(path)} {evaluation}   (evaluates it{hint})",
    ]


def _shown(path: str | os.PathLike[str]) -> str:
    """Returns a path as one would type it here: relative if it is below the current directory."""
    path, here = pathlib.Path(path).absolute(), pathlib.Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
