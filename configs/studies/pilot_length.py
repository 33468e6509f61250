"""Pilot on length: does what IFM does survive when a run is four times as long?

    ifm-jax study --config=configs/studies/pilot_length.py --workdir=runs/pilot_length

Exploratory, like `pilot_trifeature.py`; its seeds and two more.

Hardware: about half an hour of two CPU cores.
"""

from ifm_jax import recipes
from ifm_jax.studies import Comparison, Study


def get_study() -> Study:
    """Returns the study."""
    config = recipes.load("ifm_simclr_trifeature")
    config.checkpoint_keep = 1
    config.epochs = 24
    return Study(
        question="Does what IFM does survive when a run is four times as long?",
        sources={"trifeature, 24 epochs": config},
        arms={"T 0.07": {"ifm.objective": "infonce"}, "T 0.07, eps 0.1": {"ifm.objective": "ifm"}},
        seeds=(1000, 1001, 1002, 1003),
        comparisons=[Comparison("T 0.07, eps 0.1", "T 0.07")],
    )
