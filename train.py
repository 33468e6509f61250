"""Pre-trains an encoder with MoCo-v2 and implicit feature modification.

    python train.py                                              the embedded default, into runs/trifeature
    python train.py --config=configs/x.py --workdir=DIR          a recipe
    python train.py --config.ifm.epsilon=0.2 --workdir=DIR       with a field changed

The same command goes on with what the workdir holds.
"""

if __name__ == "__main__":  # first: what is imported below takes seconds
    from ifm_jax import process

    process.begin(hosts=True)

import pathlib

from absl import flags

from ifm_jax.cli import command
from ifm_jax.runs import training

_HERE = pathlib.Path(__file__).parent
_CONFIG = command.define_config(default=str(_HERE / "configs" / "trifeature.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; runs/<recipe> if not given.")
_JOIN_HOSTS = command.define_hosts()


def main(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    command.refuse_arguments(arguments)
    config = _CONFIG()
    workdir = _WORKDIR.value or pathlib.Path("runs") / command.recipe_name()
    command.workdir(workdir)
    _JOIN_HOSTS()
    result = training.train(config, workdir)
    return command.say_stopped(result, workdir) if result.stopped_by is not None else 0


if __name__ == "__main__":
    command.run(main)
