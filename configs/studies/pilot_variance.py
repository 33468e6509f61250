"""Pilot on variance: what makes a difference between two arms easier to see?

    ifm-jax study --config=configs/studies/pilot_variance.py --workdir=runs/pilot_variance
    python -m benchmarks.variance --study=studies/pilot_variance --workdir=runs/pilot_variance --checkpoints=3,6

Exploratory. AdamW and SGD, six seeds each; the second command reads the six checkpoints that every run keeps, for
averaged weights and for further draws of the readout's images. Longer runs are in `pilot_length.py`.

Hardware: about twenty minutes of two CPU cores, and eight for the second command.
"""

from ifm_jax import recipes
from ifm_jax.studies import Comparison, Study


def get_study() -> Study:
    """Returns the study."""
    config = recipes.load("ifm_simclr_trifeature")
    config.checkpoint_every = 64
    config.checkpoint_keep = 6  # steps 448, 512, ... 768: the last two fifths
    sgd = {"optim.name": "sgd", "optim.lr": 0.06}
    return Study(
        question="What makes a difference between two arms easier to see?",
        sources={"trifeature": config},
        arms={
            "AdamW": {"ifm.objective": "infonce"},
            "AdamW, eps 0.1": {"ifm.objective": "ifm"},
            "SGD": {"ifm.objective": "infonce"} | sgd,
            "SGD, eps 0.1": {"ifm.objective": "ifm"} | sgd,
        },
        seeds=(1000, 1001, 1002, 1003, 1004, 1005),
        comparisons=[Comparison("AdamW, eps 0.1", "AdamW"), Comparison("SGD, eps 0.1", "SGD")],
    )
