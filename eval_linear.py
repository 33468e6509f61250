"""Reads every label of the data linearly out of a pre-trained, frozen backbone.

    python eval_linear.py --workdir=DIR

The features before the projection head, in evaluation mode; one logistic regression a label on the training images,
accuracy on held-out ones, beside the same for the untrained network. Writes results.json into the workdir.
"""

import json
import pathlib

from absl import flags

from ifm_jax import command, training
from ifm_jax.errors import UsageError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to evaluate.")


def main(arguments: list[str]) -> int:
    """Evaluates; returns the exit status."""
    from ifm_jax.evaluation import report, suppression

    command.refuse_arguments(arguments)
    if _WORKDIR.value is None:
        raise UsageError("--workdir is missing: expected the directory of a training run")
    workdir = pathlib.Path(_WORKDIR.value)
    config = training.read_config(workdir)
    trained = suppression.read_out_workdir(workdir)
    rows = [suppression.read_out_untrained(config), trained]
    report.print_table(rows)
    path = workdir / "results.json"
    path.write_text(json.dumps({row.name: row.to_dict() for row in rows}, indent=2) + "\n")
    print(f"Written to {path}.")
    return 0


if __name__ == "__main__":
    command.run(main)
